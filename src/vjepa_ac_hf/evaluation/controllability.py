"""Does an imagined future show the actions that it was given? An inverse dynamics head reads it (docs/evaluation.md,
"Controllability").

Letters: B batch, T steps of a clip, C context steps, H horizons, N frame tokens a step, D encoder width, A action
columns.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from ..actions_vjepa2_ac import ACTION_COLUMNS
from ..modeling_heads_vjepa2_ac import VJEPA2ACForInverseDynamics
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from .clips import ClipRecords, check_head_fits
from .controllability_figures import BOOTSTRAP_DRAWS, ControllabilityTally
from .rollouts import StateIntegrator, roll_out, with_future


def load_inverse_dynamics(name: str, model: VJEPA2ACModel, processor: VJEPA2ACProcessor) -> VJEPA2ACForInverseDynamics:
    """A saved inverse dynamics head over a world model's features; it shares the model's encoder.

    Args:
        name: folder or Hub repository.
        model: the world model.
        processor: the world model's; the head must tell its action space.

    Raises:
        ValueError: another kind of model, or a head over another encoder or action space, with both values.
    """
    kind, expected = AutoConfig.from_pretrained(name).model_type, VJEPA2ACForInverseDynamics.config_class.model_type
    if kind != expected:
        raise ValueError(f"{name}: expected a trained inverse dynamics head ({expected}), found {kind}")
    head = VJEPA2ACForInverseDynamics.from_pretrained(name)
    check_head_fits(head, model, f"{name}: the head")
    if head.config.action_space != processor.action_space:
        raise ValueError(
            f"{name}: the head's action_space is {head.config.action_space}, the model's {processor.action_space}; "
            "train the head with the model's --action_space"
        )
    if head.config.features_from != "encoder":
        raise ValueError(
            f"{name}: the head's features_from is {head.config.features_from!r}, expected 'encoder': it would read "
            "what its own predictor makes of imagined features"
        )
    if head.config.action_statistics is None and head.config.continuous_columns:
        raise ValueError(f"{name}: the head's action_statistics is None: what it tells has no degrees")
    head.vjepa2_ac.encoder = model.encoder
    return head.to(model.device).eval()


def read_actions(head: VJEPA2ACForInverseDynamics, features: Tensor) -> Tensor:
    """Actions `(B, T-1, A)` that a head reads between steps `(B, T, N, D)`, float64: raw units, keys 0 or 1."""
    told = head.decode_actions(head(features=features))
    slot = told.get("hotbar")
    columns = [told[c] if c in told else slot == int(c.removeprefix("hotbar.")) for c in head.config.action_space or []]
    return torch.stack([c.double() for c in columns], dim=-1).cpu()


@torch.no_grad()
def readings(
    model: VJEPA2ACModel,
    head: VJEPA2ACForInverseDynamics,
    features: Tensor,
    actions: tuple[Tensor, ...],
    raw_actions: tuple[Tensor, ...],
    states: Tensor,
    *,
    context_steps: int,
    integrate_states: StateIntegrator | None,
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """What a head reads of one batch, kind by kind, and what it is compared with.

    The head is fed H + 1 steps: the context's last true features, then those of the kind: imagined ones, true ones, or
    the context's last again. At horizon h it so reads the change from step h - 1 to step h, both imagined but for the
    first.

    Args:
        model: a world model in eval mode.
        head: `load_inverse_dynamics`'s.
        features: `(B, C + H or more, N, D)`.
        actions: the clips' own and other clips' `(B, C - 1 + H, A)`, normalised.
        raw_actions: the same in raw units, the columns of the head.
        states: `(B, C - 1 + H or more, S)`, normalised.
        context_steps: C.
        integrate_states: as in `roll_out`.

    Yields:
        Kind (`controllability_figures.KINDS`); told, given and previously given actions, `(B, H, A)` each, raw units;
        the last NaN where C is 1 and h too.
    """
    first, horizon = context_steps - 1, actions[0].shape[1] - context_steps + 1
    own = raw_actions[0].double()
    given, other = own[:, first:], raw_actions[1].double()[:, first:]
    # The action that led to the context's last step; without one nothing is known.
    last = own[:, first - 1 : first] if first else torch.full_like(given[:, :1], torch.nan)
    before, before_other = (torch.cat([last, future[:, :-1]], dim=1) for future in (given, other))
    start = features[:, first:context_steps].to(model.device).float()

    def read(steps: Tensor) -> Tensor:
        return read_actions(head, torch.cat([start, steps.float()], dim=1))

    def imagine(choice: Tensor) -> Tensor:
        how: dict[str, Any] = {"context_steps": context_steps, "integrate_states": integrate_states}
        return roll_out(model, features, choice, states, **how)

    yield "imagined", read(imagine(actions[0])), given, before
    yield "true_features", read(features[:, context_steps : context_steps + horizon].to(model.device)), given, before
    yield "persistence", read(start.expand(-1, horizon, -1, -1)), given, before
    exchanged = read(imagine(with_future(actions[0], actions[1], context_steps)))
    yield "other_actions", exchanged, given, before
    yield "other_actions_obeyed", exchanged, other, before_other
    if first:
        yield "repeat_last", last.expand_as(given), given, before


def evaluate_controllability(
    model: VJEPA2ACModel,
    head: VJEPA2ACForInverseDynamics,
    processor: VJEPA2ACProcessor,
    batches: Iterable[Tensor],
    records: ClipRecords,
    *,
    partners: np.ndarray,
    context_steps: int,
    horizon: int,
    integrate_states: StateIntegrator | None,
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """How well the actions given to rollouts can be read from them, by horizon (docs/evaluation.md).

    Args:
        model: a world model in eval mode.
        head: `load_inverse_dynamics`'s.
        processor: the world model's.
        batches: features `(B, T, N, D)` of the clips, in order; one is held at a time.
        records: the same clips' `read_records`.
        partners: `(clips,)`, the clip whose future actions each clip is given as other ones.
        context_steps: true steps C that the rollouts start from.
        horizon: steps H to predict.
        integrate_states: as in `roll_out`.
        draws: bootstrap draws of players or sessions; 0 for no intervals.
        seed: of the bootstrap.

    Returns:
        `ticks_per_action`, and `horizons` (`ControllabilityTally.figures`).

    Raises:
        ValueError: features of another number of clips than records.
    """
    inputs = processor(actions=records.actions, states=records.states)
    columns = list(processor.action_space)
    raw = records.actions[..., [ACTION_COLUMNS.index(c) for c in columns]]
    ticks = processor.native_fps / processor.fps * processor.tubelet_size
    tally = ControllabilityTally(columns, records.sessions, records.players, ticks_per_action=ticks)
    stop, start, count = context_steps - 1 + horizon, 0, len(records.names)
    for features in batches:
        at = np.arange(start, start + len(features))
        start += len(features)
        if start > count:
            break
        pair = (at, partners[at])
        actions, raw_actions = (tuple(all_of[rows, :stop] for rows in pair) for all_of in (inputs["actions"], raw))
        for kind, told, given, before in readings(
            *(model, head, features, actions, raw_actions, inputs["states"][at]),
            context_steps=context_steps,
            integrate_states=integrate_states,
        ):
            for h in range(horizon):
                tally.add(at, h + 1, kind, told[:, h], given[:, h], before[:, h])
    if start != count:
        raise ValueError(f"records are those of {count} clips, but features of {start}")
    return {"ticks_per_action": ticks, "horizons": tally.figures(draws=draws, seed=seed)}


def headline_figures(controllability: dict[str, Any]) -> list[dict[str, Any]]:
    """The few figures for cards and pages: one flat row a horizon and figure.

    Args:
        controllability: of `metrics.json`.

    Returns:
        `horizon`, `figure` (its name), `unit`, `better` ("higher" or "lower"), and by kind `{"mean", "ci95"}`, None for
        a kind that was not read.
    """
    rows = []
    for at in controllability["horizons"]:
        found = at["kinds"]
        some = next(f for f in found.values() if f is not None)
        paths: list[tuple[tuple[str, ...], str, str, str]] = [
            (("macro_f1",), "keys, macro F1", "", "higher"),
            (("macro_onset_f1",), "onsets, macro F1", "", "higher"),
        ]
        for column in ("yaw_delta", "pitch_delta"):
            if column in some["camera"]:
                name = column.removesuffix("_delta")
                paths += [
                    (("camera", column, "mae"), f"{name} error", "degrees", "lower"),
                    (("camera", column, "r2"), f"{name} R2", "", "higher"),
                ]
        for path, name, unit, better in paths:
            row: dict[str, Any] = {"horizon": at["horizon"], "figure": name, "unit": unit, "better": better}
            for kind, figures in found.items():
                value: Any = figures
                for key in path:
                    value = None if value is None else value[key]
                row[kind] = value
            rows.append(row)
    return rows


def card_figures(controllability: dict[str, Any] | None) -> list[dict[str, Any]]:
    """`headline_figures` of the first and the last horizon; empty without controllability."""
    if controllability is None:
        return []
    shown = [controllability["horizons"][i]["horizon"] for i in (0, -1)]
    return [row for row in headline_figures(controllability) if row["horizon"] in shown]
