"""Action histograms against a loop over intervals; the data-set report against hand-computed numbers."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers_clips import FEATURES, write_clips
from helpers_data import ORACLE_COLUMNS, name_of, oracle_actions, write_recording
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_build_scripts import build, run

from vjepa_ac_hf import ACTION_COLUMNS
from vjepa_ac_hf.inspection.columns import ClipFiles
from vjepa_ac_hf.inspection.summary import (
    BIN_EDGES,
    ActionHistograms,
    bin_labels,
    dataset_summary,
    summary_markdown,
    summary_tables,
)

CONTINUOUS = {"mouse_dx": "pixels", "mouse_dy": "pixels", "yaw_delta": "degrees", "pitch_delta": "degrees"}


# ------------------------------------------------------------------------------------------------- histograms

at_edges = st.sampled_from([sign * edge for edges in BIN_EDGES.values() for edge in (0.0, *edges) for sign in (1, -1)])
values = st.one_of(st.floats(-3000, 3000, width=32), at_edges, st.just(0.0))


@st.composite
def action_arrays(draw):
    number = draw(st.integers(0, 12))
    actions = np.zeros((number, 38), np.float32)
    actions[:, :4] = draw(arrays.arrays(np.float32, (number, 4), elements=values.map(np.float32)))
    actions[:, 4:] = draw(arrays.arrays(np.bool_, (number, 34)))
    return actions


def intervals(unit):
    """(low, low is in, high, high is in) of every bin, from the definition in the documentation."""
    edges = [0.0, *BIN_EDGES[unit], float("inf")]
    positive = [(low, low != 0, high, False) for low, high in itertools.pairwise(edges)]
    negative = [(-high, False, -low, low != 0) for low, high in itertools.pairwise(edges)]
    return [*reversed(negative), (0.0, True, 0.0, True), *positive]


def brute_force(actions):
    histograms = {column: [0] * len(intervals(unit)) for column, unit in CONTINUOUS.items()}
    pressed = dict.fromkeys(ACTION_COLUMNS[4:], 0)
    for action in actions:
        for column, value in zip(ACTION_COLUMNS, action.tolist(), strict=True):
            if column in pressed:
                pressed[column] += value == 1
                continue
            hits = [
                index
                for index, (low, low_in, high, high_in) in enumerate(intervals(CONTINUOUS[column]))
                if (low < value or (low_in and value == low)) and (value < high or (high_in and value == high))
            ]
            assert len(hits) == 1, (value, hits)
            histograms[column][hits[0]] += 1
    return {"histograms": histograms, "pressed": pressed, "actions": len(actions)}


@settings(max_examples=60, deadline=None)
@given(action_arrays())
def test_histograms_equal_a_loop_over_intervals(actions):
    found = ActionHistograms().update(actions).to_dict()
    expected = brute_force(actions)
    assert {key: found[key] for key in expected} == expected
    for column in CONTINUOUS:
        assert sum(found["histograms"][column]) == len(actions)


@settings(max_examples=60, deadline=None)
@given(action_arrays(), st.data())
def test_histograms_do_not_depend_on_order_and_parts(actions, data):
    whole = ActionHistograms().update(actions)
    shuffled = actions[data.draw(st.permutations(range(len(actions))))] if len(actions) else actions
    cuts = sorted(data.draw(st.lists(st.integers(0, len(actions)), max_size=4)))
    parts = [ActionHistograms().update(part) for part in np.split(shuffled, cuts)]
    merged = ActionHistograms()
    for part in data.draw(st.permutations(parts)):
        merged.merge(ActionHistograms.from_dict(json.loads(json.dumps(part.to_dict()))))
    assert merged == whole and merged.to_dict() == whole.to_dict()
    one_by_one = ActionHistograms()
    for action in shuffled:
        one_by_one.update(action)
    assert one_by_one == whole


def test_shapes_of_clips_and_batches_count_alike():
    actions = np.random.default_rng(0).integers(0, 2, (5, 7, 38)).astype(np.float32)
    whole = ActionHistograms().update(actions)
    by_clip = ActionHistograms()
    for clip in actions:
        by_clip.update(clip)
    assert whole == by_clip and whole.count == 35 and whole.pressed("key.w") == actions[..., 13].sum()
    assert whole != ActionHistograms().update(actions[:4])


def test_known_values_are_in_the_bins_with_their_names():
    actions = np.zeros((6, 38), np.float32)
    actions[:, 0] = [0, 1, -1, 1.5, 2, -2500]
    actions[:, 2] = [0, 0.1, 0.15, -179, 90, 0.05]
    histograms = ActionHistograms().update(actions)
    pixels = dict(zip(bin_labels("pixels"), histograms.bins("mouse_dx"), strict=True))
    degrees = dict(zip(bin_labels("degrees"), histograms.bins("yaw_delta"), strict=True))
    expected = {"0": 1, "1 to 2": 2, "−(1 to 2)": 1, "2 to 5": 1, "−(2000 or more)": 1}
    assert {label: count for label, count in pixels.items() if count} == expected
    # 0.1 in float32 is a little more than 0.1.
    expected = {"0": 1, "under 0.1": 1, "0.1 to 0.2": 2, "−(90 or more)": 1, "90 or more": 1}
    assert {label: count for label, count in degrees.items() if count} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, np.nan), "not finite"),
        ((3, np.inf), "not finite"),
        ((13, 0.5), "'key.w': expected 0 or 1, found 0.5"),
        ((37, np.nan), "'gui_open': expected 0 or 1, found nan"),
        ((28, -1), "'hotbar.0': expected 0 or 1, found -1"),
    ],
)
def test_values_that_are_no_actions_are_refused_and_not_counted(change, message):
    actions = np.zeros((7, 38), np.float32)
    actions[4, change[0]] = change[1]
    histograms = ActionHistograms()
    with pytest.raises(ValueError, match=message):
        histograms.update(actions)
    assert histograms == ActionHistograms()
    with pytest.raises(ValueError, match=r"all 38 action columns, found shape \(7, 13\)"):
        histograms.update(np.zeros((7, 13)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("pressed"), r"lack the fields \['pressed'\]"),
        (lambda d: d["edges"].update(pixels=[1, 2]), "have the edges"),
        (lambda d: d["histograms"].pop("mouse_dx"), "histograms is of the columns"),
        (lambda d: d["histograms"]["mouse_dy"].pop(), "mouse_dy: expected 25 counts that add up to 3, found 24"),
        (lambda d: d.update(actions=4), "add up to 4, found 25 that add up to 3"),
        (lambda d: d["pressed"].update({"key.w": 9}), "pressed must be from 0 to 3"),
    ],
)
def test_files_that_hold_something_else_are_refused(change, message):
    content = ActionHistograms().update(np.zeros((3, 38))).to_dict()
    change(content)
    with pytest.raises(ValueError, match=message):
        ActionHistograms.from_dict(content)


# ---------------------------------------------------------------------------------------------------- summary


def hand_report():
    recordings = [
        {
            "recording": "a-1",
            "session": "a-1",
            "player": "a",
            "shard": "x.tar",
            "split": "train",
            "ticks": 36000,
            "gui_ticks": 9000,
        }
        | {"shard": "x.tar", "clips": 3, "repairs": {"null_mouse": 5}, "skipped_clips": {"max_gui_fraction": 2}},
        {
            "recording": "a-2",
            "session": "a-2",
            "player": "a",
            "shard": "x.tar",
            "split": "train",
            "ticks": 18000,
            "gui_ticks": 0,
        }
        | {"shard": "x.tar", "clips": 0, "repairs": {}, "skipped_clips": {"max_gui_fraction": 4}},
        {
            "recording": "b-1",
            "session": "b-1",
            "player": "b",
            "shard": "y.tar",
            "split": "validation",
            "ticks": 18000,
            "gui_ticks": 9000,
        }
        | {"shard": "y.tar", "clips": 4, "repairs": {"null_mouse": 1, "frames_timed": 2}, "skipped_clips": {}},
    ]
    actions = np.zeros((7, 7, 38), np.float32)
    actions[:2, 0, 13] = 1  # w in 2 of 49 actions
    actions[0, :, 37] = 1  # a GUI in 7 of them
    return {
        "recordings": 8,
        "accepted": 3,
        "clips": 7,
        "rejected": [
            {"recording": "c-1", "shard": "x.tar", "reason": "c-1.jsonl: line 7: broken JSON: unexpected end"},
            {"recording": "c-2", "shard": "y.tar", "reason": "c-2.jsonl: line 9: broken JSON: unexpected character"},
            {"recording": "c-3", "shard": "y.tar", "reason": "missing .mp4"},
            {"recording": None, "shard": "z.tar", "reason": "unreadable tar: damaged; all of it is lost"},
        ],
        "repairs": {"null_mouse": 6, "frames_timed": 2, "stuck_attack": 0},
        "skipped_clips": {"max_gui_fraction": 6},
        "skipped_recordings": {"exclude": 2},
        "other_files": 1,
        "per_recording": recordings,
        "splits": {
            "train": {"clips": 3, "recordings": 2, "players": ["a", "c"], "sessions": ["a-1", "a-2", "c-1"]},
            "validation": {"clips": 4, "recordings": 1, "players": ["b"], "sessions": ["b-1"]},
        },
        "options": {
            "clip": {"native_fps": 20, "fps": 5, "frames_per_clip": 16, "tubelet_size": 2, "clip_stride": None}
        },
        "actions": ActionHistograms().update(actions).to_dict(),
    }


def test_summary_equals_hand_computed_numbers():
    summary = dataset_summary(hand_report(), num_bytes={"train": 300, "validation": 40})
    assert summary["recordings"] == {"found": 8, "accepted": 3, "rejected": 3, "skipped": {"exclude": 2}}
    assert summary["players"] == summary["sessions"] == 2  # neither c nor a's second session has a clip
    assert summary["hours"]["recordings"] == pytest.approx(1.0)  # 72,000 ticks of 50 ms
    assert summary["hours"]["clips"] == pytest.approx(7 * 3.2 / 3600)
    assert summary["gui"] == {"ticks": 0.25, "actions": pytest.approx(7 / 49)}
    assert summary["splits"]["train"] | {"hours": None} == {
        **{"players": 1, "sessions": 1, "recordings": 1, "clips": 3},
        **{"hours": None, "bytes": 300},
    }
    assert summary["repairs"]["null_mouse"] == {"ticks": 6, "recordings": 2}
    assert summary["repairs"]["stuck_attack"] == {"ticks": 0, "recordings": 0}
    assert list(summary["rejected"].items()) == [("broken JSON", 2), ("missing .mp4", 1), ("unreadable tar", 1)]
    assert summary["pressed"]["key.w"] == pytest.approx(2 / 49) and summary["bytes"] == 340


def test_markdown_for_the_card_comes_from_the_report_alone():
    text = summary_markdown(json.loads(json.dumps(hand_report())))
    for line in (
        "| recordings found | 8 |",
        "| hours of accepted recordings | 1.00 |",
        "| GUI open, share of ticks | 25.00 % |",
        "| validation | 1 | 1 | 1 | 4 | 0.00 | not recorded |",
        "| broken JSON | 2 |",
        "| null_mouse | 6 | 2 |",
        "| max_gui_fraction | clips | 6 |",
        "| exclude | recordings | 2 |",
        "| key.w | 4.08 % |",
        "| 0 | 49 | 49 |",
    ):
        assert line in text.splitlines(), line


def test_reports_of_older_data_sets_say_what_they_lack():
    older = hand_report()
    for field in ("per_recording", "options", "actions", "skipped_recordings"):
        del older[field]
    summary = dataset_summary(older)
    assert summary["hours"] == {"recordings": None, "clips": None} and summary["actions"] is None
    assert summary["splits"]["train"]["sessions"] == 3  # what the report says is all there is
    text = summary_markdown(older)
    assert "| hours of accepted recordings | not recorded |" in text and "| null_mouse | 6 | not recorded |" in text
    assert "key.w" not in text
    del older["splits"]
    with pytest.raises(ValueError, match=r"report.json lacks the fields \['splits'\]"):
        dataset_summary(older)


def test_rare_is_not_never():
    report = hand_report()
    report["actions"] = ActionHistograms().update(np.eye(1, 38, 13)).to_dict()
    histograms = ActionHistograms.from_dict(report["actions"])
    histograms.update(np.zeros((99_999, 38), np.float32))
    rows = dict(next(t for t in summary_tables(dataset_summary(report, histograms)) if t[0].startswith("Share"))[2])
    assert rows["key.w"] == "0.001 %" and rows["key.a"] == "0.00 %"


# ---------------------------------------------------------------------------------------------------- program


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """Built from three recordings: two sessions with clips, one too short."""
    folder = tmp_path_factory.mktemp("summary")
    lines = {}
    for session, ticks, seed in (("s0", 200, 0), ("s1", 130, 1), ("s2", 50, 2)):
        lines[name_of(session)] = write_recording(folder / "in", name_of(session), ticks, seed)
    code, _, err = build(folder / "in", folder / "built", "--validation_players", "silly-s1")
    assert code == 0, err
    return folder, lines


def table_of(page, title):
    """Rows of the table below a heading, as lists of text."""
    section = page.split(f"<h2>{title}</h2>")[1].split("</section>")[0]
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", section)]


def report(data, output):
    return run("report_dataset.py", "--dataset", data, "--output", output)


def test_report_of_a_built_data_set(data_set, tmp_path):
    folder, lines = data_set
    code, out, err = report(folder / "built", tmp_path)
    assert code == 0 and "5 clips, 2 players, 2 sessions, 35 actions" in out, err
    clips = [(name_of("s0"), start) for start in (0, 64, 128)] + [(name_of("s1"), start) for start in (0, 64)]
    actions = np.concatenate([oracle_actions(lines[name], start) for name, start in clips])
    summary = json.loads((tmp_path / "summary.json").read_text())
    for index, column in enumerate(ORACLE_COLUMNS):
        assert summary["actions"]["pressed"][column] == actions[:, 4 + index].sum(), column
    assert summary["actions"]["histograms"] == brute_force(actions)["histograms"]
    gui_ticks = sum(line["isGuiOpen"] for name in (name_of("s0"), name_of("s1")) for line in lines[name])
    assert summary["gui"] == {"ticks": gui_ticks / 330, "actions": pytest.approx(actions[:, 37].mean())}
    assert summary["hours"]["recordings"] == pytest.approx(330 / 20 / 3600)
    files = sorted((folder / "built/data").iterdir())
    assert summary["bytes"] == sum(file.stat().st_size for file in files)
    page = (tmp_path / "report.html").read_text()
    assert table_of(page, "Rejected, by reason")[1:] == [["too short", "1"]]
    contents = dict(table_of(page, "Contents")[1:])
    assert contents["recordings found"] == "3" and contents["clips"] == "5"
    assert [row[:5] for row in table_of(page, "Splits")[1:]] == [
        ["train", "1", "1", "1", "3"],
        ["validation", "1", "1", "1", "2"],
    ]
    repairs = {row[0]: row[1:] for row in table_of(page, "Repairs")[1:]}
    nulls = {name: sum(line["mouse"] is None for line in log) for name, log in lines.items() if len(log) > 60}
    assert repairs["null_mouse"] == [str(sum(nulls.values())), "2"]
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:|index.html)', page)
    assert (tmp_path / "actions.png").read_bytes()[:4] == (tmp_path / "pressed.png").read_bytes()[:4] == b"\x89PNG"


def test_report_that_contradicts_the_files_is_an_error_and_still_written(data_set, tmp_path):
    shutil.copytree(data_set[0] / "built", tmp_path / "built")
    told = json.loads((tmp_path / "built/report.json").read_text())
    told["splits"]["train"]["clips"] = 9
    told["splits"]["validation"]["players"] = ["silly-s7"]
    told["actions"] = ActionHistograms().update(np.zeros((3, 38))).to_dict()
    (tmp_path / "built/report.json").write_text(json.dumps(told))
    code, _, err = report(tmp_path / "built", tmp_path / "out")
    assert code == 1
    assert "Split train: report.json counts 9 clips, the files hold 3." in err
    assert "1 players of the files are not in report.json; the first is silly-s1" in err
    assert "histograms of report.json are not those of the files" in err
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert len(summary["notes"]) == 3 and summary["splits"]["train"]["clips"] == 3


def test_players_in_two_splits_are_leakage(tmp_path):
    write_clips(tmp_path / "clips", train=3, validation=0)
    file = tmp_path / "clips/data/train-00000-of-00001.parquet"
    shutil.copy(file, file.with_name("validation-00000-of-00001.parquet"))
    (tmp_path / "clips/report.json").write_text(
        json.dumps(
            {"recordings": 1, "accepted": 1, "clips": 6, "rejected": [], "repairs": {}}
            | {
                "splits": {
                    s: {"clips": 3, "recordings": 1, "players": ["toy-0000"], "sessions": ["toy-0000-20260101"]}
                    for s in ("train", "validation")
                }
            }
        )
    )
    code, _, err = report(tmp_path / "clips", tmp_path / "out")
    assert code == 1 and "1 players are in both train and validation, which is leakage; the first is toy-0000" in err


def test_data_set_without_report(tmp_path):
    write_clips(tmp_path / "clips", train=4, validation=2)
    code, out, err = report(tmp_path / "clips", tmp_path / "out")
    assert code == 0 and "6 clips, 3 players, 3 sessions, 42 actions" in out, err
    assert "There is no report.json" in (tmp_path / "out/report.html").read_text()


def test_errors_have_what_was_found(tmp_path):
    write_clips(tmp_path / "clips", train=3, validation=0)
    file = tmp_path / "clips/data/train-00000-of-00001.parquet"
    table = pq.read_table(file)

    def message(changed, data=tmp_path / "clips", output=tmp_path / "out"):
        if changed is not None:
            pq.write_table(changed, file)
        code, _, err = report(data, output)
        assert code == 1 and "Traceback" not in err
        return err.splitlines()[-1]

    assert "columns ['actions'] are missing, found" in message(table.drop_columns(["actions"]))
    assert "split 'train' holds no clips: 0 rows" in message(table.slice(0, 0))
    wide = table.set_column(1, "actions", [[[[0.0] * 13] * 7]] * 3)
    assert "expected 38 values an action" in message(wide) and "found [13] values and [7] actions" in message(wide)
    flat = table.set_column(1, "actions", [[1.0, 2.0, 3.0]])
    assert "column 'actions': expected lists of lists of numbers, found double" in message(flat)
    empty = table.set_column(1, "actions", [[None] * 3])
    assert "column 'actions'" in message(empty)
    file.write_bytes(b"no parquet")
    assert "not a Parquet file, or a damaged one" in message(None)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in message(None, data=tmp_path / "empty")
    pq.write_table(table, file)
    (tmp_path / "taken").write_text("x")
    assert "taken" in message(None, output=tmp_path / "taken")
    (tmp_path / "clips/report.json").write_text("[1]")
    assert "report.json: expected a JSON object, found list" in message(None)


def test_files_by_split(tmp_path):
    write_clips(tmp_path / "clips", train=3, validation=2)
    assert list(ClipFiles(str(tmp_path / "clips")).files) == ["train", "validation"]
    assert list(ClipFiles(str(tmp_path / "clips"), ["validation"]).files) == ["validation"]
    with pytest.raises(ValueError, match=r"no split 'test', found \['train', 'validation'\]"):
        ClipFiles(str(tmp_path / "clips"), ["test"])
    assert set(FEATURES) == set(pq.read_schema(tmp_path / "clips/data/train-00000-of-00001.parquet").names)


def test_documented_edges_are_those_that_are_used():
    text = (Path(__file__).parent.parent / "docs/data.md").read_text()
    for unit, edges in BIN_EDGES.items():
        listed = re.search(rf"^\| {unit} \(.*?\) \| (.*) \|$", text, re.MULTILINE)[1]
        assert [float(edge) for edge in listed.split(", ")] == list(edges)
