"""Validation during training: losses and one-step error next to persistence, over all processes."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator

from ..modeling_vjepa2_ac import VJEPA2ACModel

_NAMES = ("loss", "teacher_forcing_loss", "rollout_loss", "error", "persistence")


@torch.no_grad()
def validate(model: VJEPA2ACModel, batches: Iterable[dict[str, Any]], accelerator: Accelerator) -> dict[str, float]:
    """Means over the clips of all processes; batches may differ in size, every clip counts once.

    Returns:
        `validation_loss`, `validation_teacher_forcing_loss`, `validation_rollout_loss`, and mean absolute differences
        over all steps: `validation_error` (teacher forcing), `validation_persistence` (the step before, repeated) and
        their ratio `validation_error_over_persistence`.
    """
    model.eval()
    sums = torch.zeros(len(_NAMES) + 1, dtype=torch.float64)
    for batch in batches:
        inputs = {k: v.to(accelerator.device) for k, v in batch.items() if k != "clips"}
        with accelerator.autocast():
            output = model(**inputs)
        target = output.target_features.float()
        error = (output.predicted_features.float() - target[:, 1:]).abs().mean()
        persistence = (target[:, :-1] - target[:, 1:]).abs().mean()
        values = [output.loss, output.teacher_forcing_loss, output.rollout_loss, error, persistence]
        count = len(target)
        sums += torch.tensor([*(count * v.item() for v in values), count], dtype=torch.float64)
    model.train()
    # Some devices have no float64, so the sum over processes is taken of float32.
    total = accelerator.reduce(sums.float().to(accelerator.device), reduction="sum").double().cpu()
    means = {f"validation_{n}": (s / total[-1]).item() for n, s in zip(_NAMES, total[:-1], strict=True)}
    means["validation_error_over_persistence"] = means["validation_error"] / means["validation_persistence"]
    return means
