"""Errors of imagined features, clip by clip: the model, persistence, and the model with other clips' actions.

Definitions: docs/evaluation.md, section "Errors". Letters: B batch, T steps of a clip, C context steps, H horizons,
N frame tokens a step, D encoder width, A action columns.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..actions_vjepa2_ac import wrap_degrees
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor

logger = logging.getLogger(__name__)

StateIntegrator = Callable[[Tensor, Tensor], Tensor]
TURN_COLUMNS = ("yaw_delta", "pitch_delta")


@dataclass(frozen=True)
class RolloutTable:
    """Errors of every clip at every horizon; the last axis is the horizon, 1..H.

    Args:
        sessions: `(clips,)`, session id of each clip.
        players: `(clips,)`, player id of each clip.
        context_steps: true steps that a rollout starts from.
        future_states: "integrated" (from the actions given) or "recorded" (from the log, which hold the true turn).
        partners: `(clips, shuffles)`, the clip whose future actions each clip was given.
        error: `(clips, H)`, mean absolute difference of prediction and target over tokens and width.
        persistence: `(clips, H)`, the same for the last context features repeated.
        shuffled: `(clips, shuffles, H)`, the same for the prediction with the partner's actions.
        error_mse: `(clips, H)`, mean square instead of mean absolute difference.
        persistence_mse: `(clips, H)`, likewise.
        shuffled_mse: `(clips, shuffles, H)`, likewise.
        turn_gaps: `(clips, shuffles, H)`, degrees in [0, 180] between the yaw changes of the clip's and of the
            partner's actions since the context; NaN where the turns are not known.
    """

    sessions: list[str]
    players: list[str]
    context_steps: int
    future_states: str
    partners: np.ndarray
    error: np.ndarray
    persistence: np.ndarray
    shuffled: np.ndarray
    error_mse: np.ndarray
    persistence_mse: np.ndarray
    shuffled_mse: np.ndarray
    turn_gaps: np.ndarray


def state_integrator(processor: VJEPA2ACProcessor) -> StateIntegrator | None:
    """`processor.integrate_states`, or None, with a warning, where its action space does not hold the turns."""
    missing = [c for c in TURN_COLUMNS if c not in processor.action_space]
    if not missing:
        return processor.integrate_states
    logger.warning(
        "the action space lacks %s: rollouts are given the recorded states, which hold the true turn even where the "
        "actions are another clip's, so the figures for shuffled actions come out too mild",
        missing,
    )
    return None


def check_protocol(num_steps: int, context_steps: int, horizon: int | None, shuffles: int, clips: int) -> int:
    """The number of horizons H of an evaluation.

    Args:
        num_steps: steps T of a clip.
        context_steps: true steps C that a rollout starts from.
        horizon: steps to predict, at most (and by default) T - C.
        shuffles: other clips whose actions each clip is given.
        clips: clips of the split.

    Raises:
        ValueError: numbers that do not fit together.
    """
    if not 1 <= context_steps <= num_steps - 1:
        raise ValueError(
            f"context_steps must be between 1 and {num_steps - 1} for clips of {num_steps} steps, found {context_steps}"
        )
    longest = num_steps - context_steps
    horizon = longest if horizon is None else horizon
    if not 1 <= horizon <= longest:
        raise ValueError(
            f"horizon must be between 1 and {longest} for clips of {num_steps} steps with context_steps "
            f"{context_steps}, found {horizon}"
        )
    if shuffles < 1:
        raise ValueError(f"shuffles must be at least 1, found {shuffles}")
    if clips < 2:
        raise ValueError(f"shuffling actions among clips needs at least 2 clips, found {clips}")
    return horizon


def derangements(clips: int, count: int, generator: torch.Generator) -> Tensor:
    """`(count, clips)` random permutations, each uniform among those that leave no clip in its place."""
    if clips < 2:
        raise ValueError(f"a permutation without fixed points needs at least 2 clips, found {clips}")
    own = torch.arange(clips)
    found: list[Tensor] = []
    while len(found) < count:  # one draw in e (in two for 2 clips) is a derangement
        candidate = torch.randperm(clips, generator=generator)
        if not (candidate == own).any():
            found.append(candidate)
    return torch.stack(found) if found else own.new_empty(0, clips)


def roll_out(
    model: VJEPA2ACModel,
    features: Tensor,
    actions: Tensor,
    states: Tensor,
    *,
    context_steps: int,
    integrate_states: StateIntegrator | None,
) -> Tensor:
    """Imagined features after a context, with future states that hold nothing which the actions do not say.

    Args:
        model: a `VJEPA2ACModel`.
        features: `(B, C or more, N, D)`; only the first C = `context_steps` steps are used.
        actions: `(B, C - 1 + H, A)`, normalised.
        states: `(B, C - 1 + H or more, S)`, normalised; later than the context they are used only where
            `integrate_states` is None.
        context_steps: C.
        integrate_states: `(states (B, C, S), actions) -> (B, C + H, S)`, or None for the recorded states.

    Returns:
        `(B, H, N, D)`, on the model's device.
    """
    if integrate_states is not None:
        # Where tensors lie, mostly the CPU: integration is in float64, which not every device has.
        states = integrate_states(states[:, :context_steps], actions)
    return model.rollout(
        features[:, :context_steps].to(model.device), actions.to(model.device), states.to(model.device)
    )


@torch.no_grad()
def evaluate_features(
    model: VJEPA2ACModel,
    features: Tensor | Iterable[Tensor],
    actions: Tensor,
    states: Tensor,
    *,
    sessions: Sequence[str],
    players: Sequence[str],
    integrate_states: StateIntegrator | None,
    yaw_deltas: Tensor | None = None,
    context_steps: int = 2,
    horizon: int | None = None,
    shuffles: int = 8,
    seed: int = 0,
    batch_size: int = 16,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> RolloutTable:
    """Errors of true, shuffled and no actions for clips whose features are known (docs/evaluation.md, "Errors").

    Args:
        model: a `VJEPA2ACModel`; it is in eval mode meanwhile.
        features: `(clips, T, N, D)`, or an iterable of batches `(B, T, N, D)` in the clips' order. Shuffling needs the
            actions of other clips, never their features: batches can be made one by one and forgotten.
        actions: `(clips, T-1, A)`, normalised.
        states: `(clips, T, S)`, normalised.
        sessions: session id of each clip.
        players: player id of each clip.
        integrate_states: `state_integrator(processor)`; None uses the recorded states.
        yaw_deltas: `(clips, T-1)`, yaw change of each action in degrees; None: no figures for large turns.
        context_steps: true steps C that a rollout starts from.
        horizon: steps H to predict; None: T - C.
        shuffles: other clips whose actions each clip is given.
        seed: of the shuffles.
        batch_size: clips in a batch, where `features` is one tensor.
        watch: called with every batch's features and its prediction `(B, H, N, D)` from the true actions.

    Raises:
        ValueError: shapes or numbers that do not fit together, or predictions that are not finite.
    """
    clips, steps = len(actions), actions.shape[1] + 1
    horizon = check_protocol(steps, context_steps, horizon, shuffles, clips)
    for name, found in (("states", len(states)), ("sessions", len(sessions)), ("players", len(players))):
        if found != clips:
            raise ValueError(f"actions are those of {clips} clips, but {name} of {found}")
    partners = derangements(clips, shuffles, torch.Generator().manual_seed(seed))
    batches = features.split(batch_size) if isinstance(features, Tensor) else features
    parts: list[dict[str, Tensor]] = []
    start = 0
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            at = slice(start, start + len(batch))
            start += len(batch)
            if batch.shape[1] != steps or start > clips:
                raise ValueError(
                    f"features must be of {clips} clips of {steps} steps, found {tuple(batch.shape)} up to clip {start}"
                )
            choices = action_choices(actions, at, partners, context_steps, horizon)
            errors, prediction = batch_errors(
                *(model, batch, choices, states[at]), context_steps=context_steps, integrate_states=integrate_states
            )
            _check_finite(errors, at.start)
            if watch is not None:
                watch(batch, prediction)
            parts.append(errors)
    finally:
        model.train(was_training)
    if start != clips:
        raise ValueError(f"actions are those of {clips} clips, but features of {start}")
    return rollout_table(
        {name: torch.cat([p[name] for p in parts]) for name in parts[0]},
        partners,
        sessions=sessions,
        players=players,
        context_steps=context_steps,
        integrate_states=integrate_states,
        yaw_deltas=yaw_deltas,
    )


def rollout_table(
    columns: dict[str, Tensor],
    partners: Tensor,
    *,
    sessions: Sequence[str],
    players: Sequence[str],
    context_steps: int,
    integrate_states: StateIntegrator | None,
    yaw_deltas: Tensor | None,
) -> RolloutTable:
    """The table of `batch_errors` of all clips, in order; other arguments as in `evaluate_features`."""
    return RolloutTable(
        sessions=[str(s) for s in sessions],
        players=[str(p) for p in players],
        context_steps=context_steps,
        future_states="recorded" if integrate_states is None else "integrated",
        partners=partners.T.numpy(),
        turn_gaps=_turn_gaps(yaw_deltas, partners, context_steps, columns["error"].shape[1]),
        **{name: values.double().numpy() for name, values in columns.items()},
    )


def with_future(actions: Tensor, others: Tensor, context_steps: int) -> Tensor:
    """`actions` up to the context's last step, then `others`: action C-1 is the first that leads out of it."""
    return torch.cat([actions[:, : context_steps - 1], others[:, context_steps - 1 :]], dim=1)


def action_choices(
    actions: Tensor, at: slice | Sequence[int], partners: Tensor, context_steps: int, horizon: int
) -> list[Tensor]:
    """Actions `(B, C - 1 + H, A)` of the clips `at`: their own, then those with each partner's future."""
    choices = [actions[at], *(with_future(actions[at], actions[p[at]], context_steps) for p in partners)]
    return [a[:, : context_steps - 1 + horizon] for a in choices]


def batch_errors(
    model: VJEPA2ACModel,
    features: Tensor,
    choices: Sequence[Tensor],
    states: Tensor,
    *,
    context_steps: int,
    integrate_states: StateIntegrator | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The error columns of a `RolloutTable` for a batch, and the prediction `(B, H, N, D)` from the true actions.

    One rollout a choice and not one large batch: equal inputs then give equal bits, so that a model which ignores its
    actions ties exactly.

    Args:
        model: a `VJEPA2ACModel`.
        features: `(B, C + H or more, N, D)`.
        choices: `action_choices`: the true actions, then the shuffled ones.
        states: `(B, C - 1 + H or more, S)`, normalised.
        context_steps: C.
        integrate_states: as in `roll_out`.
    """
    horizon = choices[0].shape[1] - context_steps + 1
    target = features[:, context_steps : context_steps + horizon].to(model.device).float()
    latest = features[:, context_steps - 1 : context_steps].to(model.device).float()
    errors = [distances(latest, target)]
    own = None
    for actions in choices:
        prediction = roll_out(
            model, features, actions, states, context_steps=context_steps, integrate_states=integrate_states
        ).float()
        own = prediction if own is None else own
        errors.append(distances(prediction, target))
    columns = {}
    for i, suffix in enumerate(("", "_mse")):
        persistence, error, *shuffled = (e[i].cpu() for e in errors)
        columns["persistence" + suffix] = persistence
        columns["error" + suffix] = error
        columns["shuffled" + suffix] = torch.stack(shuffled, dim=1)
    assert own is not None
    return columns, own


def distances(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute and mean square difference over tokens and width, `(B, H)` each."""
    difference = prediction - target
    return difference.abs().mean(dim=(2, 3)), difference.square().mean(dim=(2, 3))


def _check_finite(columns: dict[str, Tensor], first_clip: int) -> None:
    for name, values in columns.items():
        bad = torch.nonzero(~torch.isfinite(values))
        if len(bad):
            raise ValueError(
                f"{name} of clip {first_clip + int(bad[0, 0])} at horizon {int(bad[0, -1]) + 1} is not finite: "
                f"{values[tuple(bad[0])].item()}"
            )


def _turn_gaps(yaw_deltas: Tensor | None, partners: Tensor, context_steps: int, horizon: int) -> np.ndarray:
    """`(clips, shuffles, H)` degrees in [0, 180] between the turns of a clip and of its partners since the context."""
    if yaw_deltas is None:
        return np.full((partners.shape[1], partners.shape[0], horizon), np.nan)
    if yaw_deltas.ndim != 2 or len(yaw_deltas) != partners.shape[1]:
        raise ValueError(f"yaw_deltas must be (clips {partners.shape[1]}, actions), found {tuple(yaw_deltas.shape)}")
    turns = yaw_deltas[:, context_steps - 1 : context_steps - 1 + horizon].double().cumsum(dim=1)
    gaps = wrap_degrees(turns[None] - turns[partners]).abs()
    return gaps.transpose(0, 1).contiguous().numpy()
