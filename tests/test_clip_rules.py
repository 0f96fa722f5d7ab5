"""The same clips for everyone: rules look at ids alone, whatever the order of rows, files and shards."""

import argparse
import hashlib
import json
import sys

import datasets
import numpy as np
import pytest
from helpers_clips import FEATURES, write_clips
from helpers_models import save_world
from helpers_training import load_program
from hypothesis import given, settings
from hypothesis import strategies as st

from vjepa_ac_hf import VJEPA2ACProcessor
from vjepa_ac_hf.console import CLIP_RULES
from vjepa_ac_hf.loading.clip_rules import RULES, choose_clips, describe_clips
from vjepa_ac_hf.loading.streaming import ParquetClips


def table(clips):
    """A data set of (recording, tick, session)."""
    recordings, ticks, sessions = zip(*clips, strict=True)
    return datasets.Dataset.from_dict(
        {"recording_id": list(recordings), "start_tick": list(ticks), "session_id": list(sessions)}
    )


def ids_of(dataset, rows):
    return [f"{r['recording_id']}@{r['start_tick']}" for r in dataset.select(rows)]


def brute(clips, most=16):
    """The rule in other words: of each session the smallest hashes; all of them by hash."""
    hashed = [(hashlib.sha256(f"{r}@{t}".encode()).hexdigest(), f"{r}@{t}", s) for r, t, s in clips]
    taken = []
    for session in {s for _, _, s in hashed}:
        taken += sorted(h for h in hashed if h[2] == session)[:most]
    return [clip for _, clip, _ in sorted(taken)]


CLIPS = st.lists(
    st.tuples(st.sampled_from(["amber", "birch", "cedar"]), st.integers(0, 40)), min_size=1, max_size=70, unique=True
)


@settings(max_examples=60, deadline=None)
@given(CLIPS, st.randoms(use_true_random=False), st.integers(1, 70))
def test_order_does_not_matter(named, random, limit):
    clips = [(f"{name}-{tick % 2}", 64 * tick, f"{name}-day") for name, tick in named]
    expected = brute(clips)
    shuffled = clips.copy()
    random.shuffle(shuffled)
    for order in (clips, shuffled):
        dataset = table(order)
        assert ids_of(dataset, choose_clips(dataset, "clips-v1")) == expected
        if limit <= len(expected):
            assert ids_of(dataset, choose_clips(dataset, "clips-v1", limit)) == expected[:limit]
    one, other = (describe_clips(table(order), None) for order in (clips, shuffled))
    assert one == other and one["clips"] == len(clips) and one["rule"] is None
    if len(clips) > 1:
        assert describe_clips(table(clips[1:]), None)["digest"] != one["digest"]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), files=st.integers(1, 4), group=st.integers(1, 30))
def test_a_stream_of_any_shards_gives_the_same_clips(tmp_path_factory, seed, files, group):
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(seed)
    clips = [(f"rec-{i % 5}", 8 * i, f"day-{i % 2}") for i in range(50)]
    rng.shuffle(clips)
    paths = []
    for number, part in enumerate(np.array_split(np.arange(50), files)):
        paths.append(str(folder / f"{number}.parquet"))
        table([clips[i] for i in part]).to_parquet(paths[-1], batch_size=group)
    stream = ParquetClips(paths, ["recording_id", "session_id", "start_tick"])
    expected = brute([(str(r), int(t), str(s)) for r, t, s in clips])
    assert len(expected) == 32
    assert ids_of(stream, choose_clips(stream, "clips-v1")) == expected
    assert describe_clips(stream.select(choose_clips(stream, "clips-v1")), "clips-v1")["clips"] == 32


def test_what_a_rule_chooses_never_changes():
    """If this fails, the rule has become another one: give it another name, and leave clips-v1 as it was."""
    dataset = table([("alder-0-20220105-102330", 64 * i, "alder-20220105") for i in range(20)])
    rows = choose_clips(dataset, "clips-v1")
    assert rows == [9, 12, 17, 5, 1, 19, 13, 3, 8, 16, 18, 7, 14, 15, 6, 10]
    digest = "a0bf71f9b033e511762817f6f27174458100de1385ca3d798808bd8bbc21c62b"
    assert describe_clips(dataset.select(rows), "clips-v1") == {"rule": "clips-v1", "clips": 16, "digest": digest}


def test_names_of_rules_are_the_same_everywhere():
    assert sorted(RULES) == sorted(CLIP_RULES)


def test_errors():
    dataset = table([("a", i, "day") for i in range(20)] + [("b", 0, "other day")])
    with pytest.raises(ValueError, match=r"unknown rule 'clips-v0' for clips: known are \['clips-v1'\]"):
        choose_clips(dataset, "clips-v0")
    with pytest.raises(
        ValueError, match=r"clips-v1 chooses 17 of 21 clips \(at most 16 of each of 2 sessions\), 18 are asked for"
    ):
        choose_clips(dataset, "clips-v1", 18)
    with pytest.raises(ValueError, match=r"\['session_id'\] are missing"):
        choose_clips(dataset.remove_columns("session_id"), "clips-v1")
    with pytest.raises(ValueError, match="row 1 has no recording_id"):
        choose_clips(table([("a", 0, "day"), (None, 1, "day")]), "clips-v1")
    with pytest.raises(ValueError, match="rows 0 and 2 are both clip a@5"):
        choose_clips(table([("a", 5, "day"), ("a", 6, "day"), ("a", 5, "day")]), "clips-v1")


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One data set as it was built, and its validation clips in another order and other files."""
    folder = tmp_path_factory.mktemp("clip_rules")
    write_clips(folder / "one", train=6, validation=9)
    rows = datasets.Dataset.from_parquet(str(folder / "one/data/validation-00000-of-00001.parquet"))
    rows = rows.cast_column("video", datasets.Video(decode=False)).select(np.random.default_rng(0).permutation(9))
    (folder / "other/data").mkdir(parents=True)
    for name in ("action_stats.json", "data/train-00000-of-00001.parquet"):
        (folder / "other" / name).write_bytes((folder / "one" / name).read_bytes())
    for number, part in enumerate((range(4), range(4, 9))):
        shard = datasets.Dataset.from_list(list(rows.select(part)), features=FEATURES)
        shard.to_parquet(folder / f"other/data/validation-0000{number}-of-00002.parquet")
    save_world(folder / "world")
    return folder


def both(folders, tmp_path, monkeypatch, program, result, *flags):
    """Results of a program on the two data sets."""
    found = []
    for name in ("one", "other"):
        arguments = ["--model", folders / "world", "--dataset", folders / name, "--output", tmp_path / name, *flags]
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments), "--device", "cpu", "--num_pictures", "0"])
        load_program(f"examples/{program}").main()
        found.append(json.loads((tmp_path / name / result).read_text()))
    return found


def test_evaluations_are_equal_whatever_the_order(folders, tmp_path, monkeypatch):
    flags = ("--clip_rule", "clips-v1", "--max_clips", "7", "--shuffles", "2")
    one, other = both(folders, tmp_path, monkeypatch, "evaluate.py", "metrics.json", *flags)
    assert one["clip_set"] == other["clip_set"] and one["clip_set"]["rule"] == "clips-v1" and one["clips"] == 7
    for found, expected in zip(one["horizons"], other["horizons"], strict=True):
        for name in ("error", "persistence", "shuffled_actions", "win_rate"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    one, other = both(folders, tmp_path, monkeypatch, "evaluate.py", "metrics.json", "--max_clips", "7")
    assert one["clip_set"]["digest"] != other["clip_set"]["digest"] and one["clip_set"]["rule"] is None
    with pytest.raises(ValueError, match="clips-v1 chooses 9 of 9 clips .*10 are asked for"):
        both(folders, tmp_path, monkeypatch, "evaluate.py", "metrics.json", *flags[:2], "--max_clips", "10")


def test_landscapes_are_equal_whatever_the_order(folders, tmp_path, monkeypatch, capsys):
    flags = ("--clip_rule", "clips-v1", "--max_clips", "3", "--cells", "3")
    one, other = both(folders, tmp_path, monkeypatch, "energy_landscape.py", "landscapes.json", *flags)
    assert one["clip_set"] == other["clip_set"] and one["clip_set"]["clips"] == 3
    ids = [[land["clip"].split("(")[1] for land in found["landscapes"]] for found in (one, other)]
    assert ids[0] == ids[1]
    with pytest.raises(SystemExit):
        both(folders, tmp_path, monkeypatch, "energy_landscape.py", "landscapes.json", *flags, "--clips", "1")
    assert "--clips names rows and --clip_rule clips-v1 chooses them" in capsys.readouterr().err


def test_training_validates_on_the_rules_clips_in_its_order(folders):
    """Groups of retrieval are of neighbours in that order, so they too are the same."""
    processor = VJEPA2ACProcessor.from_pretrained(folders / "world")
    found = {}
    for program in ("train", "train_head"):
        for name in ("one", "other"):
            for streaming in (False, True) if program == "train" else (False,):
                arguments = argparse.Namespace(
                    **dict(dataset=str(folders / name), streaming=streaming, eval_every=1, eval_clips=5, labels=None),
                    **dict(clip_rule="clips-v1", max_train_clips=None),
                )
                splits = load_program(f"examples/{program}.py").load_splits(arguments, processor)
                validation = splits[1] if program == "train" else splits[0][1]
                found[program, name, streaming] = ids_of(validation, range(len(validation)))
    whole = found["train_head", "one", False]
    assert len(whole) == 9 and found["train_head", "other", False] == whole
    assert {tuple(ids) for key, ids in found.items() if key[0] == "train"} == {tuple(whole[:5])}
