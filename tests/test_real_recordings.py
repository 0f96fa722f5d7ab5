"""Recordings as recorders write them: slots, missing fields, pauses, keys without a column, through the public ways."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from helpers_data import DATA, LUANTI, make_lines, make_video, to_log

from vjepa_ac_hf import ACTION_COLUMNS
from vjepa_ac_hf.console import report
from vjepa_ac_hf.inspection.recordings import describe, read_options, summarize
from vjepa_ac_hf.recordings.clips import ClipSpec, aggregate_actions
from vjepa_ac_hf.recordings.log import parse_recording
from vjepa_ac_hf.recordings.shards import Rejection

PROGRAMS = Path(__file__).resolve().parents[1] / "dataset_scripts"
NAME = "alder-swift-9be21c07a4d3-20220105-102330"
AT = {name: i for i, name in enumerate(ACTION_COLUMNS)}
SLOTS = slice(AT["hotbar.0"], AT["hotbar.8"] + 1)
NUMBERS = slice(AT["key.1"], AT["key.9"] + 1)


def lines_of(num_ticks=70, slots=None, keys=None, wheel=None):
    """Lines of a recorder in which nothing moves; slots by tick of the first line that shows them."""
    lines, slot = [], 0
    for tick in range(num_ticks):
        slot = (slots or {}).get(tick, slot)
        lines.append(
            {
                "mouse": {"x": 640.0, "y": 360.0, "dx": 0.0, "dy": 0.0, "dwheel": 0.0, "buttons": [], "newButtons": []},
                "keyboard": {"keys": [f"key.keyboard.{k}" for k in (keys or {}).get(tick, ())], "chars": ""},
                **{"isGuiOpen": False, "isGuiInventory": False, "hotbar": slot, "yaw": 0.0, "pitch": 0.0},
                **{"tick": tick, "milli": 1_640_000_000_000 + 50 * tick, "serverTick": 100 + tick, "stats": {}},
            }
        )
        lines[-1]["mouse"]["dwheel"] = (wheel or {}).get(tick, 0.0)
    return lines


def write(folder, lines, name=NAME):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_bytes(to_log(lines))
    (folder / f"{name}.mp4").write_bytes(make_video(len(lines)))
    return folder


def load(folder, tmp_path, streaming=False, **options):
    options = {"resolution": 32, "validation_fraction": 0, **options}
    options |= {"data_dir": str(folder), "split": "train", "cache_dir": str(tmp_path / "cache"), "streaming": streaming}
    found = load_dataset("vpt_tubelets", **options)
    return [np.asarray(row["actions"]) for row in found]


def build(folder, output, *options):
    command = [sys.executable, str(PROGRAMS / "build_vpt_tubelets.py"), "--shards", str(folder)]
    command += ["--output", str(output), "--resolution", "32", "--validation_fraction", "0", *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads((output / "report.json").read_text())


def keys_of(actions):
    return [[ACTION_COLUMNS[AT["key.1"] + i] for i in np.flatnonzero(action[NUMBERS])] for action in actions]


def test_a_slot_change_is_a_key_of_the_action_that_caused_it(tmp_path):
    """The wheel is turned in tick 7, key 5 goes down in tick 15; the lines after them show it."""
    lines = lines_of(slots={8: 1, 16: 4}, wheel={7: -1.0}, keys={15: "5"})
    folder = write(tmp_path / "in", lines)
    for streaming in (False, True):
        (actions,) = load(folder, tmp_path, streaming)
        assert keys_of(actions) == [["key.2"], ["key.5"], [], [], [], [], []]
        assert actions[:, SLOTS].argmax(axis=1).tolist() == [0, 1, 4, 4, 4, 4, 4]
    (actions,) = load(folder, tmp_path, hotbar_injection="vpt")
    assert keys_of(actions) == [[], ["key.2", "key.5"], ["key.5"], [], [], [], []]

    report = build(folder, tmp_path / "vpt", "--hotbar_injection", "vpt")
    assert report["options"]["hotbar_injection"] == "vpt" and report["repairs"]["hotbar_injected"] == 2
    assert "in the tick that shows (as OpenAI's loader has it) it" in (tmp_path / "vpt" / "README.md").read_text()
    (row,) = load_dataset(str(tmp_path / "vpt"), split="train", cache_dir=str(tmp_path / "c"))
    np.testing.assert_array_equal(np.asarray(row["actions"]), actions)
    with pytest.raises(ValueError, match=r"hotbar_injection must be one of \('cause', 'vpt'\), found 'openai'"):
        load(folder, tmp_path, hotbar_injection="openai")


def test_a_change_that_the_first_line_after_a_clips_actions_shows_is_in_its_last_action(tmp_path):
    """Line 56 is where the last action of a clip ends, and where the next clip begins with a stride of 56."""
    lines = lines_of(120, slots={56: 3, 117: 5}, wheel={55: -3.0, 116: -2.0})
    first, second = load(write(tmp_path / "in", lines), tmp_path, clip_stride=56)
    assert keys_of(first) == [[]] * 6 + [["key.4"]] and keys_of(second) == [[]] * 7
    assert second[0, SLOTS].argmax() == 3
    recording = parse_recording(to_log(lines[:57]), "rec")
    assert recording.pressed[55, 3] and recording.pressed.sum() == 1, "the log's last line has a change"


def test_a_recorder_before_6_11_that_logs_no_slot_is_used(tmp_path):
    lines = lines_of(134, keys={70: "9"}, wheel={3: 1.0, 81: -1.0})
    for tick, line in enumerate(lines):
        del line["hotbar"]
        line["isGuiOpen"] = 20 <= tick < 30
        line["mouse"]["dx"] = 10.0
    write(tmp_path / "in" / "6.9", lines)
    first, second = load(tmp_path / "in", tmp_path)
    assert not first[:, SLOTS].any() and keys_of(first) == [[]] * 7, "not known: no slot, least of all slot 0"
    assert [np.flatnonzero(row).tolist() for row in second[:, SLOTS]] == [[], [8], [8], [0], [0], [0], [0]]
    assert keys_of(second) == [["key.9"], [], ["key.1"], [], [], [], []]
    # 6.7 to 6.9 log half of the mouse's movement in GUIs.
    assert first[:, 0].tolist() == [80, 80, 120, 140, 80, 80, 80]

    report = build(tmp_path / "in", tmp_path / "out")
    assert (report["accepted"], report["rejected"]) == (1, [])
    assert {name: count for name, count in report["repairs"].items() if count} == {
        **{"no_hotbar": 134, "hotbar_injected": 1, "mouse_scaled": 10}
    }
    assert report["observed"]["slot_unknown"] == 71 and report["per_recording"][0]["observed"]["slot_unknown"] == 71


def test_what_is_doubtful_is_in_the_report(tmp_path):
    lines = lines_of(200, keys={5: ["f3", "w"], 6: ["f3"], 40: ["t"], 41: ["w", "h"], 150: ["d"]})
    for tick, line in enumerate(lines):
        line["isGuiOpen"] = 40 <= tick < 60
        line["milli"] += 4000 * (tick >= 70) + 8000 * (tick >= 62)  # one pause in the second clip, one between clips
        line["mouse"]["x"] = 1500.0 if tick in (45, 46) else 640.0
    report = build(write(tmp_path / "in", lines), tmp_path / "out", "--draw_cursor")
    assert report["clips"] == 3 and report["observed"] == {
        **dict.fromkeys(report["observed"], 0),
        **{"movement_keys_in_other_gui": 1, "cursor_outside": 2, "other_keys": 4, "pauses": 2, "clips_over_pause": 1},
    }
    assert report["other_keys"] == {"f3": 2, "h": 1, "t": 1}
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| clips_over_pause | 1 |" in page and "| f3 | 2 |" in page


def test_slot_changes_of_play_lie_in_the_action_of_their_cause():
    """The trimmed recording: for every change, what the raw log holds in the tick before it is its cause."""
    log = (DATA / f"{LUANTI}.jsonl").read_bytes()
    lines = [json.loads(line) for line in log.splitlines()]
    recording = parse_recording(log, LUANTI)
    spec = ClipSpec(frames_per_clip=4)
    starts = np.arange(0, len(lines) - spec.span, 8)
    actions = aggregate_actions(recording, starts, spec)[:, 0]
    caused = set()
    for before, line, tick in zip(lines, lines[1:], range(len(lines)), strict=False):
        if line["hotbar"] != before["hotbar"]:
            key = f"key.keyboard.{line['hotbar'] + 1}"
            assert key in before["keyboard"]["keys"] or before["mouse"]["dwheel"] != 0
            caused.add((tick // 8, line["hotbar"]))
    held = {
        (tick // 8, number)
        for tick, line in enumerate(lines)
        for number in range(9)
        if f"key.keyboard.{number + 1}" in line["keyboard"]["keys"]
    }
    found = set(map(tuple, np.argwhere(actions[:, NUMBERS]).tolist()))
    assert found == {pair for pair in caused | held if pair[0] < len(actions)} and len(caused) >= 5


@pytest.fixture
def run_check(monkeypatch, capsys):
    """The program in this process: status, what it prints, its errors."""

    def run(*arguments):
        spec = importlib.util.spec_from_file_location("check_recordings", PROGRAMS / "check_recordings.py")
        program = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "check_recordings", program)
        spec.loader.exec_module(program)
        monkeypatch.setattr(sys, "argv", ["check_recordings.py", *map(str, arguments)])
        try:
            status = program.main()
        except (OSError, ValueError) as error:
            status = report(error)  # as the interpreter does for an uncaught one
        return status, *capsys.readouterr()

    return run


def test_a_folder_of_recordings_is_counted(run_check, tmp_path):
    folder = tmp_path / "in"
    old = lines_of(60, keys={3: "2", 9: ["f3"]})
    for tick, line in enumerate(old):
        del line["hotbar"]
        line["mouse"]["dx"], line["yaw"], line["isGuiOpen"] = 4.0, 0.6 * min(tick, 30), tick >= 30
        line["mouse"]["x"] = 640.0 + 8.0 * max(tick - 30, 0)  # GUI movement is logged by half
    write(folder / "6.9", old)
    (folder / "6.9" / f"{NAME}-options.json").write_text('{"guiScale": 2, "windowWidth": 1280, "windowHeight": 720}')
    new = "birch-test-0c1d2e3f4a5b-20220105-102330"
    write(folder / "7.1", lines_of(40, slots={8: 1, 20: 2, 30: 7}, wheel={7: -1.0, 20: -1.0}), new)
    (folder / "7.1" / f"{new}-options.json").write_text("nothing")
    lost = copy.deepcopy(old)
    del lost[20]["yaw"]
    write(folder / "7.1", lost, "cedar-wren-0c1d2e3f4a5c-20220105-102330")
    (folder / "7.1" / "alone-0c1d2e3f4a5c-20220105-102330.jsonl").write_bytes(to_log(old))

    status, text, errors = run_check("--shards", folder, "--output", tmp_path / "out")
    assert status == 0, errors
    found = json.loads((tmp_path / "out" / "recordings.json").read_text())
    every, versions = found["all"], found["versions"]
    assert (every["recordings"], every["usable"], every["ticks"]) == (4, 2, 100)
    lacks = "Object missing required field `yaw`"
    assert sorted(every["rejected"].values()) == [1, 1] and every["rejected"][lacks] == 1
    assert {n: c for n, c in every["repairs"].items() if c["number"]} == {
        "no_hotbar": {"number": 60, "recordings": 1},
        "mouse_scaled": {"number": 30, "recordings": 1},
        "hotbar_injected": {"number": 3, "recordings": 1},
    }
    changes = {n[13:]: c["number"] for n, c in every["observed"].items() if n.startswith("slot_changes")}
    assert changes == {"by_key": 0, "by_wheel": 1, "late": 1, "unexplained": 1}
    assert every["other_keys"] == {"f3": 1} and every["extra_frames"] == {"0": 2}
    assert every["windows"] == {"1280x720": 1, "NonexNone": 1} and every["gui_scales"] == {"2": 1, "None": 1}
    assert list(versions) == ["6.9", "7.1"] and versions["7.1"]["rejected"] == {lacks: 1}
    assert versions["6.9"]["degrees_per_pixel"] == [0.15] * 3 and versions["6.9"]["cursor_per_pixel"] == [1.0] * 3
    assert versions["7.1"]["cursor_per_pixel"] is None
    for line in ("2 of 4 recordings can be used", "slot_changes_late", "f3: 1", "(logged x2)"):
        assert line in text, text
    status, text, _ = run_check("--shards", folder, "--no_video", "--limit", 1)
    assert status == 0 and "1 of 2 recordings can be used, 60 ticks" in text
    status, _, errors = run_check("--shards", tmp_path / "nothing")
    assert status == 1 and "error: --shards " in errors


@pytest.mark.slow
def test_processes_count_the_same(run_check, tmp_path):
    for version, name in (("6.9", "a"), ("7.1", "b"), ("7.1", "c")):
        write(tmp_path / "in" / version, make_lines(30, seed=ord(name)), name)
    assert run_check("--shards", tmp_path / "in", "--output", tmp_path / "one")[0] == 0
    command = [sys.executable, str(PROGRAMS / "check_recordings.py"), "--shards", str(tmp_path / "in")]
    result = subprocess.run(
        [*command, "--output", str(tmp_path / "two"), "--num_proc", "2"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "two" / "recordings.json").read_text() == (tmp_path / "one" / "recordings.json").read_text()


def test_nothing_at_all_can_be_described(tmp_path):
    text = describe(summarize([], [Rejection(None, "s.tar", "unreadable tar: truncated")]))
    assert text.startswith("0 of 1 recordings can be used") and "unreadable tar" in text
    assert read_options(str(tmp_path / "a.jsonl")) is None


def test_make_lines_have_no_clock():
    """Logs without `milli` are read; how many lines lack it is counted."""
    assert parse_recording(to_log(make_lines(30)), "rec").observed["clock_missing"] == 30
