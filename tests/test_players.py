"""Whose a recording is: names, splits by player, doubled recordings, words in names; in every way of loading."""

import gzip
import json
import logging
import re
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from faulty_server import FaultyServer
from helpers_clips import write_clips
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_build_scripts import run
from test_download import run as run_download

from vjepa_ac_hf.downloading.index import read_index
from vjepa_ac_hf.downloading.index import select_recordings as select_downloads
from vjepa_ac_hf.loading.clips import check_players, load_clips
from vjepa_ac_hf.recordings.names import player_id_of, recorder_version_of, recording_id_of, session_id_of
from vjepa_ac_hf.recordings.splits import SplitOptions, split_options_from, stable_share, validation_recordings

CASES = Path(__file__).parent / "cases" / "players"
RECORDING = "alder-swift-9be21c07a4d3-20220105-102330"
ONE_TICK = {f"data/9.0/{RECORDING}{suffix}": CASES / f"one-tick/{RECORDING}{suffix}" for suffix in (".mp4", ".jsonl")}
INDEX_FILES = sorted((CASES / "index").iterdir())


def lay_out(folder, relpaths):
    """The one recording under every relpath given."""
    for relpath in relpaths:
        for suffix in (".mp4", ".jsonl"):
            path = folder / f"{relpath.removesuffix('.mp4')}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CASES / f"{RECORDING}{suffix}", path)
    return folder


def load(tmp_path, **options):
    return load_dataset("vpt_tubelets", cache_dir=str(tmp_path / "cache"), **{"resolution": 32, **options})


def rows_of(data):
    """`(recording, session, player)` of every row, by split."""
    columns = ("recording_id", "session_id", "player_id")
    return {
        split: sorted(tuple(row[column] for column in columns) for row in rows.remove_columns("video"))
        for split, rows in data.items()
    }


def build(tmp_path, source, *options):
    output = tmp_path / "built"
    code, out, err = run("build_vpt_tubelets.py", "--shards", source, "--output", output, "--resolution", 32, *options)
    assert code == 0, err
    return output, json.loads((output / "report.json").read_text()), out + err


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "player", "session"),
    [
        (
            "data/find-cave/cheeky-cornflower-setter-00467564a5cd-20220715-094908.mp4",
            "cheeky-cornflower-setter",
            "cheeky-cornflower-setter-20220715",
        ),
        ("Player606-f153ac423f61-20220714-101112", "Player606", "Player606-20220714"),
        ("data/9.0/alder-34-f153ac423f61-20220214-090000.jsonl", "alder-34", "alder-34-20220214"),
        ("6.8/a-20220101-000000-b-20220715-094908", "a-20220101-000000", "a-20220101-000000-20220715"),
        ("a-b-2022071-094908", "a-b-2022071-094908", "a-b-2022071-094908"),
        ("a-b-20220715-94908", "a-b-20220715-94908", "a-b-20220715-94908"),
        ("a-b-20220715-094908 (1)", "a-b-20220715-094908 (1)", "a-b-20220715-094908 (1)"),
        ("a-20220715-094908", "a-20220715-094908", "a-20220715-094908"),
        ("-f153ac423f61-20220715-094908", "-f153ac423f61-20220715-094908", "-f153ac423f61-20220715-094908"),
        ("anything", "anything", "anything"),
    ],
)
def test_whose_a_recording_is(name, player, session):
    assert (player_id_of(name), session_id_of(name)) == (player, session)


WORD = st.text("abcXYZ0189_.é test", min_size=1, max_size=8).filter(lambda word: word.strip(". ") == word)
ALIAS = st.lists(WORD, min_size=1, max_size=4).map("-".join)
HEX = st.text("0123456789abcdef", min_size=12, max_size=12)
DATE, TIME = st.text("0123456789", min_size=8, max_size=8), st.text("0123456789", min_size=6, max_size=6)


@given(ALIAS, HEX, HEX, DATE, DATE, TIME, st.sampled_from(["", "6.13/", "data/8.2/"]), st.sampled_from(["", ".mp4"]))
def test_a_name_is_read_from_its_end_whatever_the_alias(alias, first, second, date, other, time, folder, suffix):
    one = f"{folder}{alias}-{first}-{date}-{time}{suffix}"
    assert (player_id_of(one), session_id_of(one)) == (alias, f"{alias}-{date}")
    assert recording_id_of(one) == f"{alias}-{first}-{date}-{time}"
    assert recorder_version_of(one) == {"6.13/": "6.13", "data/8.2/": "8.2"}.get(folder)
    # The id says nothing, the day a session, the alias a player.
    assert session_id_of(f"{alias}-{second}-{date}-{time}") == session_id_of(one)
    again = f"{alias}-{first}-{other}-{time}"
    assert player_id_of(again) == alias and (session_id_of(again) == session_id_of(one)) == (date == other)


# ------------------------------------------------------------------------------------------------------ splits


def names_of(players):
    """`{alias: number of recordings}` -> names, with one id for all, which must not matter."""
    return [
        f"{alias}-f153ac423f61-202201{day:02d}-120000" for alias, number in players.items() for day in range(number)
    ]


PLAYERS = st.dictionaries(ALIAS, st.integers(1, 5), min_size=1, max_size=30)


@given(PLAYERS, PLAYERS, st.floats(0.05, 0.95), st.sampled_from(["player", "session"]))
@settings(max_examples=60, deadline=None)
def test_added_recordings_change_nothing(before, added, fraction, split_by):
    options = SplitOptions(split_by=split_by, validation_fraction=fraction)
    together = {alias: max(before.get(alias, 0), added.get(alias, 0)) for alias in {**before, **added}}
    try:
        first = validation_recordings(names_of(before), options)
        second = validation_recordings(names_of(together), options)
    except ValueError as error:
        assume("empty" not in str(error))
        raise
    assert first == second & set(names_of(before))
    unit_of = {"player": player_id_of, "session": session_id_of}[split_by]
    rest = set(names_of(together)) - second
    assert not set(map(unit_of, second)) & set(map(unit_of, rest))


def index_names(file):
    relpaths = json.loads(gzip.decompress(file.read_bytes()))["relpaths"]
    return [relpath.rsplit("/", 1)[-1].removesuffix(".mp4") for relpath in relpaths]


@pytest.mark.parametrize("file", INDEX_FILES, ids=lambda file: file.name)
@pytest.mark.parametrize("fraction", [None, 0.2, 0.5])
def test_no_player_of_an_index_file_is_in_two_splits(file, fraction):
    """The alias is read by splitting at dashes here, from the end."""
    names = set(index_names(file))
    validation = validation_recordings(names, SplitOptions(validation_fraction=fraction))
    players = [{name.rsplit("-", 3)[0] for name in part} for part in (validation, names - validation)]
    assert not players[0] & players[1] and len(players[0] | players[1]) == len({n.rsplit("-", 3)[0] for n in names})
    if fraction == 0.5:
        assert 0.2 < len(players[0]) / len(players[0] | players[1]) < 0.8


def test_a_share_of_clips_far_from_the_one_asked_for_is_said(tmp_path):
    """Players are chosen whole: of 10 recordings, the chosen tenth of players has 8."""
    players = [f"p{i}" for i in range(200)]
    chosen = next(player for player in players if stable_share(player) < 0.1)
    other = [player for player in players if stable_share(player) >= 0.1][:2]
    names = [f"{chosen}-0123456789ab-20220101-00000{i}" for i in range(8)]
    names += [f"{p}-0123456789ab-20220101-000000" for p in other]
    lay_out(tmp_path / "in", names)
    _, report, shown = build(tmp_path, tmp_path / "in", "--validation_fraction", 0.1)
    assert report["split"]["reached"]["clips"] == 0.8 and report["split"]["reached"]["players"] == pytest.approx(1 / 3)
    assert report["split"]["wanted"] == 0.1
    assert "validation has 80.0% of the clips, 10.0% were wanted" in report["split"]["warning"]
    assert "validation, by player (10.0% wanted): 80.0% of clips, 80.0% of recordings" in shown
    assert f"warning: {report['split']['warning']}" in shown


def test_sessions_named_that_tear_a_player_need_a_split_by_session(tmp_path):
    names = names_of({"a": 2, "b": 1})
    named = {"validation_sessions": ["a-20220101"], "validation_players": None, "validation_fraction": None}
    with pytest.raises(ValueError, match=r"1 players into both splits.*'a', with the sessions \['a-20220100', "):
        validation_recordings(names, split_options_from({"split_by": "player", **named}))
    chosen = validation_recordings(names, split_options_from({"split_by": "session", **named}))
    assert chosen == {"a-f153ac423f61-20220101-120000"}
    whole = {**named, "validation_sessions": ["a-20220100", "a-20220101"]}
    assert validation_recordings(names, split_options_from({"split_by": "player", **whole})) == set(names[:2])


# ------------------------------------------------------------------------------------------------------ cases


@pytest.mark.parametrize("alder_validates", [True, False])
def test_segments_of_a_player_whose_id_was_redrawn_are_in_one_split(tmp_path, alder_validates):
    relpaths = json.loads((CASES / "death-redraws-id.json").read_text())["relpaths"]
    folder = lay_out(tmp_path / "in", relpaths)
    others = ["birch-3", "birch-4"]
    options = {"validation_players": ["alder-34", *others] if alder_validates else others}
    expected = {"train": [], "validation": []}
    for relpath in relpaths:
        name = relpath.split("/")[-1].removesuffix(".mp4")
        player = "-".join(name.split("-")[:2])
        split = "validation" if player in options["validation_players"] else "train"
        expected[split].append((name, f"{player}-{name.split('-')[3]}", player))
    expected = {split: sorted(rows) for split, rows in expected.items()}
    assert Counter(row[2] for row in expected["validation" if alder_validates else "train"])["alder-34"] == 4
    assert rows_of(load(tmp_path, data_dir=str(folder), **options)) == expected
    assert rows_of(load(tmp_path, data_dir=str(folder), streaming=True, **options)) == expected
    built, report, _ = build(tmp_path, folder, "--validation_players", *options["validation_players"])
    assert rows_of(load_dataset(str(built), cache_dir=str(tmp_path / "cache"))) == expected
    assert len(report["splits"]["validation"]["players"]) == len(options["validation_players"])
    splits = {split: load_clips(str(built), split, streaming=True) for split in expected}
    check_players(str(built), splits)  # nothing to refuse


@pytest.mark.parametrize(
    ("relpaths", "words"),
    [
        (["alder-swift", "birch-test", "cedar-wren"], "test: 2 files"),
        (["alder-swift", "dev-lark", "cedar-wren"], "validation: 2 files"),
        (["val/alder-swift", "val/cedar-wren", "elm-rook"], "validation: 4 files"),
        (["data/train-00000-of-00002", "x/eval/y", "training 1"], "train: 2 files"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_words_in_names_choose_no_split(tmp_path, caplog, relpaths, words, streaming):
    folder = lay_out(tmp_path / "in", [f"{relpath}-0c1d2e3f4a5b-20220105-102330" for relpath in relpaths])
    if relpaths[0].startswith("data/"):  # a name that is datasets' own for shards
        folder = lay_out(tmp_path / "other", relpaths)
    expected = sorted(path.stem for path in folder.rglob("*.mp4"))
    for options in ({"data_dir": str(folder)}, {"data_files": str(folder / "**")}):
        data = load(tmp_path, streaming=streaming, validation_fraction=0, **options)
        assert {split: [row[0] for row in rows] for split, rows in rows_of(data).items()} == {"train": expected}
        assert (f"names contain words that datasets takes for splits ({words})" in caplog.text) == (
            "data_dir" in options
        )
        caplog.clear()
    # What the user names is kept, beside a folder too.
    data = load(tmp_path, data_dir=str(folder), data_files={"test": "**/*.*"}, streaming=streaming)
    assert [row[0] for row in rows_of(data)["test"]] == expected and not caplog.text
    built, _, _ = build(tmp_path, folder, "--validation_fraction", 0)
    assert [row[0] for row in rows_of(load_dataset(str(built), cache_dir=str(tmp_path / "c")))["train"]] == expected


def test_of_two_recorder_versions_the_newest_is_built(tmp_path, caplog):
    folder = lay_out(tmp_path / "in", [f"{version}/{RECORDING}" for version in ("8.0", "8.2", "8.10")])
    reason = "doubled: found under recorder version 8.10 too, in 8.10, that copy is used"
    for streaming in (False, True):
        data = load(tmp_path, data_dir=str(folder), streaming=streaming)
        assert [row[0] for row in rows_of(data)["train"]] == [RECORDING]
        assert f"rejected {RECORDING} (8.2): {reason}" in caplog.text
        caplog.clear()
    _, report, _ = build(tmp_path, folder)
    assert (report["recordings"], report["accepted"], report["clips"]) == (3, 1, 1)
    assert report["rejected"] == [{"recording": RECORDING, "shard": s, "reason": reason} for s in ("8.0", "8.2")]
    (entry,) = report["per_recording"]
    assert (entry["shard"], entry["player"], entry["session"]) == ("8.10", "alder-swift", "alder-swift-20220105")


def download(server_files, tmp_path, relpaths, *options):
    with FaultyServer(server_files) as server:
        (tmp_path / "index.json").write_text(json.dumps({"basedir": server.url, "relpaths": relpaths}))
        arguments = ("--index", tmp_path / "index.json", "--output", tmp_path / "out")
        code, out, err = run_download(*arguments, *options)
        asked = {request.path.lstrip("/") for request in server.requests}
    return code, out + err, asked, json.loads((tmp_path / "out/download_report.json").read_text())


def test_of_two_recorder_versions_the_newest_is_downloaded(tmp_path):
    relpaths = [f"data/{version}/{RECORDING}.mp4" for version in ("8.2", "8.0", "8.10")] + ["data/8.0/x.mp4"]
    folder = lay_out(tmp_path / "server", relpaths)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    code, shown, asked, report = download(files, tmp_path, relpaths)
    assert code == 0 and "2 recordings stand under several recorder versions" in shown, shown
    newest = f"data/8.10/{RECORDING}"
    assert {path for path in asked if RECORDING in path} == {
        newest + suffix for suffix in (".mp4", ".jsonl", "-options.json")
    }
    assert report["doubled"] == {f"data/{version}/{RECORDING}": newest for version in ("8.2", "8.0")}
    assert (report["indexed"], report["selected"], report["downloaded"]) == (4, 2, 2)
    assert report["left_out"] == {"doubled": 2, "recorder_version": 0, "match": 0, "limit": 0}
    # Asked for by version, it is what was asked for.
    selection = select_downloads(read_index(str(tmp_path / "index.json")), recorder_versions=["8.0"])
    assert [recording.relpath for recording in selection.recordings] == [f"data/8.0/{RECORDING}", "data/8.0/x"]


def test_doubled_entries_of_the_8xx_index_are_found_before_any_transfer(tmp_path):
    file = next(file for file in INDEX_FILES if "8xx" in file.name)
    (tmp_path / "index.json").write_bytes(gzip.decompress(file.read_bytes()))
    index = read_index(str(tmp_path / "index.json"))
    selection = select_downloads(index)
    assert index.doubled == selection.left_out["doubled"] == len(selection.doubled) == 194
    assert len(selection.recordings) == len(set(index_names(file))) == len(index_names(file)) - 194
    versions = {name: set() for name in index_names(file)}
    for entry in index.entries:
        versions[entry.relpath.rsplit("/", 1)[-1]].add(entry.relpath.split("/")[1])
    for recording in selection.recordings:
        _, version, name = recording.relpath.split("/")
        assert version == max(versions[name])  # one digit after the point: as text
    for file in INDEX_FILES:
        (tmp_path / "index.json").write_bytes(gzip.decompress(file.read_bytes()))
        assert read_index(str(tmp_path / "index.json")).doubled == (194 if "8xx" in file.name else 0)


def test_a_recording_of_one_tick_is_downloaded(tmp_path):
    files = {name: path.read_bytes() for name, path in ONE_TICK.items()}
    code, shown, _, report = download(files, tmp_path, [f"data/9.0/{RECORDING}.mp4"])
    assert (code, report["downloaded"], report["rejected"]) == (0, 1, 0), shown
    (line,) = (tmp_path / "out/manifest.jsonl").read_text().splitlines()
    assert (json.loads(line)["ticks"], json.loads(line)["frames"]) == (1, 2)
    # Two frames too many are another thing.
    files = {f"data/9.0/{RECORDING}.jsonl": files[f"data/9.0/{RECORDING}.jsonl"]}
    files[f"data/9.0/{RECORDING}.mp4"] = (CASES / f"{RECORDING}.mp4").read_bytes()
    code, _, _, report = download(files, tmp_path / "out", [f"data/9.0/{RECORDING}.mp4"])
    assert code == 1 and report["reasons"] == {"rejected": {"lengths differ": 1}}


# ------------------------------------------------------------------------------------------------------ built before


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A data set as built when sessions were aliases with ids: no player, and one in both splits."""
    folder = write_clips(tmp_path_factory.mktemp("before") / "data_set", train=3, validation=2)
    for file in (folder / "data").iterdir():
        pq.write_table(pq.read_table(file).drop_columns(["player_id"]), file)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_of_before_are_refused_with_what_to_do(before, streaming):
    with pytest.raises(
        ValueError, match=r"columns \['player_id'\] are missing.*data sets of before 0.2.*build it again"
    ):
        load_clips(str(before), "train", streaming=streaming)


def test_programs_refuse_data_sets_of_before(before, tmp_path):
    code, _, err = run("report_dataset.py", "--dataset", before, "--output", tmp_path / "report")
    assert code == 1 and "data sets of before 0.2" in err.splitlines()[-1]


def test_half_built_folders_of_before_are_built_again_or_refused(tmp_path):
    """What an earlier version has left: a plan without splits by player, a marker and a file under today's names."""
    folder = lay_out(tmp_path / "in", names_of({"a": 1, "b": 1}))
    output = tmp_path / "built"
    (output / ".build").mkdir(parents=True)
    (output / "data").mkdir()
    head = {"key": "k", "listing": {}, "options": {}, "selection": {}, "asks_for_validation": False}
    (output / ".build/plan.ndjson").write_text("".join(json.dumps(line) + "\n" for line in ("k", head, {"key": "t"})))
    part = {"clips": 1, "recordings": 1, "sessions": ["a-f153ac423f61"], "bytes": 5}
    (output / ".build/task-00000.json").write_text(json.dumps({"key": "t", "splits": {"train": part}}))
    (output / "data/train-00000.parquet").write_bytes(b"stale")
    code, _, err = run("build_vpt_tubelets.py", "--output", output, "--finish")
    assert code == 1 and "planned by another version of this package" in err and "Traceback" not in err
    built, report, _ = build(tmp_path, folder, "--validation_players", "b")
    assert {split: part["players"] for split, part in report["splits"].items()} == {"train": ["a"], "validation": ["b"]}
    assert len(load_dataset(str(built), split="train", cache_dir=str(tmp_path / "cache"))) == 1


def test_training_data_with_a_player_in_both_splits_is_refused(tmp_path, caplog):
    folder = write_clips(tmp_path / "clips", train=3, validation=2)
    splits = {split: load_clips(str(folder), split, streaming=True) for split in ("train", "validation")}
    check_players(str(folder), splits)
    for file in (folder / "data").glob("validation*"):
        table = pq.read_table(folder / "data" / file.name.replace("validation", "train")).slice(0, 2)
        pq.write_table(table, file)
    for streaming in (False, True):
        splits = {split: load_clips(str(folder), split, streaming=streaming) for split in splits}
        with pytest.raises(ValueError, match=re.escape("1 players are in more than one of the splits")) as refused:
            check_players(str(folder), splits)
        assert "first 'toy-0000'" in str(refused.value) and "--split_by session" in str(refused.value)
    (folder / "report.json").write_text(json.dumps({"split": {"split_by": "session"}}))
    with caplog.at_level(logging.WARNING):
        check_players(str(folder), splits)
    assert "it was split by session on request" in caplog.text
