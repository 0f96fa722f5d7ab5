"""Which recordings and clips are built: every selection option against plain loops, repairs that are switched off."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from helpers_data import make_lines, make_video, name_of, oracle_inputs, shard_of, to_log, write_recording
from hypothesis import given, settings
from hypothesis import strategies as st

from vjepa_ac_hf.building import rows as building
from vjepa_ac_hf.building.rows import BuildReport, iter_clips, listing_report
from vjepa_ac_hf.building.selection import BuildOptions, Selection, options_from, select_recordings, selection_from
from vjepa_ac_hf.building.vpt_tubelets import VPTTubeletsConfig
from vjepa_ac_hf.processing_vjepa2_ac import resize_frames
from vjepa_ac_hf.recordings.clips import ClipSpec
from vjepa_ac_hf.recordings.log import PRESSED_COLUMNS, REPAIRS, RecordingError, parse_recording
from vjepa_ac_hf.recordings.shards import Member, RecordingEntry, Shard, list_shards, read_pairs
from vjepa_ac_hf.recordings.video import VideoReader

SPEC = ClipSpec(clip_stride=8)
NAME, TICKS = name_of("s0"), 240


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    lines = write_recording(folder, NAME, TICKS, seed=4)
    for tick in range(60, 150):  # a stretch in which the player does nothing
        lines[tick]["mouse"] = {"dx": 0, "dy": 0, "buttons": [], "newButtons": []}
        lines[tick]["keyboard"] = {"keys": []}
        lines[tick]["hotbar"] = lines[60]["hotbar"]
    (folder / f"{NAME}.jsonl").write_bytes(to_log(lines))
    return list_shards([str(shard_of(folder, folder / "shard-000000.tar", [NAME]))]), lines


def build(shards, **options):
    report = BuildReport()
    options = BuildOptions(SPEC, resolution=16, **options)
    rows = [row for shard in shards for row in iter_clips(read_pairs(shard), options, report, "train")]
    assert report.clips == len(rows) and report.accepted == len(report.per_recording)
    return rows, report


def starts_of(rows):
    return [row["start_tick"] for row in rows]


ALL_STARTS = list(range(0, TICKS - 60, 8))


def hashed(text):
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64


# ------------------------------------------------------------------------------------------------------ clips


@pytest.mark.parametrize("limit", [0, 0.2, 0.31, 1])
def test_gui_share_is_that_of_the_clips_ticks(shard, limit):
    shards, lines = shard
    share = {s: np.mean([lines[t]["isGuiOpen"] for t in range(s, s + 61)]) for s in ALL_STARTS}
    rows, report = build(shards, max_gui_fraction=limit)
    assert starts_of(rows) == [s for s in ALL_STARTS if share[s] <= limit]
    assert report.skipped_clips["max_gui_fraction"] == len(ALL_STARTS) - len(rows)


def test_no_action_covers_an_unsure_tick(tmp_path):
    lines = make_lines(TICKS, seed=4)
    for tick in (0, 100, 101, TICKS - 5):
        lines[tick]["unsure"] = True
    lines[50]["unsure"] = False
    (tmp_path / f"{NAME}.jsonl").write_bytes(to_log(lines))
    (tmp_path / f"{NAME}.mp4").write_bytes(make_video(TICKS))
    shards = list_shards([str(shard_of(tmp_path, tmp_path / "shard-000000.tar", [NAME]))])
    rows, report = build(shards)
    # The last tubelet of a clip belongs to no action of it: the clip of the last ticks is built.
    expected = [s for s in ALL_STARTS if not {0, 100, 101, TICKS - 5} & set(range(s, s + 56))]
    assert starts_of(rows) == expected and ALL_STARTS[-1] in expected and 48 not in expected and 40 in expected
    assert report.skipped_clips["unsure"] == len(ALL_STARTS) - len(expected) == 8


@pytest.mark.parametrize("limit", [0.05, 0.3, 0.9])
def test_action_share_is_that_of_the_actions_ticks(shard, limit):
    shards, lines = shard
    acted = [dx != 0 or dy != 0 or bool(down) for dx, dy, down in oracle_inputs(lines)]
    share = {s: np.mean(acted[s : s + 56]) for s in ALL_STARTS}
    rows, report = build(shards, min_action_fraction=limit)
    expected = [s for s in ALL_STARTS if share[s] >= limit]
    assert starts_of(rows) == expected and 0 < len(expected) < len(ALL_STARTS)
    assert report.skipped_clips["min_action_fraction"] == len(ALL_STARTS) - len(rows)


def test_clip_fraction_is_a_stable_hash_and_nested(shard):
    shards, _ = shard
    small, medium = (starts_of(build(shards, clip_fraction=f)[0]) for f in (0.3, 0.6))
    assert medium == [s for s in ALL_STARTS if hashed(f"{NAME}@{s}") < 0.6]
    assert set(small) < set(medium)


def test_every_left_out_clip_is_counted_once(shard):
    shards, _ = shard
    options = {"max_gui_fraction": 0.31, "min_action_fraction": 0.3, "clip_fraction": 0.6}
    capped, skipped = select_recordings(shards, Selection(max_clips_per_session=2))
    assert not any(skipped.values())
    rows, report = build(capped, **options)
    assert len(rows) == 2 and [k for k, n in report.skipped_clips.items() if not n] == ["missing_frames", "unsure"]
    assert sum(report.skipped_clips.values()) == len(ALL_STARTS) - 2
    # The cap keeps, of the clips that are left, those that come first by hash, in order of time.
    rest = starts_of(build(shards, **options)[0])
    assert starts_of(rows) == sorted(sorted(rest, key=lambda s: hashed(f"{NAME}@{s}"))[:2])
    (entry,) = report.per_recording
    assert (
        entry.skipped_clips == {k: n for k, n in report.skipped_clips.items() if n}
        and entry.clips == 2
        and entry.split == "train"
    )


def test_the_report_of_a_recording_counts_its_repairs_and_ticks(shard):
    shards, lines = shard
    _, report = build(shards)
    (entry,) = report.per_recording
    assert (entry.recording, entry.shard, entry.ticks) == (NAME, "shard-000000.tar", TICKS)
    assert (entry.player, entry.session) == ("silly-s0", "silly-s0-20220101")
    assert entry.gui_ticks == sum(line["isGuiOpen"] for line in lines)
    assert entry.repairs["null_mouse"] == sum(line["mouse"] is None for line in lines) > 0
    assert "mouse_scaled" not in entry.repairs and "frames_timed" not in entry.repairs
    assert {**dict.fromkeys(REPAIRS, 0), **entry.repairs} == report.repairs
    again = BuildReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report


# ------------------------------------------------------------------------------------------------------ recordings


def listed(sessions: dict[str, int], num_shards=3):
    """Shards of recordings that are never read."""
    entries = [
        RecordingEntry(name_of(session, segment), None, Member("a.tar", 0, 1), Member("a.tar", 1, 1))
        for session, segments in sessions.items()
        for segment in range(segments)
    ]
    return [Shard(f"{i}.tar", f"{i}.tar", entries[i::num_shards]) for i in range(num_shards)]


def entries_of(shards):
    return {entry.recording_id: entry for shard in shards for entry in shard.entries}


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 7), min_size=1, max_size=8),
    st.integers(1, 20),
    st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_a_session_gets_its_clips_whatever_the_shards(sessions, limit, num_shards):
    shards = listed(sessions, num_shards)
    selected, skipped = select_recordings(shards, Selection(max_clips_per_session=limit))
    kept = entries_of(selected)
    assert skipped["max_clips_per_session"] == len(entries_of(shards)) - len(kept)
    assert len(selected) == len(shards)
    for session, segments in sessions.items():
        quotas = [entry.max_clips for entry in kept.values() if entry.session_id == f"silly-{session}-20220101"]
        assert sum(quotas) == limit and max(quotas) - min(quotas) <= 1 and len(quotas) == min(segments, limit)
    assert kept == entries_of(select_recordings(listed(sessions, 1), Selection(max_clips_per_session=limit))[0])


def test_a_cap_is_for_what_a_player_began_on_one_day():
    names = [name_of("a", 0), name_of("a", 1), name_of("a", 0, day=20220214), name_of("b", 0)]
    entries = [RecordingEntry(name, None, Member("a.tar", 0, 1), Member("a.tar", 1, 1)) for name in names]
    selected, _ = select_recordings([Shard("a.tar", "a.tar", entries)], Selection(max_clips_per_session=10))
    assert [entries_of(selected)[name].max_clips for name in names] == [5, 5, 10, 10]


def test_session_fraction_is_nested_and_does_not_touch_the_choice_of_validation():
    shards = listed({f"x{i}": 2 for i in range(400)})
    few, more = (entries_of(select_recordings(shards, Selection(session_fraction=f))[0]) for f in (0.2, 0.5))
    assert set(few) < set(more) and 130 < len(few) < 200
    sessions = {entry.session_id for entry in few.values()}
    assert all(sum(e.session_id == s for e in few.values()) == 2 for s in sessions), "sessions are kept whole"
    # Were both chosen by the same hash, a tenth for validation would be half of a fifth.
    assert 0.04 < np.mean([hashed(session) < 0.1 for session in sessions]) < 0.2


def test_excluded_recordings_are_not_read_and_counted():
    shards = listed({"a": 3})
    kept, skipped = select_recordings(shards, Selection(exclude=(name_of("a", 1), "not-there")))
    assert set(entries_of(kept)) == {name_of("a", 0), name_of("a", 2)} and skipped["exclude"] == 1
    report = listing_report(shards)
    report.skip(skipped)
    assert report.recordings == report.skipped_recordings["exclude"] == 1


# ------------------------------------------------------------------------------------------------------ one pass


@pytest.mark.parametrize("stride", [1, 5, 20, 30, 64, 100])
def test_a_video_is_decoded_in_one_pass(shard, monkeypatch, stride):
    shards, _ = shard
    asked = []

    class Spy(VideoReader):
        def frames(self, indices):
            asked.extend(indices)
            assert len(indices) <= 16
            return super().frames(indices)

    clips = []
    monkeypatch.setattr(building, "VideoReader", Spy)
    monkeypatch.setattr(building, "encode_clip", lambda frames, fps: clips.append(frames.clone()) or b"")
    options = BuildOptions(ClipSpec(clip_stride=stride), resolution=16)
    rows = [row for s in shards for row in iter_clips(read_pairs(s), options, BuildReport())]
    assert all(a < b for a, b in itertools.pairwise(asked)), "never back, none twice"
    assert set(asked) == {row["start_tick"] + 4 * j for row in rows for j in range(16)}, "only what is needed"
    pair = next(read_pairs(shards[0]))
    whole = VideoReader(pair.video, "whole").frames(range(TICKS))
    assert len(clips) == len(rows) > 2 - (stride == 100)
    for row, clip in zip(rows, clips, strict=True):
        ticks = [row["start_tick"] + 4 * j for j in range(16)]
        assert torch.equal(clip, resize_frames(whole[ticks], 16))


# ------------------------------------------------------------------------------------------------------ repairs


def faulty_lines():
    lines = make_lines(30, seed=1)
    for line in lines:
        line["mouse"] = line["mouse"] or {"dx": 1, "dy": 1, "buttons": [], "newButtons": []}
        line["keyboard"] = {"keys": []}
        line["mouse"]["buttons"] = [b for b in line["mouse"]["buttons"] if b < 3]
    return lines


def test_attack_slots_and_mouse_stay_as_logged_where_repairs_are_off():
    lines = faulty_lines()
    skip = ["stuck_attack", "hotbar_injected", "mouse_scaled"]
    recording = parse_recording(to_log(lines), "6.8/a", skip_repairs=skip)
    assert recording.mouse_dx.tolist() == [line["mouse"]["dx"] for line in lines]
    assert recording.pressed[:, PRESSED_COLUMNS.index("mouse.left")].tolist() == [
        0 in line["mouse"]["buttons"] for line in lines
    ]
    assert not recording.pressed[:, :9].any() and not any(recording.repairs.values())
    repaired = parse_recording(to_log(lines), "6.8/a")
    assert all(repaired.repairs[name] for name in skip)


@pytest.mark.parametrize(
    ("repair", "field", "value", "found"),
    [
        ("null_mouse", "mouse", None, "null"),
        ("null_keyboard", "keyboard", None, "null"),
        ("unknown_buttons", "mouse.buttons", {"dx": 0, "dy": 0, "buttons": [0, 7]}, r"\[7.0\]"),
    ],
)
def test_what_cannot_be_used_as_logged_is_an_error_where_its_repair_is_off(repair, field, value, found):
    lines = faulty_lines()
    lines[12][field.split(".")[0]] = value
    assert parse_recording(to_log(lines), "a").repairs[repair] == 1
    message = rf"^a: line 13: field '{field}': found {found}, and the repair '{repair}' is switched off$"
    with pytest.raises(RecordingError, match=message):
        parse_recording(to_log(lines), "a", skip_repairs=[repair])


# ------------------------------------------------------------------------------------------------------ bad options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_repairs": ["stuck_atack"]}, r"among .*'stuck_attack'.* found \['stuck_atack'\]"),
        ({"skip_repairs": "stuck_attack"}, r"must be a list of names .* found \['stuck_attack'\]"),
        ({"exclude": "name"}, "exclude must be a list of recording ids, found 'name'"),
        ({"session_fraction": 0}, r"session_fraction must be in \(0, 1\], found 0"),
        ({"clip_fraction": 1.5}, r"clip_fraction must be in \(0, 1\], found 1.5"),
        ({"min_action_fraction": -1}, r"min_action_fraction must be in \[0, 1\], found -1"),
        ({"max_clips_per_session": 0}, "max_clips_per_session must be at least 1, found 0"),
    ],
)
def test_options_out_of_range_are_refused_before_any_file_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        VPTTubeletsConfig(**options)


def test_a_builders_configuration_gives_options_and_selection():
    config = VPTTubeletsConfig(
        skip_repairs=["stuck_attack", "null_mouse", "stuck_attack"], exclude=["b", "a"], clip_fraction=0.5
    )
    assert options_from(vars(config)) == config.build_options
    assert (
        config.build_options.skip_repairs == ("null_mouse", "stuck_attack")
        and config.build_options.clip_fraction == 0.5
    )
    assert selection_from(vars(config)) == config.selection == Selection(exclude=("a", "b"))
