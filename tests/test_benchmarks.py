"""The benchmark of the data side runs, and what it compares is the same work."""

import json
import sys

import numpy as np
import pytest
import torch
from helpers_data import make_lines, make_video, to_log, write_shard
from helpers_training import load_program

from vjepa_ac_hf import VJEPA2ACProcessor
from vjepa_ac_hf.loading.clips import ClipCollator, load_action_statistics, load_clips

HELP = ("--help", "pack --help", "pack --no_such_flag")


@pytest.fixture(scope="module")
def benchmark():
    return load_program("benchmarks/data.py")


@pytest.mark.slow
def test_the_benchmark_of_starting_gives_ratios_to_the_reference(tmp_path, monkeypatch):
    startup = load_program("benchmarks/startup.py")
    monkeypatch.setattr(startup, "PROGRAMS", {"pack": ()})
    monkeypatch.setattr(startup, "IMPORTS", {})
    monkeypatch.setattr(sys, "argv", ["startup.py", "--output", str(tmp_path / "out.json"), "--repeats", "1"])
    startup.main()
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert set(figures) == {startup.REFERENCE, *(f"vjepa-ac {a}" for a in HELP)}
    assert figures[startup.REFERENCE]["ratio"] == 1
    for row in figures.values():
        assert row["ratio"] == pytest.approx(row["median_s"] / figures[startup.REFERENCE]["median_s"])
    with pytest.raises(SystemExit, match="exit status 0, expected 2"):
        startup.seconds(["-c", ""], 2)


@pytest.mark.slow
def test_the_benchmark_runs_and_compares_the_same_work(benchmark, tmp_path, monkeypatch):
    lines = make_lines(200, seed=3)
    for line in lines:  # what only the builder repairs is left out of the comparison
        line["mouse"] = line["mouse"] or {"dx": 0, "dy": 0, "buttons": [], "newButtons": []}
        line["keyboard"] = line["keyboard"] or {"keys": []}
        line["hotbar"] = 0
    (tmp_path / "shards").mkdir()
    members = [
        ("a-1-20260101-000000.mp4", make_video(200, size=(256, 320))),
        ("a-1-20260101-000000.jsonl", to_log(lines)),
    ]
    shard = write_shard(tmp_path / "shards" / "shard-000000.tar", members)
    arguments = [
        "--work",
        tmp_path / "work",
        "--output",
        tmp_path / "out.json",
        "--shards",
        tmp_path / "shards",
        "--smoke",
    ]
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    benchmark.main()

    results = json.loads((tmp_path / "out.json").read_text())
    assert results["build"]["1"]["clips"] == 2  # three clips less the one that counts as start
    assert set(results["loading"]) == {"table", "stream", "usual", "usual_lean"}
    assert all(figure["clips_per_second"] > 0 for figure in results["loading"].values())
    assert results["loading"]["usual"]["over_usual"] == 1

    dataset = str(tmp_path / "work" / "clips-1")
    statistics = load_action_statistics(dataset)
    processor = VJEPA2ACProcessor(action_statistics=statistics.to_dict())
    ours = ClipCollator(processor)(list(load_clips(dataset, "train", streaming=True)))
    usual, lean = (benchmark.UsualDataset([shard], statistics, whole_log=whole) for whole in (True, False))
    for index, start in enumerate((0, 64, 128)):
        theirs = usual.__getitem__(0, start)
        assert all(torch.equal(theirs[name], value) for name, value in lean.__getitem__(0, start).items())
        np.testing.assert_allclose(theirs["actions"], ours["actions"][index], atol=1e-4)
        np.testing.assert_allclose(theirs["states"], ours["states"][index], atol=1e-5)
        assert theirs["pixel_values_videos"].shape == (16, 3, 256, 256)
        error = (theirs["pixel_values_videos"] - ours["pixel_values_videos"][index]).abs().mean()
        other = (theirs["pixel_values_videos"] - torch.roll(ours["pixel_values_videos"][index], 1, dims=0)).abs().mean()
        assert error < 0.15 and error < 0.5 * other  # stored clips are compressed once more
