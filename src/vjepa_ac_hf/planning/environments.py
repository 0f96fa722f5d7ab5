"""Raw actions, tick by tick, as MineRL takes them and as a VPT log holds them (docs/planning.md, "To the game").

An action of the model lasts several game ticks. Movement is divided evenly among them, the last tick taking the
rounding; keys and buttons are held for all of them; number keys are pressed in the first one.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..actions_vjepa2_ac import ACTION_COLUMNS
from ..data.events import DEGREES_PER_PIXEL
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

    The first line's `newButtons` is empty: readers of VPT take `[0]` there for the stuck-attack fault.

    Args:
        actions: `(38,)` or `(steps, 38)`, raw, columns `ACTION_COLUMNS`.
        state: `(2,)`, yaw and pitch in degrees at the first tick.
        ticks_per_step: game ticks that an action lasts.

    Raises:
        ValueError: another shape, values that are not finite, no ticks.
    """
    values = _check(actions, ticks_per_step)
    yaw, pitch = (float(x) for x in torch.as_tensor(state).double().reshape(2))
    lines: list[dict[str, Any]] = []
    keys: list[str] = []
    buttons: list[int] | None = None
    for step in range(len(values)):
        held = [c for c in _pressed(values, step, MINERL_NAMES) if c.startswith("key.") and c not in NUMBER_KEYS]
        held += _pressed(values, step, ["key.right.shift"])
        numbers = _pressed(values, step, NUMBER_KEYS)
        now = [BUTTONS.index(c) for c in _pressed(values, step, BUTTONS)]
        slot = int(values[step, COLUMN[SLOTS[0]] : COLUMN[SLOTS[-1]] + 1].argmax())
        dx, dy, turn, look = (
            _divide(values[step, COLUMN[c]], ticks_per_step)
            for c in ("mouse_dx", "mouse_dy", "yaw_delta", "pitch_delta")
        )
        for tick in range(ticks_per_step):
            down = held + (numbers if tick == 0 else [])
            lines.append(
                {
                    "mouse": {
                        "dx": dx[tick],
                        "dy": dy[tick],
                        "dwheel": 0.0,
                        "buttons": now,
                        "newButtons": [] if buttons is None else [b for b in now if b not in buttons],
                    },
                    "keyboard": {
                        "keys": ["key.keyboard." + c.removeprefix("key.") for c in down],
                        "newKeys": ["key.keyboard." + c.removeprefix("key.") for c in down if c not in keys],
                        "chars": "",
                    },
                    "isGuiOpen": bool(values[step, COLUMN["gui_open"]]),
                    "hotbar": slot if tick == 0 or not numbers else NUMBER_KEYS.index(numbers[-1]),
                    "yaw": yaw,
                    "pitch": pitch,
                    "tick": len(lines),
                }
            )
            keys, buttons = down, now
            yaw, pitch = yaw + turn[tick], min(max(pitch + look[tick], -PITCH_SCALE), PITCH_SCALE)
    return lines
