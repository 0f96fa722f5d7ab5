"""Several processes: DDP or FSDP2 by Accelerate, for the predictor alone (docs/training.md, "Several processes").

The encoder is frozen and every process has all of it: it is neither broadcast nor sharded nor reduced.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..configuration_vjepa2_ac import VJEPA2ACConfig
from ..modeling_vjepa2_ac import VJEPA2ACModel
from .trackers import check_trackers


def group_timeout(loader_timeout: float) -> timedelta:
    """How long a process waits for the others: longer than a loader that hangs takes to end its own process (twice its
    time-out, `BatchWatch`), which says what is wrong. NCCL's own limit of 10 minutes would come first."""
    return timedelta(seconds=2 * loader_timeout + 600)


def build_accelerator(arguments: argparse.Namespace) -> Accelerator:
    """The accelerator of a run: what `accelerate launch` or a configuration file asks for, and these arguments.

    Raises:
        ValueError: several processes were launched that Accelerate does not join; FSDP of version 1.
    """
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # every parameter takes part in every step
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        log_with=check_trackers(arguments.report_to) or None,
        project_config=ProjectConfiguration(arguments.output_dir, logging_dir=arguments.output_dir / "tensorboard"),
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=group_timeout(arguments.loader_timeout))],
        dynamo_plugin=TorchDynamoPlugin(backend="inductor") if arguments.compile else None,
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        # Each would train alone and write into the same folder.
        raise ValueError(
            f"{launched} processes were launched (WORLD_SIZE), Accelerate runs {accelerator.num_processes}: it found "
            "no GPU, and several processes on a CPU have to be asked for: ACCELERATE_USE_CPU=true"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and accelerator.num_processes > 1:
        if accelerator.distributed_type == DistributedType.MULTI_CPU:
            # Accelerate shards on accelerators only; on a CPU, to try things out and to test them, it can as well.
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
            accelerator.state.distributed_type = DistributedType.FSDP
            PartialState().distributed_type = DistributedType.FSDP  # from which Accelerate restores the other
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"fsdp_version must be 2 (FSDP2), found {plugin.fsdp_version}")
        # Every process has read all weights already. Losses stay in float32, and so do sums of gradients.
        plugin.cpu_ram_efficient_loading = False
        bf16 = torch.bfloat16 if arguments.mixed_precision == "bf16" else None
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=bf16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    return accelerator


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, frozen: nn.Module | None
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """The model to call in a step, and the optimizer. FSDP2 shards `model` in place, DDP and compilation wrap it.

    What is in `frozen`, a module of the model, stays as it is on every process.
    """
    parts = [] if frozen is None else [*frozen.parameters(), *frozen.buffers()]
    ignored = {id(tensor) for tensor in parts}
    named = (*model.named_parameters(), *model.named_buffers())
    names = [name for name, tensor in named if id(tensor) in ignored]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    if accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.ignored_modules = [] if frozen is None else [frozen]
        # Accelerate asks for the input embeddings, to shard them apart; ours are in the encoder.
        model.get_input_embeddings = lambda: None  # type: ignore[assignment]
    return accelerator.prepare(model, optimizer)


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Parameters of a sharded model in full, in every process: forward passes within take no part of the others.

    So processes may run different numbers of batches, as in validation. A model that is not sharded stays as it is.
    """
    sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            # As Accelerate prepares them: the outermost module's parameters stay for the backward pass.
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()
            # FSDP2 notes the order of forward passes to gather ahead in the backward pass. Those within have none, and
            # may be more in one process than in another: it would gather what the others do not, and wait for ever.
            state = module._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                if group is not None:  # a module without parameters of its own
                    group._post_forward_indices.clear()
                    group.comm_ctx.post_forward_order.clear()


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor in full; all processes must call it. Others are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A full tensor, the same in all processes, on the device of `other` and sharded as it is."""
    tensor = tensor.to(other.device)
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def whole_model(model: VJEPA2ACModel) -> VJEPA2ACModel:
    """The model to save: itself, or one that is not sharded; all processes must call it."""
    if not isinstance(model, FSDPModule):
        return model
    assert isinstance(model.config, VJEPA2ACConfig)
    whole = VJEPA2ACModel(model.config)
    whole.encoder = model.encoder
    whole.predictor.load_state_dict({k: full_tensor(v).cpu() for k, v in model.predictor.state_dict().items()})
    return whole


def end_processes(accelerator: Accelerator) -> None:
    """`Accelerator.end_training`, after everything that holds the process group has been let go.

    Whoever lets go of it last destroys it. If that is DDP's reducer, it waits for Gloo's thread and keeps Python's lock
    meanwhile, and where that thread needs the lock for the last barrier's tensors, both wait for ever. Callers must not
    hold a wrapped model any more.
    """
    accelerator.free_memory()
    accelerator.end_training()
