"""Run by torchrun on two processes: what a prepared model communicates. Each process leaves what it found as JSON."""

import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vjepa_ac_hf import VJEPA2ACModel
from vjepa_ac_hf.training.distributed import (
    build_accelerator,
    end_processes,
    full_tensor,
    prepare,
    whole_model,
    whole_parameters,
)
from vjepa_ac_hf.training.optimization import build_optimizer
from vjepa_ac_hf.training.presets import build_config


def gradient(model):
    return full_tensor(model.predictor.head.weight.grad).clone()


def main(config: str, output: Path) -> None:
    arguments = SimpleNamespace(
        mixed_precision="no",
        gradient_accumulation_steps=2,
        report_to="",
        output_dir=output,
        compile=False,
        loader_timeout=9,
    )
    accelerator = build_accelerator(arguments)
    rank = accelerator.process_index
    torch.manual_seed(rank)  # so the processes start from different weights, which DDP makes the same
    if accelerator.is_fsdp2:
        torch.manual_seed(0)  # FSDP2 takes its shard of what each process has
    model = VJEPA2ACModel(build_config(config, action_space="vpt-13"))
    frozen = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    optimizer = build_optimizer(model.predictor, 1e-2, 0.0)
    wrapped, optimizer = prepare(accelerator, model, optimizer, frozen=model.encoder)

    torch.manual_seed(10 + rank)
    steps, tokens, width = model.config.num_steps, model.config.grid_size**2, model.config.encoder_config.hidden_size
    batches = [
        {
            "features": torch.randn(1, steps, tokens, width),
            "actions": torch.randn(1, steps - 1, 13),
            "states": torch.randn(1, steps, 2),
        }
        for _ in range(2)
    ]
    found = {"fsdp": isinstance(model, FSDPModule), "ddp": isinstance(wrapped, DistributedDataParallel)}
    found["sharded"] = sorted(n for n, p in model.named_parameters() if isinstance(p, DTensor))
    found["trained"] = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    local_gradient = None
    for number, batch in enumerate(batches):
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
        if number == 0 and found["ddp"]:
            local_gradient = gradient(model)
    summed = gradient(model)
    if local_gradient is not None:  # without synchronisation the processes' gradients are their own
        everywhere = accelerator.gather(local_gradient[None])
        found["own_gradients_differ"] = bool((everywhere[0] != everywhere[1]).any())
        found["find_unused_parameters"] = wrapped.find_unused_parameters
    if accelerator.is_fsdp2:
        with torch.no_grad(), whole_parameters(model):
            # Another number of forward passes in each process, without waiting for one another.
            batch = {"features": batches[0]["features"][:, :-1], "actions": batches[0]["actions"]}
            outputs = [model.predict(**batch, states=batches[0]["states"][:, :-1]) for _ in range(1 + rank)]
            found["whole"] = not any(isinstance(p, DTensor) for p in model.predictor.parameters())
        found["finite"] = bool(torch.stack(outputs).isfinite().all())
        found["sharded_again"] = all(isinstance(p, DTensor) for p in model.predictor.parameters())
    # The oracle: a model of one process, with the clips of all.
    alone = VJEPA2ACModel(model.config)
    alone.predictor.load_state_dict(whole_model(model).predictor.state_dict())
    alone(**{k: accelerator.gather(torch.cat([b[k] for b in batches])) for k in batches[0]}).loss.backward()
    found["error"] = (gradient(alone) - summed).norm().item() / summed.norm().item()
    optimizer.step()
    found["encoder_unchanged"] = all(torch.equal(v, frozen[k]) for k, v in model.encoder.state_dict().items())
    found["class"] = type(whole_model(model)).__name__
    # When the process group is destroyed nothing else may hold it: DDP's reducer, as the last one, can wait for ever.
    end = accelerator.end_training
    accelerator.end_training = lambda: found.update(  # type: ignore[method-assign]
        ddp_left=sum(isinstance(o, DistributedDataParallel) for o in gc.get_objects())
    )
    wrapped = model
    end_processes(accelerator)
    end()
    (output / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
