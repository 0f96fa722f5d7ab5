"""The ViZDoom environment: what the model sees in the loop is what the builder makes of a recording of it."""

import contextlib
import functools
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vizdoom")
gymnasium = pytest.importorskip("gymnasium")

from datasets import load_dataset
from gymnasium.utils.env_checker import check_env
from test_modeling import tiny_model

from vjepa_ac_hf import ACTION_COLUMNS, VJEPA2ACProcessor
from vjepa_ac_hf.envs import (
    DiscreteActions,
    GoalViewWrapper,
    ModelStepWrapper,
    RecordVPT,
    VizDoomVPTEnv,
    VJEPA2ACFeatureWrapper,
    make_steps,
    raw_action,
    view_distance,
)
from vjepa_ac_hf.envs.vizdoom_env import PRESSED_COLUMNS
from vjepa_ac_hf.processing_vjepa2_ac import resize_frames
from vjepa_ac_hf.recordings.shards import write_tar

RESOLUTION = "160x120"
IDLE = {"mouse": np.zeros(2, np.int32), "pressed": np.zeros(24, np.int8)}


@pytest.fixture(scope="module")
def env():
    env = VizDoomVPTEnv(resolution=RESOLUTION, render_mode="rgb_array")
    yield env
    env.close()


@pytest.fixture(scope="module")
def steps(env):
    return ModelStepWrapper(env)


def press(*keys: str, dx: int = 0, dy: int = 0) -> dict:
    return {"mouse": np.array([dx, dy]), "pressed": np.isin(PRESSED_COLUMNS, keys)}


def play(env, seed: int, ticks: int = 40) -> list:
    rng = np.random.default_rng(1)
    seen, info = env.reset(seed=seed)
    found = [(seen["frame"], seen["state"], info["position"])]
    for _ in range(ticks):
        dx, dy = rng.integers(-60, 60), rng.integers(-9, 9)
        keys = [key for key in ("key.w", "key.a", "key.3", "key.1") if rng.random() < 0.3]
        seen, _, terminated, _, info = env.step(press(*keys, dx=dx, dy=dy))
        assert not terminated
        found.append((seen["frame"], seen["state"], info["position"]))
    return found


def same(first: list, second: list) -> bool:
    return all(np.array_equal(x, y) for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True))


def test_gymnasium_accepts_it(env, steps):
    made = gymnasium.make("vjepa_ac_hf/VizDoomVPT-v0", resolution=RESOLUTION, max_ticks=5)
    assert made.unwrapped.max_ticks == 5 and {"VizDoomVPTGoal-v0", "VizDoomVPTSteps-v0"} <= {
        name.split("/")[-1] for name in gymnasium.registry
    }
    made.unwrapped.render_mode = "rgb_array"
    made.unwrapped.spec = None
    check_env(made.unwrapped)
    made.close()
    check_env(steps, skip_render_check=True)
    check_env(DiscreteActions(GoalViewWrapper(steps)), skip_render_check=True)


def test_specifications_make_the_same_environment_again(tmp_path):
    """`gymnasium.make(env.spec)` with every wrapper of ours, and `check_env` around what it makes."""
    processor = VJEPA2ACProcessor(resolution=32)
    made = gymnasium.make("vjepa_ac_hf/VizDoomVPT-v0", resolution=RESOLUTION)
    recorded = RecordVPT(made, tmp_path / "recordings", alias="again-1")
    goals = GoalViewWrapper(ModelStepWrapper(recorded), steps=(1, 1), turn=(12.0, 20.0), max_steps=3)
    env = DiscreteActions(VJEPA2ACFeatureWrapper(goals, tiny_model().eval(), processor, still_keys=("goal",)))
    for wrapped in (goals, env, gymnasium.make("vjepa_ac_hf/VizDoomVPTGoal-v0", resolution=RESOLUTION, max_steps=4)):
        again = gymnasium.make(wrapped.spec)
        assert again.observation_space == wrapped.observation_space and again.action_space == wrapped.action_space
        assert again.get_wrapper_attr("max_steps") == wrapped.get_wrapper_attr("max_steps")
        if wrapped is env:
            check_env(again, skip_render_check=True)
        again.close()
    env.close()


def test_what_needs_a_begun_episode_says_so():
    plain = VizDoomVPTEnv(resolution=RESOLUTION, render_mode="rgb_array")
    steps = ModelStepWrapper(plain)
    features = VJEPA2ACFeatureWrapper(steps, tiny_model().eval(), VJEPA2ACProcessor(resolution=32), frame_key="tubelet")
    action = np.zeros(38, np.float32)
    for call in (
        plain.render,
        steps.render,
        lambda: plain.step(press()),
        lambda: steps.step(action),
        lambda: GoalViewWrapper(steps).step(action),
        lambda: DiscreteActions(GoalViewWrapper(steps)).step(0),
        lambda: features.step(action),
    ):
        with pytest.raises(RuntimeError, match=r"begun: call reset\(\)"):
            call()
    plain.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["make_vec", "function"])
def test_processes_started_anew_need_no_import(how):
    options = {"resolution": RESOLUTION}
    if how == "make_vec":
        vector = gymnasium.make_vec(
            "vjepa_ac_hf/VizDoomVPTSteps-v0",
            num_envs=2,
            vectorization_mode="async",
            vector_kwargs={"context": "spawn"},
            **options,
        )
    else:
        make = functools.partial(make_steps, **options)
        vector = gymnasium.vector.AsyncVectorEnv([make, make], context="spawn")
    seen, _ = vector.reset(seed=[3, 4])
    vector.close()
    with contextlib.closing(make_steps(**options)) as alone:
        assert np.array_equal(seen["frame"][1], alone.reset(seed=4)[0]["frame"])


def test_seed_and_actions_decide_everything(env):
    first = play(env, 3)
    assert not same(first, play(env, 4))
    assert same(first, play(env, 3))  # after other play in the same engine
    other = VizDoomVPTEnv(resolution=RESOLUTION)
    assert same(first, play(other, 3))
    other.close()


def test_mouse_and_keys_do_what_they_say(env):
    seen, before = env.reset(seed=0)
    start = seen["state"]
    for _ in range(5):
        seen, _, _, _, info = env.step(press(dx=100, dy=20))
    np.testing.assert_allclose(seen["state"] - start, [5 * 15, 5 * 3], atol=0.1)  # right, down: both grow
    np.testing.assert_array_equal(info["position"], before["position"])
    for _ in range(30):  # beyond a whole turn: unwrapped
        seen, *_ = env.step(press(dx=100))
    np.testing.assert_allclose(seen["state"][0] - start[0], 35 * 15, atol=0.5)
    # Along the view: yaw 0 looks along x, and grows towards negative y.
    _, info = env.reset(seed=6)
    for key, sign in (("key.w", 1), ("key.s", -1)):
        for _ in range(12):
            env.step(IDLE)
        before = env.position
        for _ in range(4):
            env.step(press(key))
        moved = (env.position - before)[:2]
        yaw = math.radians(env.view[0])
        ahead = np.array([math.cos(yaw), -math.sin(yaw)])
        assert sign * (moved @ ahead) > 15 and abs(np.cross(moved, ahead)) < 1, (key, moved, ahead)
    slots = []
    for key in ("key.3", "key.1"):
        env.step(press(key))
        for _ in range(30):
            *_, info = env.step(IDLE)
        slots.append(info["hotbar"])
    assert slots == [2, 0]


def test_blocked_means_that_a_wall_is_there(env):
    env.reset(seed=0)
    free = []
    for _ in range(150):
        clear = env.walls.clearance(*env.position[:2], env.view[0])["w"]
        *_, info = env.step(press("key.w"))
        free.append((clear, info["blocked"]))
    assert free[-1][1] and all(clear < 25 for clear, blocked in free if blocked)
    assert not any(blocked for clear, blocked in free if clear > 60)
    *_, info = env.step(press("key.w", "key.s"))
    assert not info["blocked"]  # both cancel: nothing was to be done


def random_action(rng: np.random.Generator) -> np.ndarray:
    keys = [key for key in ("key.w", "key.d", "key.2", "key.4", "key.space", "mouse.left") if rng.random() < 0.4]
    # Every tick differs from the next by degrees: a frame of another tick would be noticed.
    return raw_action(turn=rng.choice([-1, 1]) * rng.uniform(15, 40), look=rng.normal(0, 4), pressed=keys)


def test_the_loop_is_what_the_builder_makes_of_its_recording(tmp_path, monkeypatch):
    ticks = VizDoomVPTEnv(resolution="256x144")
    frames = []
    step = ticks.step
    monkeypatch.setattr(ticks, "step", lambda action: (frames.append(ticks._frame), step(action))[1])
    env = ModelStepWrapper(RecordVPT(ticks, tmp_path / "play"))
    rng = np.random.default_rng(0)
    seen, _ = env.reset(seed=11)
    states, tubelets, actions = [seen["state"]], [], []
    first = random_action(rng)
    first[ACTION_COLUMNS.index("mouse.left")] = 1  # from the start: a reader must not take it for the stuck attack
    for step_index in range(16):
        commanded = first if step_index == 0 else random_action(rng)
        seen, _, terminated, _, info = env.step(commanded)
        assert not terminated and info["ticks"] == 8
        np.testing.assert_array_equal(info["action"][:2], commanded[:2])
        np.testing.assert_allclose(info["action"][2:4], commanded[2:4], atol=0.15)
        pressed = commanded[4:28] == 1
        assert (info["action"][4:28][pressed] == 1).all()
        states.append(seen["state"])
        tubelets.append(seen["tubelet"])
        actions.append(info["action"])
    env.close()
    # Slots change, and what led to it is in the action before.
    slots = [int(done[28:37].argmax()) for done in actions]
    changes = [(done, slot) for done, old, slot in zip(actions, slots, slots[1:], strict=False) if old != slot]
    assert changes and all(done[4 + slot] == 1 for done, slot in changes)
    (log,) = (tmp_path / "play").glob("*.jsonl")
    write_tar(tmp_path / "shard-000000.tar", [(f.name, f) for f in (log.with_suffix(".mp4"), log)])
    clips = load_dataset(
        "vpt_tubelets",
        data_files=str(tmp_path / "*.tar"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
        resolution=64,
        resize_mode="squash",
        clip_stride=8,
        validation_fraction=0.0,
    ).with_format("numpy")
    assert len(clips) == 9
    every = resize_frames(torch.from_numpy(np.stack(frames)).movedim(-1, 1), 64, "squash").float()
    for clip in clips:
        k = int(clip["start_tick"]) // 8
        np.testing.assert_array_equal(clip["actions"], np.stack(actions[k : k + 7]))
        np.testing.assert_array_equal(clip["states"], np.stack(states[k : k + 8]))
        built = clip["video"].get_frames_in_range(0, 16).data.float()
        looped = np.concatenate(tubelets[k : k + 8])
        looped = resize_frames(torch.from_numpy(looped).movedim(-1, 1), 64, "squash").float()
        assert (built - looped).abs().mean() < 5
        # Among all ticks, the one that the loop took is nearest to what the builder took.
        nearest = [(every - frame).abs().mean(dim=(1, 2, 3)).argmin().item() for frame in built]
        assert nearest == list(range(8 * k, 8 * k + 64, 4))


@settings(max_examples=60, deadline=None)
@given(st.floats(-9600, 9600), st.floats(-9600, 9600), st.sets(st.sampled_from(PRESSED_COLUMNS)))
def test_an_action_is_spread_over_the_ticks(steps, dx, dy, keys):
    action = raw_action(pressed=sorted(keys))
    action[:2] = dx, dy
    ticks = steps._divide(action)
    assert len(ticks) == 8
    mouse = np.stack([t["mouse"] for t in ticks])
    np.testing.assert_array_equal(mouse.sum(axis=0), np.round(action[:2].astype(np.float64)))
    assert (np.abs(mouse - action[:2] / 8) < 1.13).all()
    for tick, entry in enumerate(ticks):
        down = {c for c, p in zip(PRESSED_COLUMNS, entry["pressed"], strict=True) if p}
        numbers = {f"key.{i}" for i in range(1, 10)}
        assert down == (keys if tick == 0 else keys - numbers)


def test_an_episode_that_ends_within_a_step(env):
    limited = VizDoomVPTEnv(resolution=RESOLUTION, max_ticks=13)
    short = ModelStepWrapper(limited)
    turn = raw_action(turn=32 * 0.15 * 8, pressed=["key.2"])
    short.reset(seed=0)
    *_, truncated, info = short.step(turn)
    assert not truncated and info["ticks"] == 8 and info["ended"] == ""
    seen, _, terminated, truncated, info = short.step(turn)
    assert truncated and not terminated and info["ticks"] == 5 and info["ended"] == "ticks"
    assert info["action"][0] == 5 * 32 and abs(info["action"][2] - 5 * 32 * 0.15) < 0.1
    assert not np.array_equal(seen["tubelet"][0], seen["tubelet"][1])
    with pytest.raises(RuntimeError, match=r"episode has ended.*reset\(\)"):
        short.step(turn)
    short.reset(seed=0)
    assert short.step(turn)[4]["ticks"] == 8
    limited.close()
    # Teleported in the third tick: the tubelet has no second frame, and the last one stands in.
    steps = ModelStepWrapper(env)
    env.reset(seed=0)
    place = env.position
    env.reset(seed=5)
    assert np.hypot(*(env.position - place)[:2]) > 100
    steps.reset(seed=5)
    real = env.step
    calls = itertools.count()

    def step(action):
        if next(calls) == 2:
            env.game.send_game_command(f"warp {place[0]} {place[1]}")
        return real(action)

    env.step = step
    seen, _, terminated, truncated, info = steps.step(turn)
    del env.step
    assert terminated and not truncated and info["ended"] == "teleport" and info["ticks"] in (3, 4)
    assert np.array_equal(seen["tubelet"][1], seen["frame"]) and info["action"][0] == 32 * info["ticks"]


def test_recordings_of_episodes(tmp_path):
    env = RecordVPT(VizDoomVPTEnv(resolution=RESOLUTION, max_ticks=6), tmp_path)
    for _ in range(2):
        env.reset(seed=1)
        for _ in range(6):
            env.step(press("key.w", "mouse.left", dx=7))
    logs = sorted(tmp_path.glob("*.jsonl"))
    assert [len(log.read_text().splitlines()) for log in logs] == [7, 7] and len(list(tmp_path.iterdir())) == 4
    lines = [json.loads(line) for line in logs[0].read_text().splitlines()]
    assert [line["mouse"]["dx"] for line in lines] == [7] * 6 + [0]
    assert [line["mouse"]["buttons"] for line in lines] == [[0]] * 6 + [[]]
    assert [line["keyboard"]["newKeys"] for line in lines] == [["key.keyboard.w"]] + [[]] * 6
    env.reset()
    env.step(IDLE)
    env.close()
    assert len(list(tmp_path.glob("*.mp4"))) == 3 and not list(tmp_path.glob(".*"))
    again = RecordVPT(VizDoomVPTEnv(resolution=RESOLUTION), tmp_path)
    with pytest.raises(ValueError, match=r"vizdoom-loop-000000-.*mp4 is there already"):
        again.reset()
    again.close()


def test_an_oracle_that_looks_for_a_goal_is_not_recorded(tmp_path):
    """Goals around a recorder: what is on disk is the play after `reset`, from the start that it began at."""
    recorder = RecordVPT(VizDoomVPTEnv(resolution=RESOLUTION), tmp_path)
    goals = GoalViewWrapper(ModelStepWrapper(recorder))
    starts = []
    for seed in range(2):
        seen, _ = goals.reset(seed=seed)
        starts.append(seen["state"])
        goals.step(raw_action(turn=-6))
    goals.reset(options={"goal": goals.goal})
    goals.close()
    logs = [[json.loads(line) for line in p.read_text().splitlines()] for p in sorted(tmp_path.glob("*.jsonl"))]
    assert [len(log) for log in logs] == [9, 9, 1] and len(list(tmp_path.iterdir())) == 6
    for log, start in zip(logs, [*starts, starts[1]], strict=True):
        assert (log[0]["yaw"], log[0]["pitch"]) == pytest.approx(tuple(start), abs=1e-4)
        assert sum(line["mouse"]["dx"] for line in log) == (-40 if len(log) == 9 else 0)
    assert recorder.episodes == 3


def test_goals_are_reached_by_their_oracle_and_not_without(steps):
    goals = GoalViewWrapper(steps, steps=(1, 3), walk=0.5, tolerance_degrees=4, tolerance_units=25, max_steps=4)
    lengths = set()
    for seed in range(12):
        seen, info = goals.reset(seed=seed)
        goal = goals.goal
        lengths.add(len(goal.actions))
        np.testing.assert_array_equal(seen["state"], goal.start_state)
        assert not info["success"] and info["goal_degrees"] > 4
        expected = view_distance(goal.start_state, goal.state) / 4
        expected += np.hypot(*(goal.start_position - goal.position)[:2]) / 25
        total, terminated = 0.0, False
        for action in goal.actions:
            assert not terminated
            seen, reward, terminated, truncated, info = goals.step(action)
            total += reward
            if terminated:  # near enough before the oracle's end
                break
        assert terminated and info["success"] and not truncated
        assert total == pytest.approx(expected - info["goal_degrees"] / 4 - info["goal_units"] / 25)
        if info["goal_degrees"] == 0:
            np.testing.assert_array_equal(seen["frame"], goal.frame)
            np.testing.assert_array_equal(seen["goal"], goal.frame)
        # The same goal again, to the other side: never reached.
        goals.reset(options={"goal": goal})
        other = goal.actions[0].copy()
        other[[0, 2]] *= -1
        ends = []
        for _ in range(4):
            *_, terminated, truncated, info = goals.step(other)
            ends.append((terminated, truncated, info["success"]))
            if terminated:
                break
        if ends[-1][0]:  # most of a whole turn round
            assert info["goal_degrees"] <= 4
        else:
            assert ends == [(False, False, False)] * 3 + [(False, True, False)]
    assert lengths == {1, 2, 3}
    first = goals.reset(seed=3)[0]["goal"]
    assert np.array_equal(first, goals.reset(seed=3)[0]["goal"])
    assert not np.array_equal(first, goals.reset()[0]["goal"])


def test_an_environment_that_nobody_closes_ends_before_its_folder():
    """The engine saves its settings there, and complains where it cannot."""
    code = "from vjepa_ac_hf.envs import VizDoomVPTEnv\nenv = VizDoomVPTEnv(resolution='160x120')\nenv.reset(seed=0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_goals_that_must_be_held(steps):
    goals = GoalViewWrapper(steps, steps=(1, 1), tolerance_degrees=4, hold=2, max_steps=4)
    goals.reset(seed=0)
    there, back, still = goals.goal.actions[0], goals.goal.actions[0].copy(), np.zeros(38, np.float32)
    back[[0, 2]] *= -1

    def play(*actions):
        goals.reset(options={"goal": goals.goal})
        return [goals.step(action)[2:] for action in actions]

    ends = play(there, still)
    assert [(e[0], e[2]["success"]) for e in ends] == [(False, False), (True, True)]
    # Passing by, twice, is not staying.
    ends = play(there, back, there, back)
    assert [(e[0], e[1], e[2]["success"]) for e in ends] == [(False, False, False)] * 3 + [(False, True, False)]
    assert [e[2]["goal_degrees"] <= 4 for e in ends] == [True, False, True, False]
    ends = play(there, back, there, still)
    assert ends[-1][0] and not ends[-1][1] and ends[-1][2]["success"]
    with pytest.raises(ValueError, match="hold must be 1 to 2: .* 4 .* 3 steps away .* found 3"):
        GoalViewWrapper(steps, steps=(1, 3), hold=3, max_steps=4)
    with pytest.raises(ValueError, match="hold must be 1: .* found 2"):
        GoalViewWrapper(steps, steps=(1, 3), hold=2, max_steps=3)


@given(st.floats(-800, 800), st.floats(-90, 90), st.floats(-800, 800), st.floats(-90, 90))
def test_view_distance(yaw, pitch, goal_yaw, goal_pitch):
    apart = min(abs(yaw - goal_yaw + 360 * turns) for turns in range(-6, 7))
    expected = math.sqrt(apart**2 + (pitch - goal_pitch) ** 2)
    found = view_distance(np.array([yaw, pitch]), np.array([goal_yaw, goal_pitch]))
    assert found == pytest.approx(expected, abs=1e-6)


def test_bad_input_is_named(env, steps, tmp_path):
    with pytest.raises(ValueError, match=r"resolution must be one of .*found '1x1'"):
        VizDoomVPTEnv(resolution="1x1")
    with pytest.raises(ValueError, match="found 'human'"):
        VizDoomVPTEnv(render_mode="human")
    with pytest.raises(ValueError, match=r"\['start'\] are unknown: known are"):
        env.reset(options={"start": 1})
    env.reset(seed=0)
    for action, message in (
        (press(dx=1201), "mouse must be 2 whole counts from -1200 to 1200"),
        ({"mouse": np.array([0.5, 0]), "pressed": np.zeros(24)}, "whole counts"),
        ({"mouse": np.array([np.nan, 0]), "pressed": np.zeros(24)}, "whole counts"),
        ({"mouse": np.zeros(2), "pressed": np.full(24, 2)}, "pressed must be 24 zeros and ones"),
        ({"mouse": np.zeros(2)}, "dict of 'mouse' and 'pressed'"),
    ):
        with pytest.raises(ValueError, match=message):
            env.step(action)
    assert env.tick == 0
    steps.reset(seed=0)
    with pytest.raises(ValueError, match=r"38 finite numbers, found shape \(13,\)"):
        steps.step(np.zeros(13))
    with pytest.raises(ValueError, match=r"within \+-9600 a step"):
        steps.step(np.eye(38)[0] * 9601)
    with pytest.raises(ValueError, match=r"pressed must be among .* found 'key.x'"):
        raw_action(pressed=["key.x"])
    with pytest.raises(ValueError, match="goes directly around a VizDoomVPTEnv"):
        RecordVPT(steps, tmp_path)
    with pytest.raises(ValueError, match=r"below the least turn 10.0, found 12"):
        GoalViewWrapper(steps, tolerance_degrees=12)
    with pytest.raises(ValueError, match="goes around a ModelStepWrapper"):
        GoalViewWrapper(env)
    with pytest.raises(ValueError, match=r"others: \['jump'\]"):
        DiscreteActions(steps, {"jump": np.full(38, 2, np.float32)})
    with pytest.raises(ValueError, match="whole number, found 20 / 7"):
        ModelStepWrapper(env, fps=7)
