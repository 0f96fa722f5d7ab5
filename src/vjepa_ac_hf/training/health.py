"""Health and speed of a run, for every row of `metrics.jsonl` (docs/training.md, "Health").

Between two rows only clocks are read: what needs the device is computed in the steps that are logged.
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..configuration_vjepa2_ac import VJEPA2ACConfig
from ..modeling_vjepa2_ac import VJEPA2ACModel
from .distributed import full_tensor
from .estimates import peak_tflops, predictor_tokens, step_flops

# Names of a row's figures that are about the machine, not about the model.
SPEED = frozenset(
    ("clips_per_second", "tokens_per_second", "model_tflops_per_second", "mfu", "data_wait_share", "peak_memory_bytes")
)


def feature_std(features: Tensor) -> Tensor:
    """How different tokens are: standard deviation over all tokens of a batch, mean over dimensions, float32.

    0 where all tokens have the same features (collapse). Features are normalised over their width, so that independent
    tokens have about 1.

    Args:
        features: `(B, T, N, D)`.
    """
    return features.detach().flatten(0, -2).float().std(dim=0, correction=0).mean()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch had allocated on a CUDA device; elsewhere the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Health:
    """Collects in the course of the steps what a row of the metrics says about them.

    Operations, tokens and features are told of world models alone. `model` is not wrapped, `trained` the part of it
    that is optimised (None: the world model's predictor).
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: argparse.Namespace,
        accelerator: Accelerator,
        trained: nn.Module | None = None,
    ):
        self.arguments, self.device = arguments, accelerator.device
        batch, processes = arguments.per_device_batch_size, accelerator.num_processes
        passes = arguments.gradient_accumulation_steps * processes
        self._per_step: dict[str, float] = {"clips_per_second": passes * batch}  # by the names of their rates
        self._is_world_model = isinstance(model, VJEPA2ACModel)
        if isinstance(model, VJEPA2ACModel):
            assert isinstance(model.config, VJEPA2ACConfig)
            trained = model.predictor if trained is None else trained
            flops = step_flops(model.config, batch, cached_features=arguments.cache_features is not None)
            tera = passes * flops.model / 1e12
            self._per_step["tokens_per_second"] = passes * predictor_tokens(model.config, batch)
            self._per_step["model_tflops_per_second"] = tera
            bf16 = arguments.mixed_precision == "bf16"
            peak = peak_tflops(arguments.hardware, arguments.hardware_tflops, bf16)
            if peak is not None:
                self._per_step["mfu"] = tera / (processes * peak)
        assert trained is not None
        self.trained = trained
        self._observed: dict[str, Tensor] = {}
        self._watched = False
        self._waited = 0.0

    def timed(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same batches; the time spent waiting for them is counted."""
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            yield batch

    def begin(self, step: int) -> None:
        """Say which step (counted from 1) is about to be computed: whether it is observed follows from that."""
        arguments = self.arguments
        every = [n for n in (arguments.log_every, arguments.eval_every) if n]
        self._observed = {}
        self._watched = step == arguments.max_steps or any(step % n == 0 for n in every)

    def observe(self, output: Any) -> None:
        """Features of a forward pass; nothing but a look at a flag in steps that are not logged."""
        if self._watched and self._is_world_model:
            self._observed = {
                "encoder_feature_std": feature_std(output.target_features),
                "predictor_feature_std": feature_std(output.predicted_features),
            }

    def row(self, steps: int, seconds: float) -> dict[str, float]:
        """What the `steps` steps since the last row, which took `seconds`, say; all processes must call it."""
        norm = torch.nn.utils.get_total_norm([p.detach() for p in self.trained.parameters()])
        row = {"parameter_norm": full_tensor(norm).item()}
        row |= {name: value.item() for name, value in self._observed.items()}
        row |= {name: amount * steps / seconds for name, amount in self._per_step.items()}
        row |= {"data_wait_share": min(self._waited / seconds, 1.0), "peak_memory_bytes": peak_memory(self.device)}
        self._waited = 0.0
        return row
