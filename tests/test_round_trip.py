"""Log -> actions -> log -> actions: what is written for a clip's actions says the same again."""

import numpy as np
import pytest
from helpers_data import DATA, LUANTI, make_lines, to_log
from hypothesis import given, settings
from hypothesis import strategies as st

from vjepa_ac_hf import ACTION_COLUMNS
from vjepa_ac_hf.planning.environments import VPTLog, to_vpt_lines
from vjepa_ac_hf.recordings.clips import ClipSpec, aggregate_actions, clip_starts, clip_states
from vjepa_ac_hf.recordings.log import parse_recording

AT = {name: i for i, name in enumerate(ACTION_COLUMNS)}


def actions_of(log: bytes, spec: ClipSpec) -> tuple[np.ndarray, np.ndarray]:
    """All actions of a log, one after the other, float64 (steps, 38), and the first state."""
    recording = parse_recording(log, "rec")
    starts = clip_starts(recording.num_ticks, spec)
    actions = aggregate_actions(recording, starts, spec).astype(np.float64)
    return actions.reshape(-1, len(ACTION_COLUMNS)), clip_states(recording, starts, spec)[0, 0]


def assert_same_actions(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(found[:, 4:], expected[:, 4:])
    np.testing.assert_allclose(found[:, :2], expected[:, :2], atol=1e-3)
    np.testing.assert_allclose((found[:, 2] - expected[:, 2] + 180) % 360 - 180, 0, atol=1e-2)
    np.testing.assert_allclose(found[:, 3], expected[:, 3], atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_ticks=st.integers(70, 200),
    slots=st.sampled_from(["logged", "none", "from the middle"]),
    whole_mouse=st.booleans(),
    parts=st.integers(1, 5),
)
def test_actions_of_a_log_written_as_a_log_are_read_again(seed, num_ticks, slots, whole_mouse, parts):
    lines = make_lines(num_ticks, seed)
    for tick, line in enumerate(lines):
        if slots == "none":
            del line["hotbar"]
        if slots == "from the middle" and tick < 40:
            line["hotbar"] = None
        if line["mouse"]:
            line["mouse"]["dwheel"] = [0.0, -1.0, 1.0, 0.0][tick % 4]
    spec = ClipSpec(frames_per_clip=4, clip_stride=8)  # a clip of one action: its next begins where it ends
    actions, state = actions_of(to_log(lines), spec)
    written = VPTLog(state, whole_mouse=whole_mouse)
    log = [line for part in np.array_split(actions, parts) for line in written.add(part)]
    log += written.finish()
    assert whole_mouse or log == to_vpt_lines(actions, state)
    again, _ = actions_of(to_log([*log, *written.idle(spec.span - 8)]), spec)
    assert_same_actions(again, actions)


def test_of_a_recording_of_play():
    spec = ClipSpec(clip_stride=56)
    actions, state = actions_of((DATA / f"{LUANTI}.jsonl").read_bytes(), spec)
    written = VPTLog(state)
    log = [*written.add(actions), *written.finish(), *written.idle(8)]
    assert actions[:, AT["key.1"] : AT["key.9"] + 1].sum() >= 5
    again, _ = actions_of(to_log(log), spec)
    assert_same_actions(again, actions)


@pytest.mark.parametrize("ticks", [1, 3])
def test_a_slot_that_no_key_explains_is_a_key_of_the_action_before(ticks):
    """What a head tells need not fit together: the reader adds the key where the change was caused."""
    actions = np.zeros((3, 38))
    actions[0, AT["hotbar.2"]] = actions[1, AT["hotbar.7"]] = 1
    lines = to_vpt_lines(actions, (0, 0), ticks_per_step=ticks)
    assert [line["hotbar"] for line in lines] == [2] * ticks + [7] * ticks + [None] * ticks
    found = parse_recording(to_log(lines), "rec")
    assert np.argwhere(found.pressed).tolist() == [[ticks - 1, 7]] and found.repairs["hotbar_injected"] == 1
