"""How well frames can be told from features, and from imagined ones (docs/applications.md, "Frames")."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..processing_vjepa2_ac import VJEPA2ACProcessor
from .figures import LARGE_TURN_DEGREES
from .frame_figures import FRAME_FIGURES

MEAN_FRAME, LAST_FRAME = "mean frame", "last frame"
KINDS = ("decoded", MEAN_FRAME, LAST_FRAME)


@torch.no_grad()
def evaluate_decoder(
    model: Any, batches: Iterable[dict[str, Any]], processor: VJEPA2ACProcessor, accelerator: Accelerator
) -> dict[str, Any]:
    """Loss, PSNR and SSIM of decoded true features over the clips of all processes, on each of them.

    The rows are tubelets but for each clip's first, which has no frame before it to copy. Beside what is decoded stand
    the mean frame of these clips and the last frame before the tubelet.

    Args:
        model: a `VJEPA2ACForFrameDecoding`, not wrapped.
        batches: of this process, with `frames` beside pixels or features (`ClipCollator(frames=True)`); gone through
            twice, the first time for the mean frame; every clip once over all processes.
        processor: gives the turns, where its action space holds them.
        accelerator: processes, device and precision.

    Returns:
        `clips`, `loss`, and `frames`: by `all` and `large_turns` (tubelets that more than `LARGE_TURN_DEGREES` of yaw
        led to; None where there are none or turns are not known) `rows` and by kind `psnr` and `ssim`.
    """
    mean = mean_frame(batches, model.config, accelerator)
    turn = processor.action_space.index("yaw_delta") if "yaw_delta" in processor.action_space else None
    tubelet = processor.tubelet_size
    training, parts = model.training, []
    model.eval()
    for batch in batches:
        frames = batch["frames"].to(accelerator.device)
        inputs = {k: batch[k].to(accelerator.device) for k in ("pixel_values_videos", "features") if k in batch}
        with accelerator.autocast():
            output = model(**inputs, labels=frames)
        true = as_unit(frames).unflatten(1, (-1, tubelet))
        told = {
            "decoded": output.frames.unflatten(1, (-1, tubelet))[:, 1:],
            MEAN_FRAME: mean.expand_as(true[:, 1:]),
            LAST_FRAME: true[:, :-1, -1:].expand_as(true[:, 1:]),
        }
        part: dict[str, Any] = {"loss": float(output.loss), "clips": len(frames)}
        for name, figure in FRAME_FIGURES.items():
            values = [figure(told[kind], true[:, 1:]).mean(dim=2).flatten() for kind in KINDS]
            part[name] = torch.stack(values, dim=1).double().cpu().numpy()
        actions = processor.denormalize_actions(batch["actions"].cpu())
        turned = actions[..., turn].abs().flatten().numpy() if turn is not None else np.zeros(len(part["psnr"]))
        parts.append({**part, "turned": turned})
    model.train(training)
    parts = gather_object(parts)
    clips = sum(p["clips"] for p in parts)
    rows = {k: np.concatenate([p[k] for p in parts]) for k in ("turned", *FRAME_FIGURES)}
    large = rows["turned"] > LARGE_TURN_DEGREES
    return {
        "clips": clips,
        "loss": sum(p["loss"] * p["clips"] for p in parts) / clips,
        "frames": {"all": _figures(rows, np.ones_like(large)), "large_turns": _figures(rows, large)},
    }


def _figures(rows: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, Any] | None:
    if not chosen.any():
        return None
    means = {name: rows[name][chosen].mean(axis=0).tolist() for name in FRAME_FIGURES}
    by_kind = {kind: {name: means[name][i] for name in means} for i, kind in enumerate(KINDS)}
    return {"rows": int(chosen.sum()), **by_kind}


def mean_frame(batches: Iterable[dict[str, Any]], config: Any, accelerator: Accelerator) -> Tensor:
    """Mean of all frames of all processes, `(3, Y, X)` in [0, 1], on the accelerator's device."""
    total = torch.zeros(3, *config.frame_shape, dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        frames = batch["frames"].cpu()
        total += frames.double().sum(dim=(0, 1))
        count += frames.shape[0] * frames.shape[1]
    total, count = (accelerator.reduce(t.to(accelerator.device), reduction="sum") for t in (total, count))
    return (total / count / 255).float()


def as_unit(frames: Tensor) -> Tensor:
    """uint8 frames as float32 in [0, 1]."""
    return frames.float() / 255
