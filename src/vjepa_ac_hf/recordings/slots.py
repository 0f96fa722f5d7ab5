"""The hotbar slot of every tick and the number keys that stand for its changes (docs/data.md, "Hotbar slots").

The input of tick t leads to the state of line t + 1: a slot that line t shows first was chosen in tick t - 1.
"""

import math

import numpy as np

NUM_SLOTS = 9
UNKNOWN_SLOT = -1
HOTBAR_INJECTIONS = ("cause", "vpt")


def check_hotbar_injection(name: str) -> None:
    """Refuse another name than those of `HOTBAR_INJECTIONS`.

    Raises:
        ValueError: with the name found.
    """
    if name not in HOTBAR_INJECTIONS:
        raise ValueError(f"hotbar_injection must be one of {HOTBAR_INJECTIONS}, found {name!r}")


def slot_changes(hotbar: np.ndarray) -> np.ndarray:
    """Ticks j whose slot differs from that of tick j - 1, both being known: int64 (changes,)."""
    known = hotbar != UNKNOWN_SLOT
    return np.flatnonzero((np.diff(hotbar) != 0) & known[1:] & known[:-1]) + 1


def injected_ticks(hotbar: np.ndarray, injection: str) -> tuple[np.ndarray, np.ndarray]:
    """Where number keys stand for changes of the slot.

    Args:
        hotbar: int (n,), slots 0..8, -1 where not known.
        injection: "cause": the key is pressed in the tick before the line that shows the slot, whose input led to it;
            "vpt": in the tick of that line, as OpenAI's loader has it.

    Returns:
        Ticks and the slots that are chosen in them, int64 (changes,) each.

    Source: `data_loader.py` of openai/Video-Pre-Training for "vpt", which also presses the slot's key in the first line
    where that is not slot 0 (nobody did, and it is not done here); docs/data.md, "Hotbar slots".
    """
    changes = slot_changes(hotbar)
    return changes - (injection == "cause"), hotbar[changes]


def follow_slots(numbers: np.ndarray, wheel: np.ndarray, gui_open: np.ndarray) -> np.ndarray:
    """Slots of a log that has none, from what chose them; -1 before the first number key.

    As the game has it: a number key chooses when it goes down, the highest of several; a notch of the wheel moves by
    one slot, negative to the next, around the ends; parts of notches add up until the direction changes; with a GUI
    open neither chooses a slot. Of both in one tick the key is the later one: the game handles the wheel when it is
    turned and keys at the tick's end. Slots chosen by the pick-block button cannot be followed.

    Args:
        numbers: bool (n, 9), number keys down.
        wheel: float (n,), notches.
        gui_open: bool (n,).
    """
    pressed = numbers & ~np.concatenate([np.zeros_like(numbers[:1]), numbers[:-1]])
    slots = np.full(len(numbers), UNKNOWN_SLOT, dtype=np.int64)
    acting = ~gui_open & (pressed.any(axis=1) | (wheel != 0))
    slot, part = UNKNOWN_SLOT, 0.0
    begun = 0
    for tick in np.flatnonzero(acting).tolist():
        slots[begun : tick + 1] = slot
        begun = tick + 1
        part = (part if part * wheel[tick] >= 0 else 0.0) + float(wheel[tick])
        notches = math.trunc(part)
        part -= notches
        if slot != UNKNOWN_SLOT:
            slot = (slot - notches) % NUM_SLOTS
        if pressed[tick].any():
            slot = int(np.flatnonzero(pressed[tick])[-1])
    slots[begun:] = slot
    return slots


def count_causes(hotbar: np.ndarray, numbers: np.ndarray, wheel: np.ndarray) -> dict[str, int]:
    """What the log holds beside every change of a logged slot: whether causes lie where `injected_ticks` has them.

    Args:
        hotbar: int (n,), slots as logged.
        numbers: bool (n, 9), number keys down as logged.
        wheel: float (n,), notches.

    Returns:
        Numbers of changes by `slot_changes_by_key`, `slot_changes_by_wheel`: the new slot's key, else a turn of the
        wheel, in the tick before; `slot_changes_late`: neither there, but in the tick that shows the slot;
        `slot_changes_unexplained`: neither (pick block, other games).
    """
    changes = slot_changes(hotbar)
    chosen = hotbar[changes]
    key, turned = numbers[changes - 1, chosen], wheel[changes - 1] != 0
    late = ~key & ~turned & (numbers[changes, chosen] | (wheel[changes] != 0))
    by = {"by_key": key, "by_wheel": turned & ~key, "late": late, "unexplained": ~(key | turned | late)}
    return {f"slot_changes_{cause}": int(found.sum()) for cause, found in by.items()}
