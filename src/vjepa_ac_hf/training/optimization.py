"""Parameter groups and learning-rate schedule (V-JEPA 2-AC, arXiv 2506.09985, appendix on post-training)."""

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def build_optimizer(predictor: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW over the predictor alone; no weight decay on biases and norms (every parameter of one dimension)."""
    decayed = [p for p in predictor.parameters() if p.ndim > 1]
    others = [p for p in predictor.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=learning_rate)


def build_scheduler(optimizer: torch.optim.Optimizer, max_steps: int, warmup_steps: int, decay_steps: int) -> LambdaLR:
    """Linear warm-up, constant, linear decay to zero over the last `decay_steps`.

    Step k (counted from 0) of `max_steps` runs at `min(1, (k + 1) / warmup_steps, (max_steps - k) / decay_steps)` of
    the learning rate.

    Raises:
        ValueError: warm-up and decay together are longer than the training.
    """
    if min(warmup_steps, decay_steps) < 0 or warmup_steps + decay_steps > max_steps:
        raise ValueError(
            f"warmup_steps {warmup_steps} and decay_steps {decay_steps} do not fit in max_steps {max_steps}"
        )

    def factor(step: int) -> float:
        warm = (step + 1) / warmup_steps if step < warmup_steps else 1.0
        cool = max(max_steps - step, 0) / decay_steps if step > max_steps - decay_steps else 1.0
        return min(1.0, warm, cool)

    return LambdaLR(optimizer, factor)
