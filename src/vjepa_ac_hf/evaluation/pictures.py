"""What a few clips' features look like: decoded to frames, or their first three principal components as colours."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..actions_vjepa2_ac import ACTION_COLUMNS
from ..modeling_vjepa2_ac import VJEPA2ACModel
from .rollouts import StateIntegrator, roll_out, with_future


@dataclass(frozen=True)
class ClipPictures:
    """One clip, ready to draw.

    Args:
        title: what the clip is called.
        context_steps: true steps C that the rollouts start from.
        frames: `(T, 3, Y, X)`, uint8, first frame of each tubelet.
        captions: `(T,)`, at step t the action that led to it.
        maps: by name of the row, `(steps, rows, columns, 3)` colours in [0, 1]: of all T steps, or of the last steps.
    """

    title: str
    context_steps: int
    frames: Tensor
    captions: list[str]
    maps: dict[str, Tensor]


class FeatureColours:
    """Principal components of features as RGB; percentiles 2 and 98 of each component become 0 and 1.

    Args:
        features: `(..., D)`, D at least 3: the features that the components and percentiles are fitted on.
        grid: rows and columns of tokens; None: as many rows as columns.
    """

    def __init__(self, features: Tensor, grid: tuple[int, int] | None = None):
        self.grid = grid
        rows = features.reshape(-1, features.shape[-1]).double()
        if rows.shape[-1] < 3:
            raise ValueError(f"three principal components need features of width 3 or more, found {rows.shape[-1]}")
        self.mean = rows.mean(dim=0)
        centred = rows - self.mean
        components = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(-1)
        # Eigenvectors have no sign of their own: a fixed one gives the same colours everywhere.
        largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
        self.components = components * largest.sign()
        scores = centred @ self.components
        limits = torch.quantile(_thin(scores), torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
        self.low, self.range = limits[0], (limits[1] - limits[0]).clamp(min=1e-12)

    def __call__(self, features: Tensor) -> Tensor:
        """`(steps, N, D)` -> `(steps, rows, columns, 3)` in [0, 1], float32."""
        grid = self.grid or (math.isqrt(features.shape[1]),) * 2
        scores = (features.double() - self.mean) @ self.components
        return ((scores - self.low) / self.range).clamp(0, 1).float().unflatten(1, grid)


def _thin(scores: Tensor, limit: int = 1_000_000) -> Tensor:
    """Every n-th row, as many as `torch.quantile` takes."""
    return scores[:: -(-len(scores) // limit)]


@torch.no_grad()
def picture_clips(
    model: VJEPA2ACModel,
    features: Tensor,
    frames: Tensor,
    *,
    shown: Sequence[int],
    others: Sequence[int],
    names: Sequence[str],
    actions: Tensor,
    raw_actions: Tensor,
    states: Tensor,
    context_steps: int,
    horizon: int,
    integrate_states: StateIntegrator | None,
    decoder: Any = None,
    mirrored: Tensor | None = None,
) -> list[ClipPictures]:
    """Target, prediction, prediction with another clip's actions, persistence; colours are fitted on the targets.

    Without a decoder, the nearest real frame stands below each prediction.

    Args:
        model: a `VJEPA2ACModel`.
        features: `(shown, T, N, D)`, those of the shown clips.
        frames: `(shown, T, 3, Y, X)`, uint8, first frame of each tubelet of the shown clips.
        shown: row numbers of the clips to show.
        others: for each of them, row number of the clip whose actions it is given instead.
        names: `(clips,)`, what all clips are called.
        actions: `(clips, T-1, A)`, normalised.
        raw_actions: `(clips, T-1, 38)`, raw units, for the captions.
        states: `(clips, T, S)`, normalised.
        context_steps: true steps C that the rollouts start from.
        horizon: steps H to predict.
        integrate_states: as in `evaluate_features`.
        decoder: a `VJEPA2ACForFrameDecoding`: the rows are the first frames of the tubelets, not colours.
        mirrored: `(clips, T-1, A)`, `actions` with left for right, for a row of their own; None: no such row.
    """
    shown, others, last = list(shown), list(others), context_steps + horizon
    choices = {
        "prediction": actions[shown],
        "prediction, other clip's actions": with_future(actions[shown], actions[others], context_steps),
    }
    if mirrored is not None:
        choices["prediction, mirrored actions"] = with_future(actions[shown], mirrored[shown], context_steps)
    targets = features[:, :last].cpu()
    rows, nearest = {"target": targets}, {}
    for name, choice in choices.items():
        rollout = roll_out(
            model,
            features,
            choice[:, : last - 1],
            states[shown],
            context_steps=context_steps,
            integrate_states=integrate_states,
        )
        rows[name] = rollout.cpu()
        if decoder is None:
            at = nearest_steps(rows[name], targets)
            nearest[name] = frames[:, :last].flatten(0, 1)[at].movedim(2, 4)
    rows["persistence"] = targets[:, context_steps - 1 : context_steps].expand(-1, horizon, -1, -1)
    colours = FeatureColours(targets, model.config.grid) if decoder is None else _decoded(decoder)

    def maps(i: int) -> dict[str, Tensor]:
        found = {}
        for name, row in rows.items():
            found[name] = colours(row[i])
            if name in nearest:
                found[f"{name}, nearest real frame"] = nearest[name][i]
        return found

    return [
        ClipPictures(
            title=f"{names[clip]}, other actions from {names[other]}",
            context_steps=context_steps,
            frames=frames[i, :last],
            captions=_captions(raw_actions[clip], raw_actions[other], context_steps, last),
            maps=maps(i),
        )
        for i, (clip, other) in enumerate(zip(shown, others, strict=True))
    ]


def nearest_steps(features: Tensor, real: Tensor) -> Tensor:
    """Which of all steps of `real` `(clips, T, N, D)` has the smallest mean square difference to each of `features`
    `(clips, H, N, D)`: `(clips, H)` places among them, clip after clip."""
    rows, known = features.flatten(2).flatten(0, 1).double(), real.flatten(2).flatten(0, 1).double()
    return torch.cdist(rows, known).argmin(dim=1).view(features.shape[:2])


def _decoded(decoder: Any) -> Callable[[Tensor], Tensor]:
    """Features `(steps, N, D)` -> the first frame of each tubelet, `(steps, Y, X, 3)` in [0, 1]."""
    tubelet = decoder.config.encoder_config.tubelet_size
    return lambda features: decoder(features=features[None].to(decoder.device)).frames[0, ::tubelet].cpu().movedim(1, 3)


def _captions(actions: Tensor, others: Tensor, context_steps: int, steps: int) -> list[str]:
    """For each step the action that led to it and, after the context, the other clip's turn."""
    captions = [""]
    yaw = ACTION_COLUMNS.index("yaw_delta")
    for step in range(1, steps):
        caption = describe_action(actions[step - 1])
        if step >= context_steps:
            caption += f"\nother: {others[step - 1, yaw]:+.1f}°"
        captions.append(caption)
    return captions


def describe_action(action: Tensor) -> str:
    """A raw action `(38,)` in three lines: yaw change, pitch change, keys and buttons pressed."""
    values = dict(zip(ACTION_COLUMNS, action.tolist(), strict=True))
    pressed = [c for c in ACTION_COLUMNS if c.startswith(("key.", "mouse.")) and values[c] > 0]
    keys = " ".join(c.removeprefix("key.").replace("mouse.", "button ") for c in pressed)
    return f"yaw {values['yaw_delta']:+.1f}°\npitch {values['pitch_delta']:+.1f}°\n{keys or 'no keys'}"
