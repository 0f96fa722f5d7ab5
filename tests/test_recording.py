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


def test_wheel_change_of_slot_counts_as_the_number_key():
    lines = still(4)
    for tick, slot in enumerate((0, 8, 8, 2)):
        lines[tick]["hotbar"] = slot
    lines[3]["keyboard"]["keys"] = ["key.keyboard.3"]
    recording = parse_recording(to_log(lines), "a")
    assert pressed(recording, "key.9") == [False, True, False, False]
    assert pressed(recording, "key.3") == [False, False, False, True]
    assert recording.repairs["hotbar_injected"] == 1, "a key that was down needs no repair"


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
        ("isGuiOpen", 1, r"line 3: Expected `bool`, got `int` - at `\$\.isGuiOpen`"),
    ],
)
def test_bad_values_name_file_line_field_and_value(field, value, message):
    lines = still()
    lines[2][field] = value
    log = to_log(lines).replace(b'"1e999"', b"1e999")
    with pytest.raises(RecordingError, match=message):
        parse_recording(log, "rec.jsonl")


@pytest.mark.parametrize("field", ["yaw", "pitch", "hotbar", "mouse", "keyboard", "isGuiOpen"])
def test_missing_field(field):
    lines = still()
    del lines[4][field]
    with pytest.raises(RecordingError, match=rf"rec: line 5: Object missing required field `{field}`"):
        parse_recording(to_log(lines), "rec")


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
