"""The log of a VPT recording: one JSON line per video frame, parsed once (docs/data.md, "Recordings")."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from ..actions_vjepa2_ac import ACTION_COLUMNS
from .names import recorder_version_of
from .observed import MOVEMENT_KEYS, OBSERVED, count_input, find_pauses
from .slots import (
    NUM_SLOTS,
    UNKNOWN_SLOT,
    check_hotbar_injection,
    count_causes,
    follow_slots,
    injected_ticks,
)

# Columns that say whether a key or mouse button is down: key.1 .. mouse.middle, contiguous in ACTION_COLUMNS.
FIRST_PRESSED = ACTION_COLUMNS.index("key.1")
PRESSED_COLUMNS: tuple[str, ...] = ACTION_COLUMNS[FIRST_PRESSED : ACTION_COLUMNS.index("mouse.middle") + 1]
NUMBER_COLUMNS = slice(0, NUM_SLOTS)  # of PRESSED_COLUMNS: key.1 .. key.9

REPAIRS: tuple[str, ...] = (
    "null_mouse",
    "null_keyboard",
    "null_gui",
    "unknown_buttons",
    "stuck_attack",
    "no_hotbar",
    "hotbar_injected",
    "mouse_scaled",
    "frames_timed",
)

# Recorder versions that logged GUI mouse movement at another scale: a table of openai/Video-Pre-Training's
# data_loader.py (which does not use it itself); neither its README nor the paper (arXiv 2206.11795) has it.
GUI_MOUSE_SCALE = {"5.7": 0.5, "5.8": 0.5, "6.7": 2.0, "6.8": 2.0, "6.9": 2.0}

# Beyond this, float32 no longer resolves one degree or one pixel: no real log comes near it.
_LARGEST_NUMBER = 1e7

# Limits that real recordings stay far below (five minutes: 6,000 ticks, some 10 MB), so that a damaged or hostile log
# costs bounded memory. The most that a log within them takes while it is parsed is about 1 GB.
LARGEST_LOG = 256 * 2**20  # bytes
LONGEST_LINE = 2**20  # bytes
MOST_TICKS = 2**17  # 1.8 hours at 20 per second
MOST_KEYS = 64  # keys, or mouse buttons, in one line
_MOST_OTHER_KEYS = 32  # keys without a column that are counted by name

_KEY_PREFIX, _KEY_NAME, _NO_KEY_NAME = "key.keyboard.", re.compile(r"key\.keyboard\.[a-z0-9.]{1,24}"), "(other names)"
_KEY_COLUMN = {
    _KEY_PREFIX + column.removeprefix("key."): index
    for index, column in enumerate(PRESSED_COLUMNS)
    if column.startswith("key.")
}
_BUTTON_COLUMN = {
    button: PRESSED_COLUMNS.index(column) for button, column in enumerate(("mouse.left", "mouse.right", "mouse.middle"))
}
_MOVEMENT = [PRESSED_COLUMNS.index(column) for column in MOVEMENT_KEYS]
_NOT_A_NUMBER = re.compile(rb'"(\w{1,40})"\s*:\s*(-?(?:NaN|Infinity|inf))\b', re.IGNORECASE)


class RecordingError(ValueError):
    """A recording that cannot be used; the message names file, line (1-based), field and what was found."""


class _Mouse(msgspec.Struct):
    dx: float
    dy: float
    buttons: list[float]
    newButtons: list[float] = []
    x: float | None = None
    y: float | None = None
    dwheel: float | None = None


class _Keyboard(msgspec.Struct):
    keys: list[str]


class _Line(msgspec.Struct):
    """What is read; everything else is skipped, whatever its bytes. Fields that all lines may lack: `_check_fields`."""

    yaw: float
    pitch: float
    mouse: _Mouse | UnsetType | None = UNSET
    keyboard: _Keyboard | UnsetType | None = UNSET
    isGuiOpen: bool | UnsetType | None = UNSET
    hotbar: int | UnsetType | None = UNSET
    isGuiInventory: bool | None = None
    tick: float | None = None
    milli: float | None = None
    serverTick: float | None = None
    unsure: bool = False


# Made once, before any thread asks: msgspec crashes where several threads are the first to need a type.
_DECODER = msgspec.json.Decoder(_Line)


@dataclass(frozen=True)
class Recording:
    """The log of one recording with all repairs applied; arrays have one row per tick (n ticks).

    Attributes:
        name: the recording's name as given.
        recorder_version: such as "6.8", or None where unknown.
        mouse_dx, mouse_dy: float64 (n,), mouse movement during the tick in pixels.
        cursor_x, cursor_y: float64 (n,), GUI cursor in 1280x720 pixels, NaN where the log has none.
        yaw, pitch: float64 (n,), degrees as logged: yaw unbounded, pitch positive looking down.
        pressed: bool (n, 24), keys and mouse buttons down during the tick, columns `PRESSED_COLUMNS`.
        hotbar: int64 (n,), selected slot 0..8, -1 where the log does not tell it.
        gui_open: bool (n,).
        unsure: bool (n,), ticks that whoever wrote the log marked: no action of a clip covers them.
        after_pause: bool (n,), ticks before which the game was paused (`find_pauses`).
        repairs: number of ticks affected, for every name of `REPAIRS`.
        observed: numbers of what is doubtful or worth knowing and left as it is, for every name of `OBSERVED`.
        other_keys: ticks with each key that has no column, by name; the most frequent ones.

    Source: VPT (arXiv 2206.11795, contractor data); docs/data.md, "Recordings" and "Repairs".
    """

    name: str
    recorder_version: str | None
    mouse_dx: np.ndarray
    mouse_dy: np.ndarray
    cursor_x: np.ndarray
    cursor_y: np.ndarray
    yaw: np.ndarray
    pitch: np.ndarray
    pressed: np.ndarray
    hotbar: np.ndarray
    gui_open: np.ndarray
    unsure: np.ndarray
    after_pause: np.ndarray
    repairs: dict[str, int]
    observed: dict[str, int]
    other_keys: dict[str, int]

    @property
    def num_ticks(self) -> int:
        return len(self.yaw)

    @property
    def has_input(self) -> np.ndarray:
        """bool (n,): the mouse moved, or a key or button was down during the tick, after repairs."""
        return (self.mouse_dx != 0) | (self.mouse_dy != 0) | self.pressed.any(axis=1)


def check_repairs(names: Collection[str]) -> None:
    """Refuse names that are no repair, before any file is read.

    Raises:
        ValueError: an unknown name, or one string in place of a list of names.
    """
    unknown = [names] if isinstance(names, str) else sorted(set(names) - set(REPAIRS))
    if unknown:
        raise ValueError(f"skip_repairs must be a list of names among {REPAIRS}, found {unknown}")


def parse_recording(
    log: bytes,
    name: str,
    *,
    recorder_version: str | None = None,
    skip_repairs: Collection[str] = (),
    hotbar_injection: str = "cause",
) -> Recording:
    """Parse and repair a VPT log.

    Args:
        log: the `.jsonl` file's bytes, one JSON object a line; empty lines at the end are ignored.
        name: the recording's name, for messages and its recorder version; folders and suffix may be part of it.
        recorder_version: such as "6.8"; None takes it from a folder in `name`, where there is one.
        skip_repairs: names of `REPAIRS` not to be done: values stay as logged, and what cannot be used as logged
            (`null_mouse`, `null_keyboard`, `null_gui`, `unknown_buttons`, `no_hotbar`) is an error. `frames_timed`
            concerns the video alone.
        hotbar_injection: the tick of the number key that stands for a change of slot, "cause" or "vpt"
            (`injected_ticks`).

    Returns:
        Recording: arrays per tick, repaired, with the number of ticks every repair touched.

    Raises:
        RecordingError: an empty log, one beyond the limits of this module, a line that is not a JSON object, a field
            that is missing, of another type, not finite or out of range, a fault whose repair is switched off. The
            message names file, line, field and what was found.
        ValueError: `skip_repairs` has a name that is no repair, or `hotbar_injection` is another.

    Source: VPT (arXiv 2206.11795, contractor data); docs/data.md, "Repairs".
    """
    check_repairs(skip_repairs)
    check_hotbar_injection(hotbar_injection)
    lines = _decode_lines(log, name)
    _check_fields(name, lines)
    mice = [line.mouse or None for line in lines]
    repairs, observed = dict.fromkeys(REPAIRS, 0), dict.fromkeys(OBSERVED, 0)
    repairs["null_mouse"] = sum(mouse is None for mouse in mice)
    repairs["null_keyboard"] = sum(not line.keyboard for line in lines)
    repairs["null_gui"] = sum(not isinstance(line.isGuiOpen, bool) for line in lines)
    _refuse_faults(name, lines, skip_repairs)

    gui_open = _gui_open(lines)
    version = recorder_version or recorder_version_of(name)
    scale = 1.0 if "mouse_scaled" in skip_repairs else GUI_MOUSE_SCALE.get(version or "", 1.0)
    mouse_dx, mouse_dy = _movement(name, mice, gui_open, scale, repairs, observed)
    wheel = _numbers(name, "mouse.dwheel", [(mouse.dwheel if mouse else None) or 0.0 for mouse in mice])
    pressed = np.zeros((len(lines), len(PRESSED_COLUMNS)), dtype=bool)
    other_keys = _press_keys(pressed, lines, observed)
    _press_buttons(pressed, mice, repairs, release_stuck_attack="stuck_attack" not in skip_repairs)
    hotbar = _slots(name, lines, pressed[:, NUMBER_COLUMNS], wheel, gui_open, repairs, observed)
    if "hotbar_injected" not in skip_repairs:
        ticks, slots = injected_ticks(hotbar, hotbar_injection)
        # The scroll wheel changes the slot without a key: the key that would have done it counts as pressed.
        repairs["hotbar_injected"] = int((~pressed[ticks, slots]).sum())
        pressed[ticks, slots] = True
    cursor_x = _numbers(name, "mouse.x", [mouse.x if mouse else None for mouse in mice])
    cursor_y = _numbers(name, "mouse.y", [mouse.y if mouse else None for mouse in mice])
    inventory = np.array([line.isGuiInventory is True for line in lines])
    observed |= count_input(gui_open, inventory, pressed[:, _MOVEMENT], cursor_x, cursor_y)
    clocks = [[getattr(line, clock) for line in lines] for clock in ("tick", "milli", "serverTick")]
    after_pause, of_clocks = find_pauses(*(np.array(clock, dtype=np.float64) for clock in clocks))
    return Recording(
        name=name,
        recorder_version=version,
        mouse_dx=mouse_dx,
        mouse_dy=mouse_dy,
        cursor_x=cursor_x,
        cursor_y=cursor_y,
        yaw=_numbers(name, "yaw", [line.yaw for line in lines]),
        pitch=_numbers(name, "pitch", [line.pitch for line in lines]),
        pressed=pressed,
        hotbar=hotbar,
        gui_open=gui_open,
        unsure=np.array([line.unsure for line in lines]),
        after_pause=after_pause,
        repairs=repairs,
        observed=observed | of_clocks,
        other_keys=other_keys,
    )


def _decode_lines(log: bytes, name: str) -> list[_Line]:
    if len(log) > LARGEST_LOG:
        raise RecordingError(f"{name}: log too large: expected at most {LARGEST_LOG} bytes, found {len(log)}")
    lines: list[_Line] = []
    for number, text in enumerate(_split_lines(log), start=1):
        where = f"{name}: line {number}"
        if number > MOST_TICKS:
            raise RecordingError(f"{name}: too long: expected at most {MOST_TICKS} lines, found more")
        if len(text) > LONGEST_LINE:
            raise RecordingError(f"{where}: line too long: expected at most {LONGEST_LINE} bytes, found {len(text)}")
        if not text.strip():
            raise RecordingError(f"{where}: expected a JSON object, found an empty line")
        try:
            line = _DECODER.decode(text)
        except msgspec.ValidationError as error:
            raise RecordingError(f"{where}: {error}") from error
        except msgspec.DecodeError as error:
            # JSON has no NaN: the parser cannot name the field, so that it is looked up for the message.
            if match := _NOT_A_NUMBER.search(text):
                field, found = (group.decode() for group in match.groups())
                raise RecordingError(f"{where}: field {field!r}: expected a finite number, found {found}") from error
            raise RecordingError(f"{where}: broken JSON: {error}") from error
        except UnicodeDecodeError as error:  # msgspec looks at the encoding of strings that it keeps
            raise RecordingError(
                f"{where}: broken JSON: expected UTF-8, found {error.object[error.start]:#04x}"
            ) from error
        except RecursionError as error:
            raise RecordingError(f"{where}: broken JSON: nested too deeply") from error
        _limit_entries(where, line)
        lines.append(line)
    if not lines:
        raise RecordingError(f"{name}: expected one JSON line per frame, found an empty log ({len(log)} bytes)")
    return lines


def _split_lines(log: bytes) -> Iterator[bytes]:
    """Lines up to the last one that is not empty, one at a time: millions of them are as many objects."""
    start, end = 0, len(log.rstrip())
    while start < end:
        line_end = log.find(b"\n", start, end)
        line_end = end if line_end < 0 else line_end
        yield log[start:line_end]
        start = line_end + 1


def _limit_entries(where: str, line: _Line) -> None:
    lists: list[tuple[str, list]] = [("keyboard.keys", line.keyboard.keys)] if line.keyboard else []
    if isinstance(line.mouse, _Mouse):
        lists += [("mouse.buttons", line.mouse.buttons), ("mouse.newButtons", line.mouse.newButtons)]
    for field, entries in lists:
        if len(entries) > MOST_KEYS:
            raise RecordingError(
                f"{where}: field {field!r}: expected at most {MOST_KEYS} entries, found {len(entries)}"
            )


def _check_fields(name: str, lines: list[_Line]) -> None:
    """Fields that some lines may lack, or have as null: what cannot be known then is an error."""
    for field in ("mouse", "keyboard", "isGuiOpen"):
        values = [getattr(line, field) for line in lines]
        if all(value is UNSET for value in values) or (field == "isGuiOpen" and not {True, False} & set(values)):
            raise RecordingError(f"{name}: field {field!r}: missing in all {len(lines)} lines")
    without = [line.hotbar is UNSET for line in lines]
    if any(without) and not all(without):
        odd = without.index(not without[0])
        first, then = ("missing", "present") if without[0] else ("present", "missing")
        raise RecordingError(
            f"{name}: line {odd + 1}: field 'hotbar': expected in all lines or in none, found it {then} here and "
            f"{first} in lines 1 to {odd}"
        )


def _gui_open(lines: list[_Line]) -> np.ndarray:
    """bool (n,); a line that does not tell is like the one before, the first ones are closed."""
    is_open, found = False, []
    for line in lines:
        is_open = line.isGuiOpen if isinstance(line.isGuiOpen, bool) else is_open
        found.append(is_open)
    return np.array(found)


def _movement(
    name: str,
    mice: list[_Mouse | None],
    gui_open: np.ndarray,
    gui_scale: float,
    repairs: dict[str, int],
    observed: dict[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Mouse dx and dy, float64 (n,) each."""
    mouse_dx = _numbers(name, "mouse.dx", [mouse.dx if mouse else 0.0 for mouse in mice])
    mouse_dy = _numbers(name, "mouse.dy", [mouse.dy if mouse else 0.0 for mouse in mice])
    moved = gui_open & ((mouse_dx != 0) | (mouse_dy != 0))
    observed["gui_mouse"] = int(moved.sum())
    if gui_scale != 1.0:
        repairs["mouse_scaled"] = int(moved.sum())
        mouse_dx[gui_open] *= gui_scale
        mouse_dy[gui_open] *= gui_scale
    return mouse_dx, mouse_dy


def _slots(
    name: str,
    lines: list[_Line],
    numbers: np.ndarray,
    wheel: np.ndarray,
    gui_open: np.ndarray,
    repairs: dict[str, int],
    observed: dict[str, int],
) -> np.ndarray:
    """int64 (n,): the slots that the log has, with null for one that is not known; followed where it has none."""
    if lines[0].hotbar is UNSET:
        repairs["no_hotbar"] = len(lines)
        hotbar = follow_slots(numbers, wheel, gui_open)
    else:
        logged = _numbers(name, "hotbar", [line.hotbar for line in lines], 0, NUM_SLOTS - 1)
        hotbar = np.where(np.isnan(logged), UNKNOWN_SLOT, logged).astype(np.int64)
        observed |= count_causes(hotbar, numbers, wheel)
    observed["slot_unknown"] = int((hotbar == UNKNOWN_SLOT).sum())
    return hotbar


def _refuse_faults(name: str, lines: list[_Line], skip_repairs: Collection[str]) -> None:
    """What cannot be used as logged is an error where its repair is switched off."""
    if not {"null_mouse", "null_keyboard", "null_gui", "no_hotbar", "unknown_buttons"} & set(skip_repairs):
        return
    for number, line in enumerate(lines, start=1):
        buttons = line.mouse.buttons if line.mouse else []
        strange = [button for button in buttons if button not in _BUTTON_COLUMN]
        for repair, field, fault in (
            ("null_mouse", "mouse", _absence(line.mouse)),
            ("null_keyboard", "keyboard", _absence(line.keyboard)),
            ("null_gui", "isGuiOpen", _absence(line.isGuiOpen)),
            ("no_hotbar", "hotbar", _absence(line.hotbar) if line.hotbar is UNSET else ""),
            ("unknown_buttons", "mouse.buttons", strange),
        ):
            if fault and repair in skip_repairs:
                raise RecordingError(
                    f"{name}: line {number}: field {field!r}: found {fault}, and the repair {repair!r} is switched off"
                )


def _absence(value: Any) -> str:
    return "nothing" if value is UNSET else "null" if value is None else ""


def _numbers(
    name: str, field: str, values: list, low: float = -_LARGEST_NUMBER, high: float = _LARGEST_NUMBER
) -> np.ndarray:
    """float64 of all lines' values within the limits; NaN for None."""
    try:
        numbers = np.array(values, dtype=np.float64)
    except OverflowError:  # an integer beyond float64
        numbers = np.array([min(max(value, low - 1), high + 1) for value in values], dtype=np.float64)
    absent = np.array([value is None for value in values])
    wrong = np.flatnonzero(~((numbers >= low) & (numbers <= high) | absent))
    if len(wrong):
        found = values[wrong[0]]
        text = f"{found:g}" if abs(found) < 1e300 else f"{'-' if found < 0 else ''}1e300 or more"
        raise RecordingError(
            f"{name}: line {wrong[0] + 1}: field {field!r}: expected {low:g} to {high:g}, found {text}"
        )
    return numbers


def _press_keys(pressed: np.ndarray, lines: list[_Line], observed: dict[str, int]) -> dict[str, int]:
    """Press what has a column; ticks with each of the other keys."""
    others: Counter[str] = Counter()
    for tick, line in enumerate(lines):
        without_column = set()
        for key in line.keyboard.keys if line.keyboard else ():
            column = _KEY_COLUMN.get(key)
            if column is not None:
                pressed[tick, column] = True
            else:
                without_column.add(key[len(_KEY_PREFIX) :] if _KEY_NAME.fullmatch(key) else _NO_KEY_NAME)
        observed["other_keys"] += bool(without_column)
        others.update(without_column)
    return dict(sorted(others.items(), key=lambda item: (-item[1], item[0]))[:_MOST_OTHER_KEYS])


def _press_buttons(
    pressed: np.ndarray, mice: list[_Mouse | None], repairs: dict[str, int], *, release_stuck_attack: bool
) -> None:
    # A segment that starts with a fresh attack press was cut from a held one: the recorder then reports the
    # button as down until it is really pressed again.
    attack_is_stuck = release_stuck_attack and mice[0] is not None and mice[0].newButtons == [0]
    for tick, mouse in enumerate(mice):
        if mouse is None:
            continue
        if attack_is_stuck and tick > 0 and 0 in mouse.newButtons:
            attack_is_stuck = False
        if attack_is_stuck and 0 in mouse.buttons:
            repairs["stuck_attack"] += 1
        if any(button not in _BUTTON_COLUMN for button in mouse.buttons):
            repairs["unknown_buttons"] += 1
        for button, column in _BUTTON_COLUMN.items():
            pressed[tick, column] = button in mouse.buttons and not (attack_is_stuck and button == 0)
