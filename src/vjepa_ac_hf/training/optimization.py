"""Parameter groups and learning-rate schedule (V-JEPA 2-AC, arXiv 2506.09985, appendix on post-training)."""

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def build_optimizer(predictor: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW over the predictor alone."""
    return AdamW(decay_groups(predictor, weight_decay), lr=learning_rate)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained of a module: with weight decay, and biases and norms (of one dimension at most) without."""
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def check_schedule(max_steps: int, warmup_steps: int, decay_steps: int) -> None:
    """Raise a ValueError where warm-up and decay together are longer than the training."""
    if min(warmup_steps, decay_steps) < 0 or warmup_steps + decay_steps > max_steps:
        raise ValueError(
            f"warmup_steps {warmup_steps} and decay_steps {decay_steps} do not fit in max_steps {max_steps}"
        )


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    max_steps: int,
    warmup_steps: int,
    decay_steps: int,
    start_learning_rate: float = 0.0,
    final_learning_rate: float = 0.0,
) -> LambdaLR:
    """Linear warm-up from `start_learning_rate`, constant, linear decay to `final_learning_rate`, as in V-JEPA 2-AC.

    With the optimizer's learning rate R, step k (counted from 0) runs at

        start + (R - start) * (k + 1) / warmup_steps             k < warmup_steps
        final + (R - final) * (max_steps - k) / decay_steps      k > max_steps - decay_steps
        R                                                        in between

    so that a step after the last one would run at `final_learning_rate`. (V-JEPA 2's own code reaches it one step
    earlier, and with a rate of 0 its last step changes nothing.)

    Raises:
        ValueError: warm-up and decay together are longer than the training.
    """
    check_schedule(max_steps, warmup_steps, decay_steps)
    peak = optimizer.param_groups[0]["lr"]
    # A rate of 0 changes nothing, whatever the factors are.
    start, final = (rate / peak if peak else 0.0 for rate in (start_learning_rate, final_learning_rate))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return start + (1 - start) * ((step + 1) / warmup_steps)
        if step > max_steps - decay_steps:
            return final + (1 - final) * (max(max_steps - step, 0) / decay_steps)
        return 1.0

    return LambdaLR(optimizer, factor)


def continue_schedule(scheduler: LambdaLR, state: dict[str, Any]) -> None:
    """Set a scheduler of `build_scheduler` and its optimizer to the step that a state dictionary was saved at.

    The rate is that of this scheduler at the step: a run that goes on with another length has another decay. (PyTorch's
    `load_state_dict` leaves the optimizer at the rate of step 0, and reports the saved one.)
    """
    scheduler.load_state_dict(state)
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
