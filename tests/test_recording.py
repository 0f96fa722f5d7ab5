"""Parsing and repairing logs."""

import copy
import json

import numpy as np
import pytest
from helpers_data import DATA, LUANTI, make_lines, oracle_inputs, to_log

from vjepa_ac_hf.recordings.log import (
    PRESSED_COLUMNS,
    RecordingError,
    parse_recording,
)
from vjepa_ac_hf.recordings.names import recorder_version_of, version_order


def still(num_ticks=5, **changes):
    line = {
        "mouse": {"x": 1.0, "y": 2.0, "dx": 0.0, "dy": 0.0, "buttons": [], "newButtons": []},
        "keyboard": {"keys": []},
        "isGuiOpen": False,
        "hotbar": 0,
        "yaw": 0.0,
        "pitch": 0.0,
    }
    return [copy.deepcopy(line) for _ in range(num_ticks)]


def pressed(recording, column):
    return recording.pressed[:, PRESSED_COLUMNS.index(column)].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_every_tick_equals_the_oracle(seed):
    lines = make_lines(200, seed)
    recording = parse_recording(to_log(lines), "a")
    for tick, (dx, dy, down) in enumerate(oracle_inputs(lines)):
        found = {column for column, is_down in zip(PRESSED_COLUMNS, recording.pressed[tick], strict=True) if is_down}
        assert (recording.mouse_dx[tick], recording.mouse_dy[tick], found) == (dx, dy, down), tick
    assert recording.yaw.tolist() == [line["yaw"] for line in lines]


def test_null_mouse_and_keyboard_are_no_input_and_counted():
    lines = still()
    lines[1]["mouse"] = None
    lines[2]["keyboard"] = lines[3]["keyboard"] = None
    recording = parse_recording(to_log(lines), "a")
    assert recording.repairs["null_mouse"] == 1 and recording.repairs["null_keyboard"] == 2
    assert not recording.pressed.any() and np.isnan(recording.cursor_x[1])


def test_stuck_attack_is_dropped_until_pressed_again():
    lines = still(6)
    for line in lines:
        line["mouse"]["buttons"] = [0, 1]
    lines[0]["mouse"]["newButtons"] = [0]
    lines[4]["mouse"]["newButtons"] = [0]
    recording = parse_recording(to_log(lines), "a")
    assert pressed(recording, "mouse.left") == [False] * 4 + [True] * 2
    assert pressed(recording, "mouse.right") == [True] * 6
    assert recording.repairs["stuck_attack"] == 4


def test_attack_with_another_button_in_line_0_is_not_stuck():
    lines = still(3)
    lines[0]["mouse"]["newButtons"] = [0, 1]
    for line in lines:
        line["mouse"]["buttons"] = [0]
    recording = parse_recording(to_log(lines), "a")
    assert pressed(recording, "mouse.left") == [True] * 3 and recording.repairs["stuck_attack"] == 0


def test_unknown_buttons_are_ignored_and_counted():
    lines = still(3)
    lines[1]["mouse"]["buttons"] = [3, 2]
    recording = parse_recording(to_log(lines), "a")
    assert pressed(recording, "mouse.middle") == [False, True, False]
    assert recording.pressed.sum() == 1 and recording.repairs["unknown_buttons"] == 1


def slots_in(lines, slots, keys=None, wheel=None):
    """The lines with these slots (none: no field), number keys and turns of the wheel, by tick."""
    for tick, slot in enumerate(slots):
        lines[tick]["hotbar"] = slot
    for line in lines if not slots else ():
        del line["hotbar"]
    for tick, number in (keys or {}).items():
        lines[tick]["keyboard"]["keys"].append(f"key.keyboard.{number}")
    for tick, notches in (wheel or {}).items():
        lines[tick]["mouse"]["dwheel"] = notches
    return to_log(lines)


def ticks_with(recording, column):
    return np.flatnonzero(pressed(recording, column)).tolist()


def test_wheel_change_of_slot_counts_as_the_number_key_in_the_tick_before_the_line_that_shows_it():
    log = slots_in(still(4), (0, 8, 8, 2), keys={2: 3}, wheel={0: 1.0})
    recording = parse_recording(log, "a")
    assert (ticks_with(recording, "key.9"), ticks_with(recording, "key.3")) == ([0], [2])
    assert recording.repairs["hotbar_injected"] == 1, "a key that was down needs no repair"
    recording = parse_recording(log, "a", hotbar_injection="vpt")
    assert (ticks_with(recording, "key.9"), ticks_with(recording, "key.3")) == ([1], [2, 3])
    assert recording.repairs["hotbar_injected"] == 2
    assert not parse_recording(log, "a", skip_repairs=["hotbar_injected"]).pressed[0].any()
    with pytest.raises(ValueError, match=r"hotbar_injection must be one of \('cause', 'vpt'\), found 'before'"):
        parse_recording(log, "a", hotbar_injection="before")


def test_a_first_slot_that_is_not_0_is_nobodys_key():
    recording = parse_recording(slots_in(still(3), (5, 5, 5)), "a", hotbar_injection="vpt")
    assert not recording.pressed.any() and recording.hotbar.tolist() == [5, 5, 5]


def test_causes_of_slot_changes_are_counted():
    # Line 1: key before; 3: wheel before; 5: both, a key; 7: key and wheel in the line that shows it; 9: nothing.
    slots = (0, 1, 1, 2, 2, 3, 3, 4, 4, 5)
    log = slots_in(still(10), slots, keys={0: 2, 4: 4, 7: 5}, wheel={2: -1.0, 4: -1.0, 7: -1.0})
    observed = parse_recording(log, "a").observed
    found = {name.removeprefix("slot_changes_"): n for name, n in observed.items() if name.startswith("slot_changes")}
    assert found == {"by_key": 2, "by_wheel": 1, "late": 1, "unexplained": 1}


def test_a_log_without_slots_is_followed_from_number_keys_and_the_wheel():
    lines = still(16)
    lines[9]["isGuiOpen"] = lines[10]["isGuiOpen"] = True
    # 0: unknown, a turn from nowhere leads nowhere; 2, 3: key 9 held; 4: to the next, around the end; 5: two back;
    # 7: key and wheel, the key is the later; 9, 10: a GUI is open; 11: half a notch, 12: the other half; 13: two keys.
    log = slots_in(
        lines,
        (),
        keys={2: 9, 3: 9, 7: 3, 9: 8, 13: 6},
        wheel={0: -1.0, 4: -1.0, 5: 2.0, 7: -1.0, 10: 1.0, 11: 0.5, 12: 0.5},
    ).replace(b'"key.keyboard.6"', b'"key.keyboard.6", "key.keyboard.2"')
    recording = parse_recording(log, "6.9/a.jsonl")
    assert recording.hotbar.tolist() == [-1, -1, -1, 8, 8, 0, 7, 7, 2, 2, 2, 2, 2, 1, 5, 5]
    assert recording.repairs["no_hotbar"] == 16 and recording.observed["slot_unknown"] == 3
    # The wheel's changes count as number keys, in the tick of the notch.
    assert [ticks_with(recording, f"key.{n}") for n in (1, 8, 2)] == [[4], [5, 9], [12, 13]]
    assert recording.repairs["hotbar_injected"] == 3
    with pytest.raises(RecordingError, match="line 1: field 'hotbar': found nothing, and the repair 'no_hotbar' is sw"):
        parse_recording(log, "a", skip_repairs=["no_hotbar"])


def test_a_slot_may_be_null_where_whoever_wrote_the_log_does_not_know_it():
    recording = parse_recording(slots_in(still(5), (None, None, 4, 6, None), keys={0: 3}), "a")
    assert recording.hotbar.tolist() == [-1, -1, 4, 6, -1] and recording.observed["slot_unknown"] == 3
    assert np.argwhere(recording.pressed).tolist() == [[0, 2], [2, 6]], "what is known on one side only is no change"
    assert recording.repairs["no_hotbar"] == 0


@pytest.mark.parametrize("first", ["missing", "present"])
def test_a_log_that_gains_or_loses_its_slots_half_way_is_an_error(first):
    lines = still(6)
    for line in lines[:3] if first == "missing" else lines[3:]:
        del line["hotbar"]
    then = {"missing": "present", "present": "missing"}[first]
    with pytest.raises(
        RecordingError,
        match=f"rec: line 4: field 'hotbar': expected in all lines or in none, found it {then} here and {first} in "
        "lines 1 to 3",
    ):
        parse_recording(to_log(lines), "rec")


@pytest.mark.parametrize(
    ("version", "scale"), [("5.7", 0.5), ("5.8", 0.5), ("6.7", 2), ("6.8", 2), ("6.9", 2), ("7.1", 1)]
)
def test_gui_mouse_scale_of_recorder_versions(version, scale):
    lines = still(3)
    for line in lines:
        line["mouse"].update(dx=10.0, dy=-4.0)
    lines[1]["isGuiOpen"] = True
    recording = parse_recording(to_log(lines), f"data/{version}/name.mp4")
    assert recording.mouse_dx.tolist() == [10, 10 * scale, 10] and recording.mouse_dy.tolist() == [-4, -4 * scale, -4]
    assert recording.repairs["mouse_scaled"] == (scale != 1)


def test_real_log_counts():
    recording = parse_recording((DATA / f"{LUANTI}.jsonl").read_bytes(), LUANTI)
    lines = [json.loads(line) for line in (DATA / f"{LUANTI}.jsonl").read_text().splitlines()]
    assert recording.num_ticks == 200 and recording.gui_open.sum() == sum(line["isGuiOpen"] for line in lines) > 0
    assert recording.repairs["hotbar_injected"] == 5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("yaw", float("nan"), r"rec\.jsonl: line 3: field 'yaw': expected a finite number, found NaN"),
        ("pitch", float("inf"), r"line 3: field 'pitch': expected a finite number, found Infinity"),
        ("yaw", "1e999", r"line 3: Number out of range - at `\$\.yaw`"),
        ("yaw", 1e8, r"line 3: field 'yaw': expected -1e\+07 to 1e\+07, found 1e\+08"),
        ("yaw", None, r"line 3: Expected `float`, got `null` - at `\$\.yaw`"),
        ("hotbar", 9, r"line 3: field 'hotbar': expected 0 to 8, found 9"),
        ("hotbar", -1, r"line 3: field 'hotbar': expected 0 to 8, found -1"),
        ("isGuiOpen", 1, r"line 3: Expected `bool \| null`, got `int` - at `\$\.isGuiOpen`"),
        ("milli", "soon", r"line 3: Expected `float \| null`, got `str` - at `\$\.milli`"),
    ],
)
def test_bad_values_name_file_line_field_and_value(field, value, message):
    lines = still()
    lines[2][field] = value
    log = to_log(lines).replace(b'"1e999"', b"1e999")
    with pytest.raises(RecordingError, match=message):
        parse_recording(log, "rec.jsonl")


@pytest.mark.parametrize("field", ["yaw", "pitch"])
def test_missing_field(field):
    lines = still()
    del lines[4][field]
    with pytest.raises(RecordingError, match=rf"rec: line 5: Object missing required field `{field}`"):
        parse_recording(to_log(lines), "rec")


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize(
    ("field", "repair"), [("mouse", "null_mouse"), ("keyboard", "null_keyboard"), ("isGuiOpen", "null_gui")]
)
def test_a_field_that_some_lines_lack_is_repaired_and_counted_and_one_that_all_lack_is_an_error(field, repair, null):
    lines = still(6)
    for tick, line in enumerate(lines):
        line["mouse"]["dx"], line["keyboard"]["keys"], line["isGuiOpen"] = 3.0, ["key.keyboard.w"], tick == 3
        if tick in (0, 4):
            line.pop(field)
            if null:
                line[field] = None
    recording = parse_recording(to_log(lines), "rec")
    assert {name: count for name, count in recording.repairs.items() if count} == {repair: 2}
    absent = [tick in (0, 4) for tick in range(6)]
    assert recording.mouse_dx.tolist() == [0 if gone and field == "mouse" else 3 for gone in absent]
    assert pressed(recording, "key.w") == [not (gone and field == "keyboard") for gone in absent]
    # A GUI is as it was in the line before; closed at the start.
    assert np.flatnonzero(recording.gui_open).tolist() == ([3, 4] if field == "isGuiOpen" else [3])
    with pytest.raises(RecordingError, match=f"line 1: field '{field}': found n.*, and the repair '{repair}' is swit"):
        parse_recording(to_log(lines), "rec", skip_repairs=[repair])
    if null and field != "isGuiOpen":
        return  # null in all lines is no input: so the recorder writes lines that nobody plays
    for line in lines:
        line.pop(field, None)
        if null:
            line[field] = None
    with pytest.raises(RecordingError, match=f"rec: field '{field}': missing in all 6 lines"):
        parse_recording(to_log(lines), "rec")


def test_only_fields_that_are_read_must_decode():
    """A Windows code page in the text typed and in the names of statistics."""
    lines = still(3)
    for line in lines:
        line["keyboard"]["chars"], line["stats"] = "@@", {"minecraft.custom:@@": 4}
    log = to_log(lines)
    assert parse_recording(log.replace(b"@@", b"\xe9\xff"), "rec").num_ticks == 3
    with pytest.raises(RecordingError, match="line 1: broken JSON: expected UTF-8, found 0xff"):
        parse_recording(log.replace(b'"keys": []', b'"keys": ["key.keyboard.\xff"]'), "rec")


def test_keys_in_guis_are_pressed_as_logged_and_counted_where_they_move_nobody():
    lines = still(8)
    for tick, (keys, gui, inventory) in enumerate(
        [("w", 0, 0), ("wd", 1, 1), ("s", 1, 0), ("x", 1, 0), ("1", 1, 0), ("a", 1, None), ("", 1, 0), ("d", 0, 0)]
    ):
        lines[tick] |= {"isGuiOpen": bool(gui), "isGuiInventory": None if inventory is None else bool(inventory)}
        lines[tick]["keyboard"]["keys"] = [f"key.keyboard.{key}" for key in keys]
    recording = parse_recording(to_log(lines), "rec")
    counts = [recording.observed[f"movement_keys_in_{where}"] for where in ("inventory", "other_gui")]
    assert counts == [1, 2]
    assert pressed(recording, "key.w") == [True, True] + [False] * 6, "columns say what was pressed"


def test_keys_without_a_column_are_counted_by_name():
    lines = still(40)
    for tick, line in enumerate(lines):
        line["keyboard"]["keys"] = [f"key.keyboard.{name}" for name in ("w", f"f{tick}", *["t", "t"] * (tick < 5))]
    lines[7]["keyboard"]["keys"] = ["key.keyboard.F3", "<b>", "key.mouse.4"]
    recording = parse_recording(to_log(lines), "rec")
    assert recording.observed["other_keys"] == 40
    assert list(recording.other_keys.items())[:3] == [("t", 5), ("(other names)", 1), ("f0", 1)]
    assert len(recording.other_keys) == 32, "a log of many names is bounded"


def test_the_cursor_beyond_1280x720_is_counted():
    lines = still(7)
    at = [(0, 0), (1279.5, 719), (1280, 10), (10, 720), (-1, 5), (None, None), (9999, 9999)]
    for line, (x, y) in zip(lines, at, strict=True):
        line["isGuiOpen"] = True
        line["mouse"] |= {"x": x, "y": y}
    lines[6]["isGuiOpen"] = False
    observed = parse_recording(to_log(lines), "rec").observed
    assert (observed["cursor_outside"], observed["cursor_missing"]) == (3, 1)


def test_pauses_are_jumps_of_the_clocks():
    lines, steps = still(8), [(50, 1), (500, 10), (501, 1), (50, 11), (-70, 1), (9000, 180), (50, 1)]
    milli, server = 1_640_000_000_000, 100
    for tick, (line, (ms, ticks)) in enumerate(zip(lines, [(0, 0), *steps], strict=True)):
        milli, server = milli + ms, server + ticks
        line |= {"tick": tick + (tick > 6), "milli": milli, "serverTick": server}
    recording = parse_recording(to_log(lines), "rec")
    assert np.flatnonzero(recording.after_pause).tolist() == [3, 4, 6]
    names = ("pauses", "clock_backwards", "tick_gaps", "clock_missing")
    assert [recording.observed[name] for name in names] == [3, 1, 1, 0]
    for line in lines:
        del line["milli"], line["tick"]
    del lines[3]["serverTick"]
    recording = parse_recording(to_log(lines), "rec")
    assert np.flatnonzero(recording.after_pause).tolist() == [6] and recording.observed["clock_missing"] == 8


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (b"", "rec: expected one JSON line per frame, found an empty log"),
        (b"\n \n", "found an empty log"),
        (to_log(still(2)) + b'{"mouse"', "rec: line 3: broken JSON: "),
        (b"[1]\n", "rec: line 1: Expected `object`, got `array`"),
        (to_log(still(1)) + b"\n" + to_log(still(1)), "rec: line 2: expected a JSON object, found an empty line"),
    ],
)
def test_broken_logs(log, message):
    with pytest.raises(RecordingError, match=message):
        parse_recording(log, "rec")


def test_empty_lines_at_the_end_are_fine():
    assert parse_recording(to_log(still(4)) + b"\n\r\n", "rec").num_ticks == 4


def test_recorder_version():
    assert recorder_version_of("6.8/a.mp4") == "6.8" and recorder_version_of("x/data/5.7/a.mp4") == "5.7"
    assert recorder_version_of("a.mp4") is None and recorder_version_of("data/v6.8/a.mp4") is None
    assert sorted(["6.13", "10.0", "6.9", "8.2"], key=version_order) == ["6.9", "6.13", "8.2", "10.0"]
    assert version_order(None) < version_order("5.7")
