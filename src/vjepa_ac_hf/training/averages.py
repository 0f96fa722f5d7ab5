"""An exponential moving average of the weights that are trained (docs/training.md, "Average of the weights")."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """The average of a module's parameters, in float32, beside them: same device, sharded as they are.

    It begins with the weights as they are. After step n, counted from 1, with d = min(decay, (1 + n) / (10 + n)),
    average = d * average + (1 - d) * weights: so it forgets the first weights soon, as TensorFlow's
    `tf.train.ExponentialMovingAverage` does with `num_updates`, and diffusers' `EMAModel`.

    Args:
        module: prepared (sharded) already; float32.
        decay: in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = module, decay
        self.tensors = {name: p.detach().clone() for name, p in module.named_parameters()}
        assert all(tensor.dtype == torch.float32 for tensor in self.tensors.values())

    def _pairs(self) -> Iterator[list[Tensor]]:
        """Averages and weights, of a sharded module this process's part: no process waits for another."""
        for name, parameter in self.module.named_parameters():
            pair = (self.tensors[name], parameter.detach())
            yield [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in pair]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after a step; the host does not wait for the device."""
        averages, weights = (list(tensors) for tensors in zip(*self._pairs(), strict=True))
        torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def exchange(self) -> None:
        """Make the average the module's weights, and keep those as the average; once more puts both back, exactly."""
        for average, weights in self._pairs():
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the average for its weights meanwhile."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()
