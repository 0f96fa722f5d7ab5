"""What a few clips' features look like: frames, drawn by a decoder or the nearest real ones, and as colours.

Colours are the first three principal components of features.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..actions_vjepa2_ac import ACTION_COLUMNS, wrap_degrees
from ..modeling_vjepa2_ac import VJEPA2ACModel
from .clips import spread
from .figures import LARGE_TURN_DEGREES
from .rollouts import StateIntegrator, roll_out, with_future

# What is drawn of a clip, in figures, tables and pictures.
REAL = "real"
TRUE, PREDICTION, PERSISTENCE = "true features", "prediction", "persistence"
LAST_FRAME, MEAN_FRAME = "last frame", "mean frame"
OTHER, MIRRORED = "prediction, other clip's actions", "prediction, mirrored actions"
Draw = Callable[[Tensor], Tensor]  # features (steps, N, D) -> frames (steps, u, Y, X, 3) in [0, 1]


@dataclass(frozen=True)
class ClipPictures:
    """One clip, ready to draw.

    Args:
        title: what the clip is called.
        context_steps: true steps C that the rollouts start from.
        frames: `(T, 3, Y, X)`, uint8, first frame of each tubelet.
        captions: `(T,)`, at step t the action that led to it.
        rows: by name of the row, `(steps, Y, X, 3)` in [0, 1], of all T steps or of the last ones: first frames.
        colours: by name of the row, `(steps, rows, columns, 3)` in [0, 1]: the same as colours.
        film: by name of the panel, `(T * tubelet_size, Y, X, 3)`, uint8: what is real, and what is imagined after the
            context.
    """

    title: str
    context_steps: int
    frames: Tensor
    captions: list[str]
    rows: dict[str, Tensor]
    colours: dict[str, Tensor]
    film: dict[str, Tensor]


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


def turning_clips(yaw_deltas: Tensor, wanted: int) -> tuple[list[int], str]:
    """Clips to show, evenly spaced among those whose view turns, and a sentence that says so.

    Where nobody turns, the frames of right and wrong actions are alike.

    Args:
        yaw_deltas: `(clips, H)`, yaw change of each imagined step in degrees.
        wanted: clips, at most.

    Returns:
        Row numbers of clips that have turned by more than `LARGE_TURN_DEGREES` at some horizon; of all clips where none
        has.
    """
    turned = wrap_degrees(yaw_deltas.double().cumsum(dim=1)).abs().amax(dim=1) > LARGE_TURN_DEGREES
    rows = torch.nonzero(turned).flatten().tolist()
    which = f"the {len(rows)} of {len(turned)} whose view turns by more than {LARGE_TURN_DEGREES:g} degrees"
    if not rows:
        rows, which = (
            list(range(len(turned))),
            f"all {len(turned)}: none turns by more than {LARGE_TURN_DEGREES:g} degrees",
        )
    return [rows[i] for i in spread(len(rows), wanted)], f"Clips evenly spaced among {which}, not chosen otherwise."


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
    """True features, imagined ones (`ROLLOUT_KINDS`'s names) and persistence; colours are fitted on the true features.

    Without a decoder, the nearest real frames of the shown clips stand in, and true features have no row of their own.

    Args:
        model: a `VJEPA2ACModel`.
        features: `(shown, T, N, D)`, those of the shown clips.
        frames: `(shown, T * tubelet_size, 3, Y, X)`, uint8, of the shown clips.
        shown: row numbers of the clips to show.
        others: for each of them, row number of the clip whose actions it is given instead.
        names: `(clips,)`, what all clips are called.
        actions: `(clips, T-1, A)`, normalised.
        raw_actions: `(clips, T-1, 38)`, raw units, for the captions.
        states: `(clips, T, S)`, normalised.
        context_steps: true steps C that the rollouts start from.
        horizon: steps H to predict.
        integrate_states: as in `evaluate_features`.
        decoder: a `VJEPA2ACForFrameDecoding`.
        mirrored: `(clips, T-1, A)`, `actions` with left for right, for a row of their own; None: no such row.
    """
    shown, others, last = list(shown), list(others), context_steps + horizon
    real = features[:, :last].cpu()
    choices = {PREDICTION: actions[shown], OTHER: with_future(actions[shown], actions[others], context_steps)}
    if mirrored is not None:
        choices[MIRRORED] = with_future(actions[shown], mirrored[shown], context_steps)
    options: dict[str, Any] = {"context_steps": context_steps, "integrate_states": integrate_states}
    rows = {TRUE: real}
    for name, choice in choices.items():
        rows[name] = roll_out(model, features, choice[:, : last - 1], states[shown], **options).cpu()
    rows[PERSISTENCE] = real[:, context_steps - 1 : context_steps].expand(-1, horizon, -1, -1)
    tubelets = frames.unflatten(1, (features.shape[1], -1))[:, :last].movedim(3, 5)
    draw = nearest_frames(real, tubelets) if decoder is None else decoded_frames(decoder)
    colours = FeatureColours(real, model.config.grid)
    pictures = []
    for i, (clip, other) in enumerate(zip(shown, others, strict=True)):
        drawn = {name: draw(row[i]) for name, row in rows.items() if decoder is not None or name != TRUE}
        seen = tubelets[i, :context_steps]
        wrong = OTHER if mirrored is None else MIRRORED
        imagined = {name: torch.cat([seen, (255 * drawn[name]).round().byte()]) for name in (PREDICTION, wrong)}
        film = {REAL: tubelets[i], **imagined}
        pictures.append(
            ClipPictures(
                title=f"{names[clip]}, other actions from {names[other]}",
                context_steps=context_steps,
                frames=tubelets[i, :, 0].movedim(3, 1),
                captions=_captions(raw_actions[clip], raw_actions[other], context_steps, last),
                rows={name: row[:, 0] for name, row in drawn.items()},
                colours={name: colours(row[i]) for name, row in rows.items()},
                film={name: panel.flatten(0, 1) for name, panel in film.items()},
            )
        )
    return pictures


def nearest_steps(features: Tensor, real: Tensor) -> Tensor:
    """Which of all steps of `real` `(clips, T, N, D)` has the smallest mean square difference to each of `features`
    `(clips, H, N, D)`: `(clips, H)` places among them, clip after clip."""
    rows, known = features.flatten(2).flatten(0, 1).double(), real.flatten(2).flatten(0, 1).double()
    return torch.cdist(rows, known).argmin(dim=1).view(features.shape[:2])


def nearest_frames(real: Tensor, tubelets: Tensor) -> Draw:
    """Real tubelets `(clips, T, u, Y, X, 3)`, uint8, with the features `real` `(clips, T, N, D)`, as what is drawn."""
    known = tubelets.flatten(0, 1)
    return lambda features: known[nearest_steps(features[None], real)[0]].float() / 255


def decoded_frames(decoder: Any) -> Draw:
    """What a `VJEPA2ACForFrameDecoding` draws."""
    size = decoder.config.encoder_config.tubelet_size
    return lambda features: (
        decoder(features=features[None].to(decoder.device)).frames[0].cpu().movedim(1, 3).unflatten(0, (-1, size))
    )


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
