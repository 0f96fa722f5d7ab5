"""PSNR and SSIM of frames, and their means by horizon and kind of frame (docs/applications.md, "Frames").

Both are TorchMetrics' (batched, on the frames' device; it brings no torch or torchvision of its own).
"""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .figures import BOOTSTRAP_DRAWS, interval_unit, resample_weights

# Frames come as whole numbers of 1/255: no two are told apart by less than rounding's mean square error, 1/12 of a step
# squared. Equal frames (a view that stands still, copied) count as this good, not as infinitely good.
PSNR_OF_ROUNDING = 10 * math.log10(12 * 255**2)
SSIM_WINDOW = 11  # pixels across
_FRAMES_AT_ONCE = 64


def require_torchmetrics() -> None:
    """Raise an ImportError where TorchMetrics is not installed: asked before a run, not when its work is done."""
    if importlib.util.find_spec("torchmetrics") is None:
        raise ImportError("PSNR and SSIM of frames need torchmetrics: pip install 'vjepa-ac-hf[heads]'")


def psnr(frames: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB, at most `PSNR_OF_ROUNDING`.

    Args:
        frames: `(..., 3, Y, X)`, float in [0, 1].
        references: the same shape.

    Returns:
        `(...)`.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    def one(told: Tensor, true: Tensor) -> Tensor:
        return peak_signal_noise_ratio(told, true, data_range=1.0, reduction="none", dim=(1, 2, 3))

    return _by_frame(one, frames, references).clamp(max=PSNR_OF_ROUNDING)


def ssim(frames: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each frame (Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5), mean over the
    windows that lie within the frame and over RGB.

    Arguments and returned value as of `psnr`; frames of at least 11 x 11 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(frames.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least 11 x 11 pixels, found {tuple(frames.shape[-2:])}")

    def one(told: Tensor, true: Tensor) -> Tensor:
        options: dict[str, Any] = {"data_range": 1.0, "reduction": "none", "return_full_image": True}
        whole = structural_similarity_index_measure(told, true, **options)[1]
        edge = SSIM_WINDOW // 2  # its windows there hold mirrored pixels, half of what a small frame has
        return whole[..., edge:-edge, edge:-edge].mean(dim=(1, 2, 3))

    return _by_frame(one, frames, references)


FRAME_FIGURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}


def _by_frame(figure: Callable[[Tensor, Tensor], Tensor], frames: Tensor, references: Tensor) -> Tensor:
    if frames.shape != references.shape or frames.ndim < 3:
        raise ValueError(
            f"frames and references must be of one shape (..., 3, Y, X), found {tuple(frames.shape)} and "
            f"{tuple(references.shape)}"
        )
    pairs = [t.float().reshape(-1, *t.shape[-3:]).split(_FRAMES_AT_ONCE) for t in (frames, references)]
    return torch.cat([figure(*pair).reshape(-1) for pair in zip(*pairs, strict=True)]).reshape(frames.shape[:-3])


def aggregate_frames(
    rows: Mapping[str, Any],
    *,
    kinds: Sequence[str],
    baselines: Sequence[str] = (),
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Means of a figure by horizon and kind of frame, and of its paired differences to baselines, with intervals.

    Args:
        rows: columns of equal length: `session_id`, `player_id`, `horizon`, and `values`, a number for each of `kinds`
            (of a frame or the mean of a tubelet's).
        kinds: where the frames came from.
        baselines: those of them that the others are compared with.
        draws: bootstrap draws of players or sessions (`interval_unit`); 0 for no intervals.
        seed: of the bootstrap.

    Returns:
        For each horizon `horizon`, `rows`, `kinds` (by name `mean` and `ci95`) and `over` (by baseline and kind `mean`
        and `ci95` of the differences). `ci95` is None where fewer than two players or sessions contribute.
    """
    values = np.asarray(rows["values"], dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(kinds) or not len(values):
        raise ValueError(f"values must be rows of {len(kinds)} kinds {list(kinds)}, found {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values hold numbers that are not finite")
    pairs = [(base, kind) for base in baselines for kind in kinds if kind != base]
    at = {kind: i for i, kind in enumerate(kinds)}
    columns = np.stack([*values.T, *(values[:, at[kind]] - values[:, at[base]] for base, kind in pairs)], axis=1)
    unit = interval_unit(rows["player_id"])
    units, unit_of = np.unique(np.asarray(rows[f"{unit}_id"], dtype=np.str_), return_inverse=True)
    weights = resample_weights(len(units), draws, torch.Generator().manual_seed(seed)) if draws else None
    horizons, found = np.asarray(rows["horizon"]), []
    for horizon in np.unique(horizons):
        here = horizons == horizon
        counts = np.bincount(unit_of[here], minlength=len(units)).astype(np.float64)
        sums = np.stack([np.bincount(unit_of[here], c, minlength=len(units)) for c in columns[here].T], axis=1)
        intervals: list[list[float] | None] = [None] * columns.shape[1]
        if weights is not None and np.count_nonzero(counts) > 1:
            drawn_counts, drawn = weights @ counts, weights @ sums
            known = drawn_counts > 0
            low, high = np.percentile(drawn[known] / drawn_counts[known, None], [2.5, 97.5], axis=0)
            intervals = [[float(a), float(b)] for a, b in zip(low, high, strict=True)]
        means = sums.sum(axis=0) / counts.sum()
        figures = [{"mean": float(m), "ci95": i} for m, i in zip(means, intervals, strict=True)]
        over: dict[str, dict[str, Any]] = {base: {} for base in baselines}
        for (base, kind), figure in zip(pairs, figures[len(kinds) :], strict=True):
            over[base][kind] = figure
        by_kind = dict(zip(kinds, figures, strict=False))
        found.append({"horizon": int(horizon), "rows": int(counts.sum()), "kinds": by_kind, "over": over})
    return found
