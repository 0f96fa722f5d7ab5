"""`pack_shards.py` and `build_vpt_tubelets.py` through their command lines."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import struct
import sys
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
import python_forks
from datasets import load_dataset
from helpers_build import assert_same_files, contents, fork_build, status_of
from helpers_data import make_lines, make_video, name_of, oracle_actions, to_log, write_recording, write_shard
from test_vpt_tubelets import assert_same_rows

from vjepa_ac_hf import ActionStatistics
from vjepa_ac_hf.console import report
from vjepa_ac_hf.inspection.summary import ActionHistograms, summary_markdown
from vjepa_ac_hf.recordings.shards import MISSING

SCRIPTS = Path(__file__).parent.parent / "dataset_scripts"


def run_process(script, *arguments):
    process = python_forks.run([SCRIPTS / script, *arguments])
    return process.returncode, process.stdout, process.stderr


def run(script, *arguments):
    """The program's `main` in this process: the package's imports take longer than these builds."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", [script, *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            code = runpy.run_path(str(SCRIPTS / script))["main"]()
        except SystemExit as stop:
            code = stop.code
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            code = report(error)  # as the interpreter does for an uncaught one
    return code, out.getvalue(), err.getvalue()


def build(shards, output, *options):
    return run("build_vpt_tubelets.py", "--shards", shards, "--output", output, "--resolution", 32, *options)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Six recordings of four sessions, one of them too short, packed two a shard."""
    folder = tmp_path_factory.mktemp("packed")
    lines = {}
    for index, (session, segment) in enumerate([("s0", 0), ("s0", 1), ("s1", 0), ("s2", 0), ("s3", 0), ("s3", 1)]):
        name = name_of(session, segment)
        lines[name] = write_recording(folder / "in/6.8", name, 50 if (session, segment) == ("s3", 1) else 130, index)
    (folder / "in/6.8/lonely.mp4").write_bytes(b"x")
    code, out, err = run(
        "pack_shards.py", "--input", folder / "in", "--output", folder / "out", "--recordings_per_shard", 2
    )
    assert code == 0, err
    assert "6 recordings in 3 shards, 3 written, 1 files unpaired" in out and "6.8/lonely: missing .jsonl" in out
    return folder, lines


@pytest.fixture(scope="module")
def built(packed):
    folder, _ = packed
    output = folder / "built"
    options = ("--resolution", 32, "--num_proc", 2, "--validation_players", "silly-s1")
    result = run("build_vpt_tubelets.py", "--shards", folder / "out/*.tar", "--output", output, *options)
    assert result[0] == 0, result[2]
    return output


@pytest.mark.parametrize("num_proc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_messages_have_lines_of_their_own_beside_the_progress_bar(packed, tmp_path, num_proc):
    options = ("--output", tmp_path / "built", "--resolution", 32, "--num_proc", num_proc)
    code, _, err = run_process("build_vpt_tubelets.py", "--shards", packed[0] / "out/*.tar", *options)
    assert code == 0 and "recording/s" in err and "WARNING no validation split: 0.05 of 4 players" in err, err
    assert "validation has" not in err  # said once
    before, after = err.split(f"WARNING rejected {name_of('s3', 1)}")
    assert before[-1] in "\r\n" and "recording/s" not in after.split("\n")[0]


def test_shards_have_pairs_side_by_side_and_are_deterministic(packed):
    folder, _ = packed
    shards = sorted((folder / "out").glob("*.tar"))
    with tarfile.open(shards[0]) as archive:
        members = archive.getmembers()
    stem = "6.8/" + name_of("s0")
    assert [member.name for member in members[:2]] == [f"{stem}.mp4", f"{stem}.jsonl"]
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
    before = [shard.read_bytes() for shard in shards]
    times = [shard.stat().st_mtime_ns for shard in shards]
    command = ("pack_shards.py", "--input", folder / "in", "--output", folder / "out", "--recordings_per_shard", 2)
    assert "0 written" in run(*command)[1]
    assert [shard.stat().st_mtime_ns for shard in shards] == times
    shards[1].unlink()
    assert "1 written" in run(*command)[1]
    assert [shard.read_bytes() for shard in shards] == before
    assert json.loads((folder / "out/pack_report.json").read_text()) == {
        "recordings": 6,
        "shards": 3,
        "unpaired": [{"recording": "6.8/lonely", "reason": MISSING[".jsonl"]}],
    }


def test_pack_refuses_an_empty_input_and_shards_of_another_packing(packed, tmp_path):
    folder, _ = packed
    code, _, err = run("pack_shards.py", "--input", tmp_path, "--output", tmp_path / "out")
    assert code == 1 and "no pair of .mp4 and .jsonl below" in err
    code, _, err = run("pack_shards.py", "--input", folder / "in", "--output", folder / "out")
    assert code == 1 and "shard-000001.tar; remove them" in err


def test_built_rows_equal_oracle_and_builder(packed, built, tmp_path):
    folder, lines = packed
    data = load_dataset(str(built), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 8, "validation": 2}
    for row in data["train"]:
        expected = oracle_actions(lines[row["recording_id"]], row["start_tick"], gui_scale=2.0)
        np.testing.assert_allclose(np.asarray(row["actions"]), expected, rtol=0, atol=1e-4)
    direct = load_dataset(
        "vpt_tubelets",
        data_files=str(folder / "out/*.tar"),
        resolution=32,
        validation_players=["silly-s1"],
        cache_dir=str(tmp_path / "cache"),
    )
    streamed = load_dataset(str(built), streaming=True)
    for split in data:
        assert data[split].features == direct[split].features
        assert_same_rows(data[split], direct[split])
        assert_same_rows(streamed[split], direct[split])


def test_results_beside_the_data(packed, built):
    _, lines = packed
    report = json.loads((built / "report.json").read_text())
    assert (report["recordings"], report["accepted"], report["clips"]) == (6, 5, 10)
    reason = f"{name_of('s3', 1)}: too short: one clip needs 61 ticks, found 50"
    assert report["rejected"] == [{"recording": name_of("s3", 1), "shard": "shard-000002.tar", "reason": reason}]
    assert report["repairs"]["null_mouse"] == sum(
        line["mouse"] is None for name, log in lines.items() if len(log) > 60 for line in log
    )
    size = sum(file.stat().st_size for file in (built / "data").glob("validation-*"))
    expected = {"clips": 2, "recordings": 1, "players": ["silly-s1"], "sessions": ["silly-s1-20220101"], "bytes": size}
    assert report["splits"]["validation"] == expected
    total = sum(file.stat().st_size for file in (built / "data").glob("*.parquet"))
    assert report["split"] == {
        **{"split_by": "player", "validation_players": ["silly-s1"], "validation_sessions": None},
        **{"validation_fraction": None, "wanted": None, "warning": None},
        "reached": {"clips": 0.2, "recordings": 0.2, "players": 0.25, "sessions": 0.25, "bytes": size / total},
    }
    actions = [
        oracle_actions(log, start, gui_scale=2.0)
        for name, log in lines.items()
        for start in (0, 64)
        if "s1" not in name and len(log) > 60
    ]
    every_action = [
        oracle_actions(log, start, gui_scale=2.0) for log in lines.values() for start in (0, 64) if len(log) > 60
    ]
    rows = np.concatenate(actions)[:, :4].astype(np.float64)
    statistics = ActionStatistics.from_dict(json.loads((built / "action_stats.json").read_text()))
    assert statistics.count == len(rows) == 56
    np.testing.assert_allclose(statistics.mean, rows.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(statistics.std, rows.std(axis=0), rtol=1e-5)
    card = (built / "README.md").read_text()
    assert "data/train-*.parquet" in card
    histograms = ActionHistograms().update(np.concatenate(every_action))
    assert report["actions"] == histograms.to_dict()
    assert summary_markdown(report) in card and re.search(r"\| train \| 3 \| 3 \| 4 \| 8 \|", card)
    assert re.search(r"too short \| 1 \|", card)


def interrupt_after_the_first_task():
    """In a forked build: Ctrl-C as soon as a task's marker is there."""
    replace = os.replace

    def replace_and_interrupt(source, target):
        replace(source, target)
        if Path(target).name.startswith("task-"):
            os.kill(os.getpid(), signal.SIGINT)

    os.replace = replace_and_interrupt


def test_stopped_build_goes_on_where_it_was(packed, built, tmp_path):
    folder, _ = packed
    output = tmp_path / "built"
    options = ("--shards", folder / "out/*.tar", "--output", output, "--resolution", 32)
    options += ("--validation_players", "silly-s1")
    assert status_of(fork_build(options, interrupt_after_the_first_task)) == 130
    assert len(list(output.glob(".build/task-*.json"))) == 1
    finished = {marker: marker.stat().st_mtime_ns for marker in output.glob(".build/task-*.json")}
    (output / ".build/train-left-over.parquet.tmp").write_bytes(b"x")
    code, out, err = run("build_vpt_tubelets.py", *options)
    assert code == 0 and f"{len(finished)} of 3 shards were finished before" in out, err
    assert all(marker.stat().st_mtime_ns == written for marker, written in finished.items())
    assert_same_files(output, contents(built))


def test_other_options_or_shards_build_again_and_leave_nothing_of_before(packed, tmp_path):
    folder, _ = packed
    output = tmp_path / "built"
    assert build(folder / "out/*.tar", output, "--validation_fraction", 0)[0] == 0
    code, out, err = build(folder / "out/*.tar", output, "--validation_fraction", 0, "--clip_stride", 30)
    assert code == 0 and f"15 clips, 1 rejected; 1 x too short; {output}\n" in out, err
    code, out, err = build(folder / "out/shard-000000.tar", output, "--clip_stride", 30)
    assert code == 0 and "1 of 1 shards were finished before" in out, err
    assert [file.name for file in (output / "data").iterdir()] == ["train-00000.parquet"]
    data = load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert data["start_tick"][:] == [0, 30, 60] * 2


def test_more_shards_leave_what_is_finished(packed, tmp_path):
    folder, _ = packed
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    code, out, err = build(folder / "out/shard-000000.tar", grown, "--validation_fraction", 0)
    assert code == 0 and "finished before" not in out, err
    written = (grown / "data/train-00000.parquet").stat().st_mtime_ns
    code, out, err = build(folder / "out/*.tar", grown, "--validation_fraction", 0)
    assert code == 0 and "1 of 3 shards were finished before" in out, err
    assert (grown / "data/train-00000.parquet").stat().st_mtime_ns == written
    assert build(folder / "out/*.tar", whole, "--validation_fraction", 0)[0] == 0
    assert_same_files(grown, contents(whole))


def test_build_of_a_folder(packed, tmp_path):
    folder, _ = packed
    code, out, err = build(folder / "in", tmp_path / "built")
    assert code == 0 and "5 of 7 recordings accepted, 10 clips, 2 rejected" in out, err


def test_failure_is_the_exit_status(packed, tmp_path):
    options = ("--shards", packed[0] / "out/*.tar", "--output", tmp_path, "--validation_fraction", "1e-9")
    code, _, err = run_process("build_vpt_tubelets.py", *options)
    assert code == 1 and "leaves the validation split empty" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fps", "6"), "found 20 / 6.0"),
        (
            ("--validation_players", "silly-s9"),
            "names players that are not to be built: ['silly-s9']; the nearest of 4 players: ['silly-s",
        ),
        (("--validation_fraction", "1e-9"), "leaves the validation split empty"),
        (("--validation_players", "silly-s3", "--clip_stride", "1", "--max_gui_fraction", "0"), "has no clip"),
    ],
)
def test_failures_exit_1_with_a_message(packed, tmp_path, options, message):
    code, _, err = build(packed[0] / "out/*.tar", tmp_path / "built", *options)
    assert code == 1 and message in err.splitlines()[-1], err
    assert "Traceback" not in err


def test_output_must_be_a_folder_of_its_own(packed, tmp_path):
    shards, output = packed[0] / "out", tmp_path / "built"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    code, _, err = build(shards / "*.tar", output)
    assert code == 1 and "holds 'thesis.tex' (1 entries) and no .build folder" in err.splitlines()[-1]
    assert os.listdir(output) == ["thesis.tex"]
    code, _, err = build(shards / "*.tar", output / "thesis.tex")
    assert code == 1 and "thesis.tex is a file, expected a folder" in err
    code, _, err = build(shards, shards)
    assert code == 1 and f"holds what is to be built from, such as {shards}/shard-000000.tar" in err
    assert build(shards, shards / "built")[0] == 0  # below the shards is no harm, and no input of the next run
    assert "3 of 3 shards were finished before" in build(shards, shards / "built")[1]
    shutil.rmtree(shards / "built")


def test_changed_files_are_built_again(packed, tmp_path):
    """A recording that is replaced by another of the same name and size, and shards written anew."""
    folder, output = tmp_path / "in", tmp_path / "built"
    for segment in range(2):
        write_recording(folder, name_of("s0", segment), 130, segment)
    assert build(folder, output)[0] == 0
    before = json.loads((output / "action_stats.json").read_text())
    assert "1 of 1 shards were finished before" in build(folder, output)[1]
    log = folder / f"{name_of('s0')}.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[8:16], *lines[:8], *lines[16:]]))
    assert "finished before" not in build(folder, output)[1]
    assert json.loads((output / "action_stats.json").read_text()) != before


def test_a_shard_written_anew_is_listed_anew(packed, tmp_path):
    """Same members and size, other order: offsets of the cached listing are wrong."""
    source, shard, output = packed[0] / "out/shard-000000.tar", tmp_path / "shards/a.tar", tmp_path / "built"
    shard.parent.mkdir()
    shutil.copy(source, shard)
    assert build(shard, output)[0] == 0
    with tarfile.open(source) as archive:
        members = [(info.name, archive.extractfile(info).read()) for info in archive]
    write_shard(shard, members[::-1])
    assert shard.stat().st_size == source.stat().st_size
    code, out, err = build(shard, output)
    assert code == 0 and "2 of 2 recordings accepted" in out and "finished before" not in out, err


def test_finish_refuses_an_unfinished_build_by_name_and_number(packed, tmp_path):
    output = tmp_path / "built"
    finish = ("build_vpt_tubelets.py", "--output", output, "--finish")
    code, _, err = run(*finish)
    assert code == 1 and "holds no build: expected .build/plan.ndjson" in err
    assert build(packed[0] / "out/*.tar", output)[0] == 0
    expected = contents(output)
    removed = sorted(output.glob(".build/task-*.json"))[1]
    marker = removed.read_bytes()
    removed.unlink()
    code, _, err = run(*finish)
    assert code == 1 and "error: 1 of 3 shards are not built: shard-000001.tar; what is finished stays" in err
    removed.write_bytes(marker)
    (output / "README.md").unlink()
    assert run(*finish)[0] == 0
    assert_same_files(output, expected)


def test_dry_run_says_what_the_build_then_does(packed, tmp_path):
    output, options = tmp_path / "built", ("--validation_players", "silly-s1")
    code, out, err = build(packed[0] / "out/*.tar", output, *options, "--dry_run", "--dry_run_sample", 6)
    assert code == 0 and "3 tasks, 0 finished; 6 recordings" in out and "nothing is built" in out, err
    assert not (output / "data").exists() and not (output / ".build/plan.ndjson").exists()
    plan = json.loads((output / "plan.json").read_text())
    assert build(packed[0] / "out/*.tar", output, *options)[0] == 0
    report = json.loads((output / "report.json").read_text())
    files = list((output / "data").glob("*.parquet"))
    # With all recordings in the sample the estimate is the truth.
    assert plan["tasks"] == {"total": 3, "finished": 0} and plan["recordings"] == report["recordings"]
    assert plan["estimate"]["clips"] == report["clips"] and plan["estimate"]["rejected_in_sample"] == 1
    ticks = sum(recording["ticks"] for recording in report["per_recording"])
    assert plan["estimate"]["hours_of_play"] == pytest.approx(ticks / 20 / 3600)
    videos = [row["bytes"] for file in files for row in pq.read_table(file)["video"].to_pylist()]
    assert plan["estimate"]["output_bytes"] == sum(map(len, videos)) + len(videos) * (7 * 38 + 8 * 2) * 4
    assert plan["splits"] == {
        "train": {"players": 3, "sessions": 3, "recordings": 5},
        "validation": {"players": 1, "sessions": 1, "recordings": 1},
    }
    assert "validation, by player (named): 25.0% of players, 25.0% of sessions, 16.7% of recordings" in out
    code, out, _ = build(packed[0] / "out/*.tar", output, *options, "--dry_run", "--dry_run_sample", 0)
    assert code == 0 and "3 tasks, 3 finished" in out
    assert json.loads((output / "plan.json").read_text())["estimate"] is None


def write_padded_shard(path, num_recordings, padding):
    """A tar of copies of one recording whose videos end in an empty `free` box of `padding` bytes (holes on disk)."""
    lines, video = to_log(make_lines(130)), make_video(130)
    box = struct.pack(">I4s", padding, b"free")
    with path.open("wb") as file:
        for number in range(num_recordings):
            name = name_of(f"s{number}")
            for suffix, data, size in ((".mp4", video + box, len(video) + padding), (".jsonl", lines, len(lines))):
                info = tarfile.TarInfo(name + suffix)
                info.size = size
                file.write(info.tobuf() + data)
                file.seek(size - len(data) + -size % 512, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)


def test_memory_does_not_grow_with_the_shard(tmp_path):
    peaks = []
    for num_recordings in (2, 25):
        shard = tmp_path / f"{num_recordings}.tar"
        write_padded_shard(shard, num_recordings, padding=20 * 2**20)
        output = tmp_path / f"built-{num_recordings}"
        process = fork_build(["--shards", shard, "--output", output, "--resolution", 32, "--validation_fraction", 0])
        _, status, usage = os.wait4(process, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert json.loads((output / "report.json").read_text())["accepted"] == num_recordings
        peaks.append(usage.ru_maxrss / 1024)
    assert shard.stat().st_size > 500 * 2**20
    assert peaks[1] - peaks[0] < 100, peaks  # MB
    assert peaks[1] < 1500, peaks


def test_no_shards_and_unknown_executor(tmp_path):
    code, _, err = build(tmp_path / "*.tar", tmp_path / "built")
    assert code == 1 and "no .tar, .mp4 or .jsonl file found" in err
    code, _, err = build(tmp_path, tmp_path / "built", "--executor", "spark")
    assert code == 2 and "invalid choice: 'spark'" in err
    assert not os.path.exists(tmp_path / "built")
