"""The processor: geometry, normalisation, statistics, integrated states; numbers against plain numpy."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from vjepa_ac_hf import ACTION_COLUMNS, ACTION_SPACES, ActionStatistics, VJEPA2ACProcessor, resolve_action_space
from vjepa_ac_hf.processing_vjepa2_ac import add_view_changes, resize_frames, wrap_degrees

STATISTICS = {
    "columns": ["mouse_dx", "mouse_dy", "yaw_delta", "pitch_delta"],
    "count": 100,
    "mean": [1.0, -2.0, 0.5, 0.25],
    "std": [10.0, 20.0, 4.0, 0.0],
}


def raw_actions(seed: int = 0, shape: tuple = (3, 7)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    actions = (rng.random((*shape, 38)) < 0.3).astype(np.float32)
    actions[..., :4] = rng.normal(0, 20, (*shape, 4))
    return actions


def test_action_spaces():
    assert len(ACTION_COLUMNS) == 38 and len(set(ACTION_COLUMNS)) == 38
    assert resolve_action_space("vpt-13") == list(ACTION_COLUMNS[:13])
    assert len(ACTION_SPACES["vpt-36"]) == 36 and list(ACTION_SPACES["vpt-38"]) == list(ACTION_COLUMNS)
    assert resolve_action_space(["key.w", "yaw_delta"]) == ["key.w", "yaw_delta"]
    for bad, message in ((["key.w", "key.w"], "more than once"), ([], "at least one"), (["kye.w"], "did you mean")):
        with pytest.raises(ValueError, match=message):
            resolve_action_space(bad)


@pytest.mark.parametrize("space", ["vpt-13", "vpt-36", "vpt-38", ["pitch_delta", "key.w", "mouse_dx"]])
def test_actions_are_selected_and_standardised(space):
    processor = VJEPA2ACProcessor(action_space=space, action_statistics=STATISTICS)
    actions = raw_actions()
    found = processor(actions=actions)["actions"]
    assert found.dtype == torch.float32
    for i, column in enumerate(resolve_action_space(space)):
        raw = actions[..., ACTION_COLUMNS.index(column)].astype(np.float64)
        if column in STATISTICS["columns"]:
            at = STATISTICS["columns"].index(column)
            raw = (raw - STATISTICS["mean"][at]) / (STATISTICS["std"][at] or 1.0)
        np.testing.assert_allclose(found[..., i], raw, rtol=1e-6, atol=1e-6)
    selected = actions[..., [ACTION_COLUMNS.index(c) for c in resolve_action_space(space)]]
    torch.testing.assert_close(processor(actions=selected)["actions"], found)
    np.testing.assert_allclose(processor.denormalize_actions(found), selected, rtol=1e-5, atol=1e-5)


EDGES = [0.0, 0.15, -1e-9, 90.0, 180.0, -180.0, 360.0, 540.0, -540.0, 1234.56, -98765.4321]
EDGES += [math.nextafter(edge, side) for edge in EDGES for side in (-math.inf, math.inf)]


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, torch.float64, torch.float32])
def test_wrapped_angles_are_exact_and_half_open(kind):
    if isinstance(kind, torch.dtype):
        angles = torch.tensor(EDGES, dtype=kind)
    else:
        angles = np.array(EDGES, dtype=kind)
    given = [float(x) for x in angles]
    found = [wrap_degrees(x) for x in given] if kind is float else wrap_degrees(angles)
    assert kind is float or str(found.dtype).removeprefix("torch.") == (
        "float32" if kind is torch.float32 else "float64"
    )
    for angle, wrapped in zip(given, found, strict=True):
        turns = (Fraction(angle) + 180) // 360  # exact arithmetic
        assert Fraction(float(wrapped)) == Fraction(angle) - 360 * turns, angle
        assert -180 <= wrapped < 180


def test_view_changes_add_up_one_after_the_other():
    view = torch.tensor([[170.0, 80.0], [0.0, 0.0]], dtype=torch.float64)
    changes = torch.tensor([[[20.0, 30.0], [-5.0, -1.0]], [[-190.0, -100.0], [0.5, 2.0]]], dtype=torch.float64)
    found = add_view_changes(view, changes).tolist()
    assert found == [[[-170.0, 90.0], [-175.0, 89.0]], [[170.0, -90.0], [170.5, -88.0]]]
    assert add_view_changes(view, changes[:, :0]).shape == (2, 0, 2)


def test_states_wrap_in_degrees():
    states = [[[0, 0], [180, 90], [-180, -90], [179.5, 45], [540, 0], [-3600.25, 1], [725, -1]]]
    found = VJEPA2ACProcessor()(states=states)["states"]
    yaw = [0, -180, -180, 179.5, -180, -0.25, 5]
    np.testing.assert_allclose(found[0, :, 0] * 180, yaw, atol=1e-4)
    np.testing.assert_allclose(found[0, :, 1] * 90, [0, 90, -90, 45, 0, 1, -1], atol=1e-5)


@given(
    start=st.tuples(st.floats(-2000, 2000), st.floats(-90, 90)),
    deltas=st.lists(st.tuples(st.floats(-170, 170), st.floats(-80, 80)), min_size=1, max_size=9),
    known=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_integrated_states_equal_a_loop(start, deltas, known):
    processor = VJEPA2ACProcessor(action_statistics=STATISTICS | {"std": [10.0, 20.0, 4.0, 3.0]})
    known = min(known, len(deltas) + 1)
    yaw, pitch = start
    expected = [(yaw, pitch)]
    for dyaw, dpitch in deltas:
        yaw, pitch = yaw + dyaw, min(max(pitch + dpitch, -90.0), 90.0)
        expected.append((yaw, pitch))
    raw = np.zeros((1, len(deltas), 38))
    raw[0, :, 2:4] = deltas
    states = processor.normalize_states(np.array([expected[:known]]))
    found = processor.integrate_states(states, processor(actions=raw)["actions"])
    assert found.shape == (1, len(deltas) + 1, 2)
    difference = (found.double() * torch.tensor([180.0, 90.0]) - torch.tensor([expected], dtype=torch.float64)).numpy()
    difference[..., 0] = (difference[..., 0] + 180) % 360 - 180
    np.testing.assert_allclose(difference, 0, atol=5e-3)
    assert found[..., 0].min() >= -1 and found[..., 0].max() <= 1 and found[..., 1].abs().max() <= 1
    torch.testing.assert_close(found[:, :known], states, rtol=0, atol=0)


def test_recorded_clips_are_reproduced_from_their_first_state():
    rng = np.random.default_rng(0)
    actions = raw_actions(1, (2, 7))
    actions[..., 2:4] = rng.normal(0, 8, (2, 7, 2))
    start = np.array([[[170.0, 3.0]], [[-900.0, -4.0]]])
    recorded = np.concatenate([start, start + actions[..., 2:4].cumsum(axis=1)], axis=1)
    processor = VJEPA2ACProcessor(action_statistics=STATISTICS)
    inputs = processor(actions=actions, states=recorded)
    found = processor.integrate_states(inputs["states"][:, 0], inputs["actions"])
    torch.testing.assert_close(found, inputs["states"], rtol=0, atol=1e-5)


def test_pixels_are_standardised_whatever_their_layout():
    frames = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
    processor = VJEPA2ACProcessor(resolution=64)
    found = processor(videos=[frames])["pixel_values_videos"]
    expected = (frames.numpy() / 255 - np.reshape([0.485, 0.456, 0.406], (3, 1, 1))) / np.reshape(
        [0.229, 0.224, 0.225], (3, 1, 1)
    )
    assert found.shape == (1, 16, 3, 64, 64) and found.dtype == torch.float32
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    as_numpy = processor(videos=[frames.permute(0, 2, 3, 1).numpy()])["pixel_values_videos"]
    batched = processor(videos=frames[None])["pixel_values_videos"]
    torch.testing.assert_close(as_numpy, found)
    torch.testing.assert_close(batched, found)


def test_geometry_keeps_the_hotbar():
    """A whole-height crop: the lowest rows of the frame (Minecraft's hotbar) are the lowest rows of the result."""
    frames = torch.zeros(2, 3, 360, 640, dtype=torch.uint8)
    frames[:, :, 340:] = 255  # the lowest 5.6 %, which a resize to 292 with a 256 crop would cut off
    cropped = resize_frames(frames, 256)
    assert cropped.shape == (2, 3, 256, 256)
    assert (cropped[:, :, 243:] == 255).all() and (cropped[:, :, :241] == 0).all()
    frames = torch.zeros(1, 3, 360, 640, dtype=torch.uint8)
    frames[..., :100] = 255
    assert (resize_frames(frames, 256)[..., 0] == 0).all()  # the sides are cut
    assert (resize_frames(frames, 256, "squash")[..., :39] == 255).all()  # and kept when squashed
    middle = torch.zeros(1, 3, 360, 640, dtype=torch.uint8)
    middle[..., 310:330] = 200
    columns = resize_frames(middle, 256)[0, 0, 128].nonzero().flatten().float()
    assert abs(columns.mean().item() - 127.5) < 1


def test_downscaling_is_antialiased():
    stripes = (torch.arange(512) % 2 * 255).to(torch.uint8).expand(1, 3, 512, 512)
    found = resize_frames(stripes.contiguous(), 64)
    assert found.min() > 100 and found.max() < 155  # without antialiasing: all 0 or all 255


def test_saved_processor_keeps_everything(tmp_path):
    processor = VJEPA2ACProcessor(resolution=64, action_space=["yaw_delta", "key.w"], action_statistics=STATISTICS)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["action_statistics"] == STATISTICS and saved["action_space"] == ["yaw_delta", "key.w"]
    assert not list(tmp_path.glob("*.pkl"))
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, VJEPA2ACProcessor) and loaded.resolution == 64
    torch.testing.assert_close(loaded(actions=raw_actions())["actions"], processor(actions=raw_actions())["actions"])
    saved["resolutoin"] = 3
    (tmp_path / "processor_config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="unknown keys \\['resolutoin'\\]"):
        AutoProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(actions=raw_actions()), "statistics are missing.*'mouse_dx'"),
        (lambda p: p(actions=np.zeros((1, 7, 12))), "all 38 columns or the 13.*found 12"),
        (lambda p: p(states=np.zeros((1, 8, 3))), r"2 columns.*\(1, 8, 3\)"),
        (lambda p: p(states=np.full((1, 8, 2), np.nan)), "not finite"),
        (lambda p: p(videos=[torch.zeros(16, 3, 8, 8)]), "uint8.*float32"),
        (lambda p: p(videos=[torch.zeros(15, 3, 8, 8, dtype=torch.uint8)]), r"tubelet_size 2; found \[15\]"),
        (lambda p: p.set_action_statistics(STATISTICS | {"mean": [1.0]}), r"mean must be 4 finite.*\[1.0\]"),
        (lambda p: p.set_action_statistics({"mean": [0.0] * 4}), "lack the fields.*columns"),
        (lambda p: VJEPA2ACProcessor(resize_mode="stretch"), "'stretch'"),
        (lambda p: VJEPA2ACProcessor(frames_per_clip=15), "15 is not a multiple of tubelet_size 2"),
        (lambda p: VJEPA2ACProcessor(action_space=["key.w"]).integrate_states(torch.zeros(1, 2), torch.zeros(1, 3, 1)),
         "lacks \\['yaw_delta', 'pitch_delta'\\]"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(VJEPA2ACProcessor())


@given(parts=st.lists(st.integers(0, 40), min_size=1, max_size=5), offset=st.floats(-1e4, 1e4))
@settings(max_examples=40, deadline=None)
def test_statistics_merge_to_those_of_the_whole(parts, offset):
    actions = np.concatenate([raw_actions(i, (n,)) for i, n in enumerate(parts)]) + offset
    merged, start = ActionStatistics(), 0
    for n in parts:
        merged.merge(ActionStatistics().update(actions[start : start + n]))
        start += n
    assert merged.count == len(actions)
    if len(actions):
        np.testing.assert_allclose(merged.mean, actions[:, :4].mean(0, dtype=np.float64), rtol=1e-9)
        np.testing.assert_allclose(merged.std, actions[:, :4].std(0, dtype=np.float64), rtol=1e-6, atol=1e-8)
        again = ActionStatistics.from_dict(json.loads(json.dumps(merged.to_dict())))
        np.testing.assert_allclose(again.std, merged.std)


def test_statistics_refuse_what_they_cannot_use():
    with pytest.raises(ValueError, match=r"38 action columns, found shape \(3, 13\)"):
        ActionStatistics().update(np.zeros((3, 13)))
    with pytest.raises(ValueError, match="not finite"):
        ActionStatistics().update(np.full((3, 38), np.inf))
