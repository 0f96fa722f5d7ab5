"""Figures of the report. Matplotlib is an optional dependency, imported where a figure is made."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..pages import new_figure
from .figures import LARGE_TURN_DEGREES
from .pictures import LAST_FRAME, MEAN_FRAME, MIRRORED, OTHER, PERSISTENCE, PREDICTION, TRUE, ClipPictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour-blind safe (Okabe and Ito).
COLOURS = {"error": "#0072B2", "persistence": "#7f7f7f", "shuffled_actions": "#D55E00"}
LABELS = {
    "error": "prediction",
    "persistence": "persistence",
    "shuffled_actions": "prediction, other clips' actions",
    "win_rate": "all pairs",
    "win_rate_large_turns": "pairs whose turns differ by more than 10°",
}
RATE_COLOURS = {"win_rate": "#0072B2", "win_rate_large_turns": "#009E73"}


def curves_figure(horizons: Sequence[dict[str, Any]], seconds_per_step: float) -> "Figure":
    """Errors (left) and win rates (right) by horizon, with their intervals as bands.

    Args:
        horizons: what `aggregate_rows` returns.
        seconds_per_step: duration of a tubelet.
    """
    figure = new_figure(10, 3.6)
    errors, rates = figure.subplots(1, 2)
    for name, colour in COLOURS.items():
        _draw_curve(errors, horizons, name, colour)
    errors.set(title="Error", ylabel="mean absolute difference to the target")
    for name, colour in RATE_COLOURS.items():
        _draw_curve(rates, horizons, name, colour)
    rates.axhline(0.5, color="black", linewidth=1, linestyle="--", label="chance")
    rates.set(title="Win rate of the true action", ylim=(0, 1.02), ylabel="share of pairs")
    for axes in (errors, rates):
        axes.set(xlabel=f"horizon (steps of {seconds_per_step:g} s)", xticks=[h["horizon"] for h in horizons])
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_curve(axes: "Axes", horizons: Sequence[dict[str, Any]], name: str, colour: str) -> None:
    known = [h for h in horizons if h[name] is not None]
    axes.plot([h["horizon"] for h in known], [h[name] for h in known], "o-", color=colour, label=LABELS[name])
    banded = [h for h in known if h["ci95"] is not None and h["ci95"][name] is not None]
    low, high = ([h["ci95"][name][end] for h in banded] for end in (0, 1))
    axes.fill_between([h["horizon"] for h in banded], low, high, color=colour, alpha=0.18, linewidth=0)


# Of `ROLLOUT_KINDS`: what is imagined, as in the figures above; baselines in greys.
FRAME_STYLES = {
    TRUE: ("#009E73", "-"),
    PREDICTION: ("#0072B2", "-"),
    OTHER: ("#D55E00", "-"),
    MIRRORED: ("#CC79A7", "-"),
    PERSISTENCE: ("#7f7f7f", "-"),
    LAST_FRAME: ("black", "--"),
    MEAN_FRAME: ("#7f7f7f", ":"),
}


def frames_figure(frames: Mapping[str, Any], seconds_per_step: float) -> "Figure":
    """PSNR and SSIM of frames by horizon (columns), of all clips and of those that have turned (rows), with intervals.

    Args:
        frames: what `evaluate_frames` returns.
        seconds_per_step: duration of a tubelet.
    """
    parts = {"all clips": "", f"turned by more than {LARGE_TURN_DEGREES:g}°": "_large_turns"}
    parts = {title: suffix for title, suffix in parts.items() if frames["psnr" + suffix]}
    figure = new_figure(10, 3.4 * len(parts))
    for row, (title, suffix) in zip(figure.subplots(len(parts), 2, squeeze=False), parts.items(), strict=True):
        for axes, name, label in zip(row, ("psnr", "ssim"), ("PSNR, dB", "SSIM"), strict=True):
            horizons = frames[name + suffix]
            at = [h["horizon"] for h in horizons]
            for kind, (colour, line) in FRAME_STYLES.items():
                of = [h["kinds"][kind] for h in horizons]
                axes.plot(at, [f["mean"] for f in of], line, marker=".", color=colour, label=kind)
                known = [(h, *f["ci95"]) for h, f in zip(at, of, strict=True) if f["ci95"] is not None]
                axes.fill_between(*zip(*known, strict=True), color=colour, alpha=0.15, linewidth=0) if known else None
            axes.set(title=title, ylabel=label, xlabel=f"horizon (steps of {seconds_per_step:g} s)", xticks=at)
            axes.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def histogram_figure(differences: np.ndarray) -> "Figure":
    """How much worse another clip's action is, pair by pair.

    Args:
        differences: `(pairs,)`, error with the other clip's action minus error with the true one, at horizon 1.
    """
    figure = new_figure(6.5, 3.2)
    axes = figure.subplots()
    widest = float(np.abs(differences).max()) or 1.0  # a model that ignores its actions: all of them 0
    axes.hist(differences, bins=np.linspace(-widest, widest, 42).tolist(), color="#D55E00", alpha=0.8)
    axes.axvline(0, color="black", linewidth=1, linestyle="--")
    axes.set(
        xlabel="error with another clip's action - error with the true action",
        ylabel="pairs",
        title="Horizon 1: right of 0 the true action wins",
    )
    axes.grid(alpha=0.25)
    return figure


def clip_figure(pictures: ClipPictures, colours: bool = False) -> "Figure":
    """One clip by step: its frames, then a row each for true features, predictions and persistence, drawn as frames or
    as colours."""
    steps, maps = len(pictures.frames), pictures.colours if colours else pictures.rows
    rows = 1 + len(maps)
    figure = new_figure(1.35 * steps + 0.6, 1.35 * rows + 1.1)
    grid = figure.subplots(rows, steps, squeeze=False)
    images = {"frames": pictures.frames.permute(0, 2, 3, 1), **maps}
    for row, (name, image) in zip(grid, images.items(), strict=True):
        first = steps - len(image)
        row[0].set_ylabel("\n".join(textwrap.wrap(name, 14)), fontsize=8)
        for step, axes in enumerate(row):
            axes.set(xticks=[], yticks=[])
            if step >= first:
                axes.imshow(image[step - first].numpy(), interpolation="nearest")
            else:
                axes.set_facecolor("#f0f0f0")
                axes.text(0.5, 0.5, "context", ha="center", va="center", fontsize=8, transform=axes.transAxes)
            for spine in axes.spines.values():
                spine.set(visible=step < pictures.context_steps, color="#0072B2", linewidth=2)
    for step, axes in enumerate(grid[0]):
        name = f"context {step}" if step < pictures.context_steps else f"h = {step - pictures.context_steps + 1}"
        axes.set_title(name, fontsize=9)
    for step, axes in enumerate(grid[-1]):
        lines = [part for line in pictures.captions[step].splitlines() for part in textwrap.wrap(line, 16)]
        axes.set_xlabel("\n".join(lines), fontsize=7)
    return figure
