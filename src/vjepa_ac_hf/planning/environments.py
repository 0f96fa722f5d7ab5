"""Raw actions, tick by tick, as MineRL takes them and as a VPT log holds them (docs/planning.md, "To the game").

An action of the model lasts several game ticks. Movement is divided evenly among them, the last tick taking the
rounding; keys and buttons are held for all of them; number keys are pressed in the first one.
"""

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..actions_vjepa2_ac import ACTION_COLUMNS, DEGREES_PER_PIXEL
from ..processing_vjepa2_ac import PITCH_SCALE
from .actions import COLUMN, NUMBER_KEYS, SLOTS

# Right shift is missing: it does nothing in Minecraft, and MineRL has no name for it.
MINERL_NAMES = {
    "key.w": "forward",
    "key.s": "back",
    "key.a": "left",
    "key.d": "right",
    "key.space": "jump",
    "key.left.shift": "sneak",
    "key.left.control": "sprint",
    "mouse.left": "attack",
    "mouse.right": "use",
    "mouse.middle": "pickItem",
    "key.q": "drop",
    "key.e": "inventory",
    "key.f": "swapHands",
    "key.escape": "ESC",
    **{f"key.{i}": f"hotbar.{i}" for i in range(1, 10)},
}
BUTTONS = ("mouse.left", "mouse.right", "mouse.middle")  # 0, 1, 2 in a log


def _check(actions: Any, ticks: int) -> np.ndarray:
    values = actions.detach().cpu().double().numpy() if isinstance(actions, Tensor) else np.asarray(actions, np.float64)
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2 or values.shape[1] != len(ACTION_COLUMNS):
        raise ValueError(
            f"actions must be raw, ({len(ACTION_COLUMNS)},) or (steps, {len(ACTION_COLUMNS)}), found {values.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"actions hold {int((~np.isfinite(values)).sum())} values that are not finite")
    if not isinstance(ticks, int) or ticks < 1:
        raise ValueError(f"ticks_per_step must be a whole number of at least 1, found {ticks}")
    return values


def _divide(total: float, ticks: int) -> list[float]:
    """`ticks` equal parts to a thousandth of a unit, the last one such that they sum to `total`."""
    each = round(total / ticks, 3)
    return [each] * (ticks - 1) + [total - each * (ticks - 1)]


def _pressed(values: np.ndarray, step: int, names: Any) -> list[str]:
    return [name for name in names if values[step, COLUMN[name]] != 0]


def to_minerl_action(actions: Any, *, ticks_per_step: int = 8) -> list[dict[str, Any]]:
    """MineRL's actions, one a tick, `steps * ticks_per_step` of them.

    Args:
        actions: `(38,)` or `(steps, 38)`, raw, columns `ACTION_COLUMNS`.
        ticks_per_step: game ticks that an action lasts (tubelet_size * 20 / fps).

    Returns:
        Dictionaries of `camera`, float64 `[pitch, yaw]` in degrees a tick (with a GUI open: the cursor's movement in
        pixels * 0.15, which is how MineRL moves it), and 0 or 1 for `forward`, `back`, `left`, `right`, `jump`,
        `sneak`, `sprint`, `attack`, `use`, `pickItem`, `drop`, `inventory`, `swapHands`, `ESC`, `hotbar.1` to
        `hotbar.9`. `key.right.shift` has no name there and is left out.

    Raises:
        ValueError: another shape, values that are not finite, no ticks.
    """
    values = _check(actions, ticks_per_step)
    found = []
    for step in range(len(values)):
        gui = values[step, COLUMN["gui_open"]] != 0
        scale, columns = (DEGREES_PER_PIXEL, ("mouse_dy", "mouse_dx")) if gui else (1.0, ("pitch_delta", "yaw_delta"))
        pitch, yaw = (_divide(values[step, COLUMN[c]] * scale, ticks_per_step) for c in columns)
        for tick in range(ticks_per_step):
            action: dict[str, Any] = {"camera": np.array([pitch[tick], yaw[tick]])}
            for column, name in MINERL_NAMES.items():
                held = tick == 0 or column not in NUMBER_KEYS
                action[name] = int(held and values[step, COLUMN[column]] != 0)
            found.append(action)
    return found


def to_vpt_lines(actions: Any, state: Any, *, ticks_per_step: int = 8) -> list[dict[str, Any]]:
    """Lines of a VPT log, one a tick, `steps * ticks_per_step` of them (docs/data.md, "Recordings").

    Args:
        actions: `(38,)` or `(steps, 38)`, raw, columns `ACTION_COLUMNS`.
        state: `(2,)`, yaw and pitch in degrees at the first tick.
        ticks_per_step: game ticks that an action lasts.

    Raises:
        ValueError: another shape, values that are not finite, no ticks.
    """
    log = VPTLog(state, ticks_per_step=ticks_per_step)
    return log.add(actions) + log.finish()


class VPTLog:
    """Lines of a VPT log from actions that come a few at a time; what a line has of the past is kept.

    The first line's `newButtons` is empty: readers of VPT take `[0]` there for the stuck-attack fault. The slot changes
    where the actions say so: within a step that presses the new slot's number key, else with the next step's first
    tick; readers then add the key to the tick before it (docs/data.md, "Hotbar slots"). Where an action sets no hotbar
    column the slot is not known, and its lines have `"hotbar": null`. So actions that were read from a log are read
    again from these lines (with `hotbar_injection="cause"`).

    Args:
        state: `(2,)`, yaw and pitch in degrees at the first tick.
        ticks_per_step: game ticks that an action lasts.
        whole_mouse: mouse movement in whole counts, as games report it. What rounding leaves of a step goes into the
            next: sums over any number of steps are off by less than one count.
        clamp_pitch: keep pitch in [-90, 90]; False where the pitch at the first tick is not known.
    """

    def __init__(self, state: Any, *, ticks_per_step: int = 8, whole_mouse: bool = False, clamp_pitch: bool = True):
        self.yaw, self.pitch = (float(x) for x in torch.as_tensor(state).double().reshape(2))
        self.ticks_per_step, self.whole_mouse, self.clamp_pitch = ticks_per_step, whole_mouse, clamp_pitch
        self.ticks = 0
        self._slot: int | None = None
        self._gui = False
        self._keys: list[str] = []
        self._buttons: list[int] | None = None
        self._left_over = [0.0, 0.0]  # of the mouse, by axis
        self._waiting: np.ndarray | None = None

    def add(self, actions: Any) -> list[dict[str, Any]]:
        """Lines of the steps that are complete: the last one given waits for the next, which says its last slot.

        Args:
            actions: `(38,)` or `(steps, 38)`, raw.
        """
        values = _check(actions, self.ticks_per_step)
        lines = []
        for step in values:
            if self._waiting is not None:
                lines += self._step(self._waiting, step)
            self._waiting = step
        return lines

    def finish(self) -> list[dict[str, Any]]:
        """Lines of the step that waits."""
        last, self._waiting = self._waiting, None
        return [] if last is None else self._step(last, None)

    def idle(self, ticks: int) -> list[dict[str, Any]]:
        """Lines without input, after `finish`: view, slot and GUI stay."""
        return [self._line(0.0, 0.0, [], []) for _ in range(ticks)]

    def _step(self, values: np.ndarray, following: np.ndarray | None) -> list[dict[str, Any]]:
        row, ticks = values[None], self.ticks_per_step
        held = [c for c in _pressed(row, 0, MINERL_NAMES) if c.startswith("key.") and c not in NUMBER_KEYS]
        held += _pressed(row, 0, ["key.right.shift"])
        numbers = _pressed(row, 0, NUMBER_KEYS)
        buttons = [BUTTONS.index(c) for c in _pressed(row, 0, BUTTONS)]
        self._slot, self._gui = _slot_of(values), bool(values[COLUMN["gui_open"]])
        slots = [NUMBER_KEYS.index(name) for name in numbers]
        # Without a step to come, the last key counts.
        chosen = slots[-1:] if following is None else [slot for slot in slots if slot == _slot_of(following)]
        next_slot = chosen[0] if chosen else self._slot
        dx, dy = (self._mouse(axis, values[COLUMN[c]]) for axis, c in enumerate(("mouse_dx", "mouse_dy")))
        turn, look = (_divide(values[COLUMN[c]], ticks) for c in ("yaw_delta", "pitch_delta"))
        lines = []
        for tick in range(ticks):
            lines.append(self._line(dx[tick], dy[tick], held + (numbers if tick == 0 else []), buttons))
            self._slot = next_slot
            self.yaw, self.pitch = self.yaw + turn[tick], self.pitch + look[tick]
            if self.clamp_pitch:
                self.pitch = min(max(self.pitch, -PITCH_SCALE), PITCH_SCALE)
        return lines

    def _mouse(self, axis: int, total: float) -> list[float]:
        if not self.whole_mouse:
            return _divide(total, self.ticks_per_step)
        counts = math.floor(total + self._left_over[axis] + 0.5)
        self._left_over[axis] += total - counts
        edges = [round(counts * tick / self.ticks_per_step) for tick in range(self.ticks_per_step + 1)]
        return [float(b - a) for a, b in itertools.pairwise(edges)]

    def _line(self, dx: float, dy: float, keys: list[str], buttons: list[int]) -> dict[str, Any]:
        before = buttons if self._buttons is None else self._buttons
        line = {
            "mouse": {
                "dx": dx,
                "dy": dy,
                "dwheel": 0.0,
                "buttons": buttons,
                "newButtons": [b for b in buttons if b not in before],
            },
            "keyboard": {
                "keys": ["key.keyboard." + c.removeprefix("key.") for c in keys],
                "newKeys": ["key.keyboard." + c.removeprefix("key.") for c in keys if c not in self._keys],
                "chars": "",
            },
            "isGuiOpen": self._gui,
            "hotbar": self._slot,
            "yaw": self.yaw,
            "pitch": self.pitch,
            "tick": self.ticks,
        }
        self._keys, self._buttons, self.ticks = keys, buttons, self.ticks + 1
        return line


def _slot_of(values: np.ndarray) -> int | None:
    """The slot of an action; None where no hotbar column is set."""
    slots = values[COLUMN[SLOTS[0]] : COLUMN[SLOTS[-1]] + 1]
    return int(slots.argmax()) if slots.any() else None
