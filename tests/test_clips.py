"""Tick arithmetic and action aggregation against brute-force loops."""

import math

import numpy as np
import pytest
from helpers_data import make_lines, oracle_actions, oracle_inputs, oracle_states, to_log
from hypothesis import given, settings
from hypothesis import strategies as st

from vjepa_ac_hf import ACTION_COLUMNS
from vjepa_ac_hf.recordings.clips import ClipSpec, aggregate_actions, clip_starts, clip_states, frame_ticks
from vjepa_ac_hf.recordings.log import parse_recording


def test_default_arithmetic():
    spec = ClipSpec()
    assert (spec.stride, spec.ticks_per_tubelet, spec.num_tubelets, spec.span) == (4, 8, 8, 61)
    assert frame_ticks(0, spec) == list(range(0, 64, 4))
    assert clip_starts(60, spec).tolist() == [] and clip_starts(61, spec).tolist() == [0]
    assert clip_starts(124, spec).tolist() == [0] and clip_starts(125, spec).tolist() == [0, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 6}, "must be a whole number, found 20 / 6"),
        ({"fps": 40}, "must be a whole number, found 20 / 40"),
        ({"fps": 0}, "must be positive, found 20 and 0"),
        ({"frames_per_clip": 15}, "multiple of tubelet_size, found 15 and 2"),
        ({"frames_per_clip": 2}, "at least 2 tubelets"),
        ({"tubelet_size": 0}, "found 16 and 0"),
        ({"clip_stride": 0}, "clip_stride must be at least 1 tick, found 0"),
    ],
)
def test_impossible_specs_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        ClipSpec(**options)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_ticks=st.integers(61, 150),
    stride=st.integers(1, 70),
    shape=st.sampled_from([(5, 16, 2), (10, 8, 2), (20, 6, 3), (4, 4, 1), (2.5, 6, 2)]),
    injection=st.sampled_from(["cause", "vpt"]),
    with_slot=st.booleans(),
)
def test_actions_and_states_equal_the_oracle(seed, num_ticks, stride, shape, injection, with_slot):
    fps, frames, tubelet = shape
    spec = ClipSpec(fps=fps, frames_per_clip=frames, tubelet_size=tubelet, clip_stride=stride)
    lines = make_lines(num_ticks, seed)
    for line in lines if not with_slot else []:
        del line["hotbar"]
        if line["mouse"]:
            line["mouse"]["dwheel"] = [0.0, 1.0, -1.0, 0.5, -2.0][int(line["mouse"]["dx"]) % 5]
    recording = parse_recording(to_log(lines), "6.8/a", hotbar_injection=injection)
    starts = clip_starts(num_ticks, spec)
    span = round(20 / fps) * (frames - 1) + 1
    assert starts.tolist() == [s for s in range(0, num_ticks, stride) if s + span <= num_ticks]
    actions, states = aggregate_actions(recording, starts, spec), clip_states(recording, starts, spec)
    assert actions.dtype == states.dtype == np.float32
    sizes = {"tubelets": frames // tubelet, "ticks": round(20 / fps) * tubelet}
    for index, start in enumerate(starts.tolist()):
        expected = oracle_actions(lines, start, gui_scale=2.0, injection=injection, **sizes)
        np.testing.assert_allclose(actions[index], expected, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(np.delete(actions[index], 2, axis=-1), np.delete(expected, 2, axis=-1))
        np.testing.assert_array_equal(states[index], oracle_states(lines, start, **sizes))


def test_column_order():
    lines = make_lines(61)
    for line in lines:
        line["hotbar"], line["isGuiOpen"], line["keyboard"] = 4, True, {"keys": ["key.keyboard.left.control"]}
        line["mouse"] = {"dx": 1, "dy": 2, "buttons": [2], "newButtons": []}
        line["yaw"] = line["pitch"] = 7.0
    action = aggregate_actions(parse_recording(to_log(lines), "a"), np.array([0]), ClipSpec())[0, 0]
    found = {column: value for column, value in zip(ACTION_COLUMNS, action.tolist(), strict=True) if value}
    assert found == {
        **{"mouse_dx": 8, "mouse_dy": 16},
        **{"key.left.control": 1, "mouse.middle": 1, "hotbar.4": 1, "gui_open": 1},
    }


def test_adjacent_clips_lose_no_tick_and_count_none_twice():
    lines = make_lines(400, seed=3)
    spec = ClipSpec(clip_stride=56)
    recording = parse_recording(to_log(lines), "a")
    starts = clip_starts(recording.num_ticks, spec)
    end = int(starts[-1]) + 56
    inputs = oracle_inputs(lines)[:end]
    total = aggregate_actions(recording, starts, spec).astype(np.float64).sum(axis=(0, 1))
    assert total[0] == sum(tick[0] for tick in inputs) and total[1] == sum(tick[1] for tick in inputs)
    assert total[3] == pytest.approx(lines[end]["pitch"] - lines[0]["pitch"], abs=1e-3)
    turn = total[2] - (lines[end]["yaw"] - lines[0]["yaw"])
    assert turn / 360 == pytest.approx(round(turn / 360), abs=1e-5)


@settings(max_examples=200, deadline=None)
@given(first=st.floats(-1e5, 1e5), turn=st.floats(-1e4, 1e4))
def test_yaw_change_is_in_the_half_open_interval(first, turn):
    lines = [dict(line, yaw=first) for line in make_lines(61)]
    for line in lines[8:]:
        line["yaw"] = first + turn
    change = aggregate_actions(parse_recording(to_log(lines), "a"), np.array([0]), ClipSpec())[0, 0, 2]
    assert -180 <= change < 180
    off = (float(change) - turn) % 360
    assert math.isclose(min(off, 360 - off), 0, abs_tol=1e-3)


def test_yaw_change_just_under_half_a_turn_stays_below_180_in_float32():
    lines = make_lines(61)
    for tick, line in enumerate(lines):
        line["yaw"] = 180 - 1e-7 if tick >= 8 else 0.0
    actions = aggregate_actions(parse_recording(to_log(lines), "a"), np.array([0]), ClipSpec())
    assert actions[0, 0, 2] == -180


def test_clips_beyond_the_recording_are_refused():
    recording = parse_recording(to_log(make_lines(70)), "rec")
    with pytest.raises(ValueError, match="rec: clips of 61 ticks that start at 0 to 10 do not fit into 70 ticks"):
        aggregate_actions(recording, np.array([0, 10]), ClipSpec())
