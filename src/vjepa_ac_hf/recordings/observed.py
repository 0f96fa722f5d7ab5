"""What a log holds that is doubtful, or worth knowing, and used as it is (docs/data.md, "What is only counted")."""

import numpy as np

# Pixels of the window that players were asked to play in: what the log's cursor refers to, whatever the video's size.
CURSOR_WIDTH, CURSOR_HEIGHT = 1280, 720

OBSERVED: tuple[str, ...] = (
    "slot_unknown",
    "slot_changes_by_key",
    "slot_changes_by_wheel",
    "slot_changes_late",
    "slot_changes_unexplained",
    "movement_keys_in_inventory",
    "movement_keys_in_other_gui",
    "gui_mouse",
    "cursor_outside",
    "cursor_missing",
    "other_keys",
    "pauses",
    "clips_over_pause",
    "clock_missing",
    "clock_backwards",
    "tick_gaps",
)
MOVEMENT_KEYS = ("key.w", "key.a", "key.s", "key.d")

# Minecraft's client makes up for a stall by at most 10 ticks at once (`Minecraft.runTick`): a longer one is lost time.
LONGEST_STALL = 10  # ticks
_TICK_MS = 50.0


def count_input(
    gui_open: np.ndarray, inventory: np.ndarray, movement: np.ndarray, cursor_x: np.ndarray, cursor_y: np.ndarray
) -> dict[str, int]:
    """Ticks with a GUI open whose keys or cursor do not mean what they seem to.

    Args:
        gui_open, inventory: bool (n,), any GUI is open; it is the player's inventory (or a horse's).
        movement: bool (n, 4), `MOVEMENT_KEYS` down: with a GUI open they move nobody. In an inventory it is
            mostly still held from before, in others, chat among them, it may be a letter typed.
        cursor_x, cursor_y: float (n,), pixels of 1280x720, NaN where not known.
    """
    known = gui_open & np.isfinite(cursor_x) & np.isfinite(cursor_y)
    inside = (cursor_x >= 0) & (cursor_x < CURSOR_WIDTH) & (cursor_y >= 0) & (cursor_y < CURSOR_HEIGHT)
    found = {
        "movement_keys_in_inventory": movement.any(axis=1) & gui_open & inventory,
        "movement_keys_in_other_gui": movement.any(axis=1) & gui_open & ~inventory,
        "cursor_outside": known & ~inside,
        "cursor_missing": gui_open & ~known,
    }
    return {name: int(ticks.sum()) for name, ticks in found.items()}


def find_pauses(tick: np.ndarray, milli: np.ndarray, server_tick: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Where a recording goes on after a pause, and how its clocks run.

    While the game is paused (ESC) the recorder writes nothing, and leaves out one more tick: `tick` goes on by ones,
    the other clocks jump. A jump is more than `LONGEST_STALL` ticks between two lines, 10 of `serverTick` or 500 ms of
    `milli`: below it, it cannot be told from a stalled machine that catches up.

    Args:
        tick, milli, server_tick: float (n,), as logged, NaN where missing.

    Returns:
        bool (n,), lines before which there is a jump; and the counts `pauses` (jumps), `clock_missing` (lines without
        `milli`), `clock_backwards` (lines whose `milli` is below that before) and `tick_gaps` (lines whose `tick` is
        not the next one: lines are missing or doubled).

    Source: `PlayRecorder.java` in scripts/mcp_patch.diff of minerllabs/minerl; docs/data.md, "What is only counted".
    """
    steps, elapsed, served = (np.diff(clock, prepend=clock[:1]) for clock in (tick, milli, server_tick))
    after_pause = (elapsed > LONGEST_STALL * _TICK_MS) | (served > LONGEST_STALL)
    gaps = np.isfinite(steps) & (steps != 1)
    counts = {
        "pauses": int(after_pause.sum()),
        "clock_missing": int(np.isnan(milli).sum()),
        "clock_backwards": int((elapsed < 0).sum()),
        "tick_gaps": int(gaps[1:].sum()),
    }
    return after_pause, counts
