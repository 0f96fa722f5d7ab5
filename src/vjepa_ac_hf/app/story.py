"""A story: the first steps of a clip, then what the model imagines, action by action.

Letters: C context steps, T steps of the model's clips, u frames of a tubelet, N frame tokens a step, D feature width.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from ..actions_vjepa2_ac import ACTION_COLUMNS, DEGREES_PER_PIXEL
from ..modeling_vjepa2_ac import CONDITIONING_TOKENS, VJEPA2ACModel
from ..planning.actions import COLUMN, NUM_SLOTS, NUMBER_KEYS, SLOTS, clamp_pitch, integrate_view
from ..planning.planner import next_slot
from ..processing_vjepa2_ac import VJEPA2ACProcessor

MOST_STEPS = 64  # of a story: features, pictures and a film of it lie in memory
HELD = tuple(c for c in ACTION_COLUMNS if c.startswith(("key.", "mouse.")) and c not in ("mouse_dx", "mouse_dy"))


@dataclass(frozen=True)
class Scene:
    """What a story begins with.

    Args:
        name: of the clip.
        note: what is not known of it; empty for nothing.
        frames: `(T * u, 3, Y, X)`, uint8, as the model sees them.
        features: `(T, N, D)`, on the model's device.
        actions: `(T - 1, 38)`, raw, float64; None where there is no log.
        states: `(T, 2)`, degrees, float64.
    """

    name: str
    note: str
    frames: Tensor
    features: Tensor
    actions: Tensor | None
    states: Tensor

    def action(self, step: int) -> Tensor:
        """The action that led from a step to the next; without a log, none."""
        return torch.zeros(len(ACTION_COLUMNS), dtype=torch.float64) if self.actions is None else self.actions[step]


@dataclass(frozen=True)
class Step:
    """An imagined step.

    Args:
        action: `(38,)`, raw, float64: what led here.
        state: `(2,)`, degrees, float64.
        features: `(N, D)`.
        followed: whether all actions up to here were the recorded ones, so that the clip shows what really happened.
    """

    action: Tensor
    state: Tensor
    features: Tensor
    followed: bool


class Story:
    """Imagines one action after the other; keys and values of the steps before are kept, and never computed twice.

    A model knows clips of T steps. What goes on beyond is imagined from a new window that begins with the last C
    imagined steps: on what windows a step is imagined depends on its number alone.

    Args:
        model: a `VJEPA2ACModel` whose states are yaw and pitch.
        processor: its processor.
        scene: what to begin with.
        context_steps: C, from 1 to T - 1.

    Raises:
        ValueError: another number of context steps.
    """

    def __init__(self, model: VJEPA2ACModel, processor: VJEPA2ACProcessor, scene: Scene, context_steps: int):
        longest = model.config.num_steps - 1
        if context_steps not in range(1, longest + 1):
            raise ValueError(f"a story needs 1 to {longest} steps of context, found {context_steps}")
        self.model, self.processor, self.scene, self.context_steps = model, processor, scene, context_steps
        self.steps: list[Step] = []
        self.forget()

    def forget(self) -> None:
        """Give keys and values up, for memory: the next step computes those of its window again."""
        self._cache, self._first = DynamicCache(), 0

    @property
    def now(self) -> int:
        """Number of the latest step, counted from the clip's first."""
        return self.context_steps + len(self.steps) - 1

    @property
    def windows(self) -> int:
        """How many windows the next step is beyond the first."""
        return max(0, self.now - self.context_steps + 1) // (self.model.config.num_steps - self.context_steps)

    @property
    def window(self) -> range:
        """Steps that the next one is imagined from."""
        return range(self.windows * (self.model.config.num_steps - self.context_steps), self.now + 1)

    @property
    def followed(self) -> bool:
        return self.scene.actions is not None and (not self.steps or self.steps[-1].followed)

    @property
    def cache_bytes(self) -> int:
        held = [layer for layer in self._cache.layers if layer.get_seq_length()]
        sizes: list[int] = [tensor.nbytes for layer in held for tensor in (layer.keys, layer.values)]
        return sum(sizes)

    def features(self, step: int) -> Tensor:
        own = step - self.context_steps
        return self.scene.features[step] if own < 0 else self.steps[own].features

    def state(self, step: int) -> Tensor:
        own = step - self.context_steps
        return self.scene.states[step] if own < 0 else self.steps[own].state

    def action(self, step: int) -> Tensor:
        """What led from a step to the next."""
        own = step - self.context_steps + 1
        return self.scene.action(step) if own < 0 else self.steps[own].action

    @property
    def slot(self) -> int | None:
        """Hotbar slot now; None where it is not known."""
        if self.now:
            return next_slot(self.action(self.now - 1)[None])
        held = self.scene.action(0)[[COLUMN[name] for name in SLOTS]].nonzero().flatten().tolist()
        return held[0] if held else None

    def recorded_action(self) -> Tensor | None:
        """What was really done next, as long as that was done before; None where that is not known."""
        actions = self.scene.actions
        return actions[self.now] if actions is not None and self.followed and self.now < len(actions) else None

    @torch.no_grad()
    def act(self, action: Tensor) -> Step:
        """Imagine one step more.

        Args:
            action: `(38,)`, raw.

        Raises:
            ValueError: the story is as long as it may be.
        """
        if len(self.steps) >= MOST_STEPS:
            raise ValueError(f"a story has at most {MOST_STEPS} imagined steps: save it, undo, or begin again")
        action = action.double()
        first = self.window.start
        tokens = self.model.config.num_tokens + CONDITIONING_TOKENS
        if first != self._first:
            self.forget()
            self._first = first
        held = self._cache.get_seq_length() // tokens
        surplus = held - (self.now - first)
        if surplus > 0:  # undone
            self._cache.crop(-surplus * tokens)
            held -= surplus
        new = range(first + held, self.now + 1)
        device = self.model.device
        actions = torch.stack([*(self.action(step) for step in new[:-1]), action])
        states = torch.stack([self.state(step) for step in new])
        imagined = self.model.rollout(
            torch.stack([self.features(step) for step in new])[None],
            self.processor.normalize_actions(actions)[None].to(device),
            self.processor.normalize_states(states)[None].to(device),
            past_key_values=self._cache,
        )
        recorded = self.recorded_action()
        followed = recorded is not None and torch.equal(recorded, action)
        state = integrate_view(self.state(self.now), action[None])[-1]
        self.steps.append(Step(action, state, imagined[0, 0], followed))
        return self.steps[-1]

    def undo(self) -> None:
        """Take the last step back; its keys and values are cut off with the next one."""
        if self.steps:
            self.steps.pop()

    def restart(self) -> None:
        self.steps.clear()


def make_action(held: Collection[str], yaw: float, pitch: float, *, view: Tensor, slot: int | None) -> Tensor:
    """A whole action of keys and buttons that are held, and a turn: mouse and slot follow.

    Args:
        held: names of columns, of `HELD`.
        yaw: degrees, in [-180, 180), positive to the right.
        pitch: degrees, positive down; cut off where the view would go beyond straight up or down.
        view: `(2,)`, yaw and pitch now.
        slot: hotbar slot now; None: not known.

    Returns:
        `(38,)`, raw, float64, columns `ACTION_COLUMNS`.

    Raises:
        ValueError: a name that is no key or button, two number keys, a turn out of range.
    """
    unknown = [str(name)[:40] for name in held if name not in HELD]
    if unknown:
        raise ValueError(f"keys and buttons must be of {', '.join(HELD)}, found {unknown}")
    numbers = [name for name in held if name in NUMBER_KEYS]
    if len(numbers) > 1:
        raise ValueError(f"one number key can be pressed in a step, found {numbers}")
    if not (-180 <= yaw < 180 and -180 <= pitch <= 180):  # NaN too
        raise ValueError(f"a turn must be in [-180, 180) degrees, found yaw {yaw} and pitch {pitch}")
    action = torch.zeros(len(ACTION_COLUMNS), dtype=torch.float64)
    for name in held:
        action[COLUMN[name]] = 1
    change = torch.tensor([pitch], dtype=torch.float64)
    clamp_pitch(change, float(view[1]))
    action[COLUMN["yaw_delta"]], action[COLUMN["pitch_delta"]] = yaw, float(change)
    action[COLUMN["mouse_dx"]], action[COLUMN["mouse_dy"]] = yaw / DEGREES_PER_PIXEL, float(change) / DEGREES_PER_PIXEL
    if slot is not None:
        assert slot in range(NUM_SLOTS)
        action[COLUMN[SLOTS[slot]]] = 1
    return action


def feature_error(features: Tensor, true: Tensor) -> float:
    """Mean absolute difference, what `metrics.json` has as `error`."""
    return float((features.float() - true.float()).abs().mean())


def horizon_errors(metrics: dict) -> Iterator[tuple[float, float]]:
    """Measured error and that of standing still by horizon 1, 2, ..., of an evaluation's `metrics.json`.

    Raises:
        ValueError: figures that are none.
    """
    for number, row in enumerate(metrics.get("horizons") or [], start=1):
        error, still = row.get("error"), row.get("persistence")
        if row.get("horizon") != number or not all(isinstance(v, float) and 0 < v < math.inf for v in (error, still)):
            raise ValueError(
                f"metrics.json: horizons[{number - 1}] must have horizon, error and persistence, found {row}"
            )
        yield error, still
