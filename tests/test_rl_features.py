"""Features for reinforcement learning against tubelets that the test cuts itself, one environment at a time."""

import numpy as np
import pytest
import python_forks
import torch
from test_modeling import tiny_model

gymnasium = pytest.importorskip("gymnasium")

from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from vjepa_ac_hf import VJEPA2ACProcessor
from vjepa_ac_hf.envs.features import VJEPA2ACFeatureWrapper, VJEPA2ACVectorFeatureWrapper, token_similarities

SIZE = (40, 48)
NUM_ENVS = 8


class Pictures(gymnasium.Env):
    """A random picture a step, of which the seed decides all; episodes of random length."""

    def __init__(self, as_dict: bool = False, tubelets: bool = False, model_steps: bool = False):
        self.as_dict, self.model_steps = as_dict or model_steps, model_steps
        self.shape = (2, *SIZE, 3) if tubelets else (*SIZE, 3)
        frame = spaces.Box(0, 255, self.shape, np.uint8)
        self.observation_space = frame
        if self.as_dict:
            goal = spaces.Box(0, 255, (*SIZE, 3), np.uint8)
            state = spaces.Box(-1, 1, (2,), np.float32)
            self.observation_space = spaces.Dict({"frame": frame, "goal": goal, "state": state})
        if model_steps:
            self.observation_space["tubelet"] = spaces.Box(0, 255, (2, *SIZE, 3), np.uint8)
        self.action_space = spaces.Discrete(2)

    def _look(self):
        frame = self.np_random.integers(0, 256, self.shape, dtype=np.uint8)
        state = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        steps = {"tubelet": np.stack([frame, 255 - frame])} if self.model_steps else {}
        return {"frame": frame, "goal": self.goal.copy(), "state": state, **steps} if self.as_dict else frame

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(2, 8))
        self.goal = self.np_random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        return self._look(), {}

    def step(self, action):
        self.left -= 1
        return self._look(), float(action), self.left == 0, False, {}


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


@pytest.fixture(scope="module")
def processor():
    return VJEPA2ACProcessor(resolution=32)


class Oracle:
    """Features of one environment's episode so far, tubelet by tubelet."""

    def __init__(self, model, processor, steps: int, spacing: int):
        self.model, self.processor, self.steps, self.spacing = model, processor, steps, spacing
        self.frames: list[np.ndarray] = []

    def tubelet(self, older: np.ndarray, newer: np.ndarray) -> np.ndarray:
        pixels = self.processor(videos=[np.stack([older, newer])])["pixel_values_videos"]
        return self.model.encode(pixels)[0, 0].numpy()

    def see(self, frame: np.ndarray, begins: bool) -> np.ndarray:
        self.frames = [frame] if begins else [*self.frames, frame]
        now = len(self.frames) - 1
        ticks = [max(now - self.spacing * back, 0) for back in range(2 * self.steps)][::-1]
        pairs = zip(ticks[::2], ticks[1::2], strict=True)
        return np.concatenate([self.tubelet(self.frames[a], self.frames[b]).mean(axis=0) for a, b in pairs])


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
@pytest.mark.parametrize(("steps", "spacing"), [(2, 3)])
def test_vector_equals_single_environments_and_oracle(model, processor, mode, steps, spacing):
    """Eight environments whose episodes end at different times, in every autoreset mode."""
    options = {"num_steps": steps, "spacing": spacing}
    vector = SyncVectorEnv([Pictures] * NUM_ENVS, autoreset_mode=mode)
    vector = VJEPA2ACVectorFeatureWrapper(vector, model, processor, **options)
    singles = [VJEPA2ACFeatureWrapper(Pictures(), model, processor, **options) for _ in range(NUM_ENVS)]
    raws = [Pictures() for _ in range(NUM_ENVS)]
    oracles = [Oracle(model, processor, steps, spacing) for _ in range(NUM_ENVS)]

    found, _ = vector.reset(seed=100)
    assert found.shape == (NUM_ENVS, steps * 48) and found in vector.observation_space
    lone = np.stack([single.reset(seed=100 + i)[0] for i, single in enumerate(singles)])
    expected = np.stack(
        [o.see(r.reset(seed=100 + i)[0], True) for i, (o, r) in enumerate(zip(oracles, raws, strict=True))]
    )
    np.testing.assert_allclose(lone, expected, atol=2e-6)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    ended, episodes = np.zeros(NUM_ENVS, bool), 0
    for _ in range(14):
        if mode == AutoresetMode.DISABLED and ended.any():
            found, _ = vector.reset(options={"reset_mask": ended.copy()})
            for i in np.flatnonzero(ended):
                lone[i] = singles[i].reset()[0]
                expected[i] = oracles[i].see(raws[i].reset()[0], True)
            np.testing.assert_allclose(found, expected, atol=2e-6)  # the others' as they were
            ended[:] = False
        found, _, terminated, _, info = vector.step(np.zeros(NUM_ENVS, int))
        for i in range(NUM_ENVS):
            if mode == AutoresetMode.NEXT_STEP and ended[i]:
                lone[i] = singles[i].reset()[0]
                expected[i] = oracles[i].see(raws[i].reset()[0], True)
                ended[i] = False
                continue
            lone[i], _, done, _, _ = singles[i].step(0)
            frame, _, _, _, _ = raws[i].step(0)
            expected[i] = oracles[i].see(frame, False)
            assert done == terminated[i]
            ended[i] = done
            if mode == AutoresetMode.SAME_STEP and done:
                np.testing.assert_allclose(info["final_obs"][i], expected[i], atol=2e-6)
                lone[i] = singles[i].reset()[0]
                expected[i] = oracles[i].see(raws[i].reset()[0], True)
        episodes += int(terminated.sum())
        np.testing.assert_allclose(lone, expected, atol=2e-6)
        np.testing.assert_allclose(found, expected, atol=2e-6)
    assert episodes > NUM_ENVS


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP], ids=lambda mode: mode.name)
def test_dict_observations_keep_the_rest_and_goals_stand_still(model, processor, mode):
    make = lambda: Pictures(as_dict=True)  # noqa: E731
    vector = SyncVectorEnv([make] * 3, autoreset_mode=mode)
    vector = VJEPA2ACVectorFeatureWrapper(vector, model, processor, still_keys=("goal",), pooling="none")
    plain = SyncVectorEnv([make] * 3, autoreset_mode=mode)
    oracle = Oracle(model, processor, 1, 1)
    (found, _), (raw, _) = vector.reset(seed=1), plain.reset(seed=1)
    goals = set()
    for _ in range(15):
        assert set(found) == {"features", "goal", "state"} and found in vector.observation_space
        np.testing.assert_array_equal(found["state"], raw["state"])
        for i, goal in enumerate(raw["goal"]):
            np.testing.assert_allclose(found["goal"][i, 0], oracle.tubelet(goal, goal), atol=2e-6)
            goals.add(goal.tobytes())
        previous = {k: v.copy() for k, v in raw.items()}
        found, _, _, _, info = vector.step(np.zeros(3, int))
        raw, _, terminated, _, raw_info = plain.step(np.zeros(3, int))
        for i in np.flatnonzero(terminated) if mode == AutoresetMode.SAME_STEP else ():
            final, raw_final = info["final_obs"][i], raw_info["final_obs"][i]
            np.testing.assert_array_equal(final["state"], raw_final["state"])
            np.testing.assert_allclose(
                final["goal"][0], oracle.tubelet(previous["goal"][i], previous["goal"][i]), atol=2e-6
            )
            np.testing.assert_allclose(
                final["features"][0], oracle.tubelet(previous["frame"][i], raw_final["frame"]), atol=2e-6
            )
    assert len(goals) > 6


def test_tubelets_are_encoded_as_they_are(model, processor):
    env = VJEPA2ACFeatureWrapper(Pictures(tubelets=True), model, processor, num_steps=2)
    raw, oracle = Pictures(tubelets=True), Oracle(model, processor, 1, 1)
    found, (seen, _) = env.reset(seed=0)[0], raw.reset(seed=0)
    before = seen
    for _ in range(2):
        pair = [oracle.tubelet(*tubelet).mean(axis=0) for tubelet in (before, seen)]
        np.testing.assert_allclose(found, np.concatenate(pair), atol=2e-6)
        before, found, seen = seen, env.step(0)[0], raw.step(0)[0]


@pytest.mark.parametrize("still", [True, None])
def test_frames_of_model_steps_stand_still_as_goals_do(model, processor, still):
    """Two frames a whole step apart are no tubelet of the training: each is one of its own."""
    raw, oracle = Pictures(model_steps=still is None, as_dict=True), Oracle(model, processor, 1, 1)
    options = {"still_frames": still, "num_steps": 2, "spacing": 2, "pooling": "none"}
    vector = SyncVectorEnv(
        [lambda: Pictures(model_steps=still is None, as_dict=True)] * 2, autoreset_mode=AutoresetMode.SAME_STEP
    )
    vector = VJEPA2ACVectorFeatureWrapper(vector, model, processor, still_keys=("goal",), **options)
    found, seen = vector.reset(seed=4)[0], raw.reset(seed=4)[0]
    frames = [seen["frame"]] * 3
    for _ in range(raw.left):
        for step, frame in enumerate((frames[-3], frames[-1])):
            np.testing.assert_allclose(found["features"][0, step], oracle.tubelet(frame, frame), atol=2e-6)
        np.testing.assert_allclose(found["goal"][0, 0], oracle.tubelet(seen["goal"], seen["goal"]), atol=2e-6)
        found, _, ended, _, info = vector.step(np.zeros(2, int))
        seen = raw.step(0)[0]
        frames.append(seen["frame"])
    assert ended[0]
    for step, frame in enumerate((frames[-3], frames[-1])):
        last = info["final_obs"][0]["features"]
        np.testing.assert_allclose(last[step], oracle.tubelet(frame, frame), atol=2e-6)


def test_the_oracle_sees_that_it_has_arrived(model, processor):
    """In the game, as the README has it: at the goal, and only there, view and goal are the same features."""
    pytest.importorskip("vizdoom")
    from vjepa_ac_hf.envs import make_goals

    goals = make_goals(resolution="160x120", steps=(2, 3))
    env = VJEPA2ACFeatureWrapper(goals, model, processor, still_keys=("goal",))
    seen, _ = env.reset(seed=1)
    apart = [np.abs(seen["features"] - seen["goal"]).mean()]
    for action in goals.goal.actions:
        seen, _, _, _, info = env.step(action)
        apart.append(np.abs(seen["features"] - seen["goal"]).mean())
    env.close()
    assert info["goal_degrees"] == 0 and apart[-1] < 1e-6 < min(apart[:-1]) / 100


def test_another_dtype_and_a_bigger_encoder(processor):
    half = tiny_model().eval().to(torch.bfloat16)
    env = VJEPA2ACFeatureWrapper(Pictures(), half, processor)
    exact = VJEPA2ACFeatureWrapper(Pictures(), tiny_model().eval(), processor)
    a, b = env.reset(seed=0)[0], exact.reset(seed=0)[0]
    assert a.dtype == np.float32 and 0 < np.abs(a - b).max() < 0.1
    check_env(VJEPA2ACFeatureWrapper(Pictures(), tiny_model().eval(), processor), skip_render_check=True)


def test_bad_input_is_named(model, processor):
    with pytest.raises(ValueError, match="needs VJEPA2ACVectorFeatureWrapper"):
        VJEPA2ACFeatureWrapper(SyncVectorEnv([Pictures]), model, processor)
    with pytest.raises(ValueError, match="needs VJEPA2ACFeatureWrapper"):
        VJEPA2ACVectorFeatureWrapper(Pictures(), model, processor)
    with pytest.raises(ValueError, match=r"observations have no 'picture': found \['frame', 'goal', 'state'\]"):
        VJEPA2ACFeatureWrapper(Pictures(as_dict=True), model, processor, frame_key="picture")
    with pytest.raises(ValueError, match="'state' must be a Box of uint8 frames"):
        VJEPA2ACFeatureWrapper(Pictures(as_dict=True), model, processor, frame_key="state")
    with pytest.raises(ValueError, match="frames of 64 pixels and tubelets of 2, the model takes 32 and 2"):
        VJEPA2ACFeatureWrapper(Pictures(), model, VJEPA2ACProcessor(resolution=64))
    with pytest.raises(ValueError, match="at least 1, found 0 and 1"):
        VJEPA2ACFeatureWrapper(Pictures(), model, processor, num_steps=0)
    with pytest.raises(ValueError, match="found 'max'"):
        VJEPA2ACFeatureWrapper(Pictures(), model, processor, pooling="max")
    with pytest.raises(ValueError, match="with spacing 1, found 4"):
        VJEPA2ACFeatureWrapper(Pictures(tubelets=True), model, processor, spacing=4)
    with pytest.raises(ValueError, match="still_frames takes single frames, 'frame' has 2 of a tubelet"):
        VJEPA2ACFeatureWrapper(Pictures(tubelets=True), model, processor, still_frames=True)
    with pytest.raises(ValueError, match="need Dict observations"):
        VJEPA2ACFeatureWrapper(Pictures(), model, processor, still_keys=("goal",))


def test_without_the_extra_the_error_names_it():
    code = """
import sys
for package, module in (("gymnasium", "vjepa_ac_hf.envs"), ("stable_baselines3", "vjepa_ac_hf.envs.sb3")):
    known = sys.modules.pop(package, None)
    sys.modules[package] = None
    try:
        __import__(module)
    except ImportError as error:
        print(error)
    del sys.modules[package]
"""
    found = python_forks.run(["-c", code])
    lines = found.stdout.splitlines()
    assert len(lines) == 2, found.stderr
    assert "needs Gymnasium: pip install 'vjepa-ac-hf[rl,vizdoom]'" in lines[0]
    assert "needs Stable-Baselines3: pip install 'vjepa-ac-hf[rl]'" in lines[1]


# --- Stable-Baselines3 ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vizdoom_goals_with_features_for_stable_baselines(model, processor):
    pytest.importorskip("vizdoom")
    pytest.importorskip("stable_baselines3")
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_checker import check_env as check_for_stable_baselines

    from vjepa_ac_hf.envs import DiscreteActions, make_goals

    def make():
        return DiscreteActions(make_goals(resolution="160x120"))

    env = VJEPA2ACFeatureWrapper(make(), model, processor, frame_key="tubelet", still_keys=("frame", "goal"))
    check_for_stable_baselines(env)
    PPO("MultiInputPolicy", env, n_steps=64, batch_size=32, n_epochs=1, device="cpu").learn(256)
    env.close()
    vector = SyncVectorEnv([make] * NUM_ENVS)
    vector = VJEPA2ACVectorFeatureWrapper(vector, model, processor, still_keys=("goal",))
    singles = [VJEPA2ACFeatureWrapper(make(), model, processor, still_keys=("goal",)) for _ in range(NUM_ENVS)]
    found, _ = vector.reset(seed=0)
    lone = [single.reset(seed=i)[0] for i, single in enumerate(singles)]
    ended = np.zeros(NUM_ENVS, bool)
    for step in range(12):
        for i, one in enumerate(lone):
            for key, value in one.items():
                np.testing.assert_allclose(found[key][i], value, atol=1e-5)
        actions = (np.arange(NUM_ENVS) + step) % 5
        found, _, terminated, truncated, _ = vector.step(actions)
        lone = [s.reset()[0] if e else s.step(a)[0] for s, e, a in zip(singles, ended, actions, strict=True)]
        ended = terminated | truncated
    vector.close()
    for single in singles:
        single.close()


# --- Stable-Baselines3's environments ---------------------------------------------------------------------------


class Ends(Pictures):
    """Episodes that are cut off as often as they end, with things to tell."""

    def reset(self, *, seed=None, options=None):
        seen, _ = super().reset(seed=seed)
        self.cut, self.render_mode = bool(self.np_random.random() < 0.5), None
        return seen, {"left": self.left, "where": np.full(2, self.left / 2), "begun": True}

    def step(self, action):
        seen, reward, ended, _, _ = super().step(action)
        info = {"left": self.left, "where": np.full(2, self.left / 2), "name": f"{self.left} left"}
        return seen, reward + self.left, ended and not self.cut, ended and self.cut, info


def brute_force_similarities(features: np.ndarray, goal: np.ndarray) -> np.ndarray:
    found = np.zeros((len(features), len(goal)))
    for i, one in enumerate(features):
        for j, other in enumerate(goal):
            a = [float(x) - float(np.mean(features[:, d])) for d, x in enumerate(one)]
            b = [float(x) - float(np.mean(goal[:, d])) for d, x in enumerate(other)]
            product = sum(x * y for x, y in zip(a, b, strict=True))
            found[i, j] = product / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    return found


def test_token_similarities_against_brute_force():
    features, goal = np.random.default_rng(0).normal(size=(2, 3, 5, 7)).astype(np.float32)
    found = token_similarities(features + 9, goal)
    expected = np.stack([brute_force_similarities(a, b) for a, b in zip(features, goal, strict=True)])
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert not token_similarities(np.ones((5, 7)), goal[0]).any()  # a view of one colour is like nothing
    with pytest.raises(ValueError, match=r"one shape \(\.\.\., N, D\), found \(5, 7\) and \(6, 7\)"):
        token_similarities(np.ones((5, 7)), np.ones((6, 7)))


def pool(seen: dict, pooling: str) -> np.ndarray:
    """The oracle of `GoalFeatures`, one environment's."""
    features, goal = seen["features"][-1], seen["goal"][-1]
    if pooling == "similarity":
        return brute_force_similarities(features, goal).ravel()
    if pooling == "mean":
        return np.array([*features.mean(0), *goal.mean(0), *(goal.mean(0) - features.mean(0))])
    return np.array([*features.ravel(), *goal.ravel()])


@pytest.mark.parametrize("pooling", ["similarity", "mean", "none"])
def test_vector_environment_is_what_stable_baselines_makes_of_single_ones(model, processor, pooling):
    """Eight environments; the encoder once a step for all, against its own `DummyVecEnv` with an encoder each."""
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

    from vjepa_ac_hf.envs.sb3 import GoalFeatures, SB3VectorEnv

    options = {"still_keys": ("goal",), "pooling": "none"}
    games = SyncVectorEnv([lambda: Ends(as_dict=True)] * NUM_ENVS, autoreset_mode=AutoresetMode.SAME_STEP)
    vector = SB3VectorEnv(VJEPA2ACVectorFeatureWrapper(games, model, processor, **options))
    found_env = VecMonitor(GoalFeatures(vector, pooling))
    single = DummyVecEnv([lambda: VJEPA2ACFeatureWrapper(Ends(as_dict=True), model, processor, **options)] * NUM_ENVS)
    found_env.seed(5)
    single.seed(5)
    found, expected = found_env.reset(), single.reset()
    assert found_env.observation_space.shape == found[0].shape and found.dtype == np.float32

    def compare(found: np.ndarray, expected: dict) -> None:
        for i, one in enumerate(found):
            seen = {key: expected[key][i] for key in ("features", "goal")}
            np.testing.assert_allclose(one, pool(seen, pooling), atol=5e-5)

    compare(found, expected)
    ended = {True: 0, False: 0}
    for step in range(12):
        actions = (np.arange(NUM_ENVS) + step) % 2
        found, rewards, dones, infos = found_env.step(actions)
        expected, expected_rewards, expected_dones, expected_infos = single.step(actions)
        compare(found, expected)
        np.testing.assert_array_equal(rewards, expected_rewards)
        np.testing.assert_array_equal(dones, expected_dones)
        for i, (info, known) in enumerate(zip(infos, expected_infos, strict=True)):
            assert set(info) - {"episode"} == set(known)
            for key in ("left", "name", "TimeLimit.truncated"):
                assert info[key] == known[key]
            np.testing.assert_array_equal(info["where"], known["where"])
            if dones[i]:
                ended[known["TimeLimit.truncated"]] += 1
                last = known["terminal_observation"]
                np.testing.assert_allclose(info["terminal_observation"], pool(last, pooling), atol=5e-5)
                assert vector.reset_infos[i]["begun"] and single.reset_infos[i]["left"] == vector.reset_infos[i]["left"]
    assert min(ended.values()) > 3
    assert found_env.get_attr("left") == single.get_attr("left")
    assert found_env.get_attr("left", indices=[2, 1]) == [single.get_attr("left")[i] for i in (2, 1)]
    assert found_env.env_is_wrapped(VJEPA2ACFeatureWrapper, [1]) == [False]


class Counts(Pictures):
    """Counts how often it is called."""

    called = 0

    def call_me(self, times: int, *, more: int = 0) -> int:
        self.called += times + more
        return self.called


def test_methods_of_some_environments_leave_the_others_alone():
    pytest.importorskip("stable_baselines3")
    from vjepa_ac_hf.envs.sb3 import SB3VectorEnv

    env = SB3VectorEnv(SyncVectorEnv([Counts] * 3, autoreset_mode=AutoresetMode.SAME_STEP))
    assert env.env_method("call_me", 1, indices=[2, 0]) == [1, 1]
    assert env.env_method("call_me", 1, indices=1, more=4) == [5]
    assert env.get_attr("called") == [1, 5, 1]
    assert env.env_method("call_me", 2) == [3, 7, 3]
    elsewhere = AsyncVectorEnv([Counts] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    env = SB3VectorEnv(elsewhere)
    with pytest.raises(NotImplementedError, match=r"AsyncVectorEnv .* all 2 environments at once, found indices \[1\]"):
        env.env_method("call_me", 1, indices=[1])
    assert env.env_method("call_me", 1, indices=[1, 0]) == [1, 1] and env.get_attr("called", indices=[1]) == [1]
    env.close()


def test_vector_environments_that_do_not_fit_are_refused(model, processor):
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.vec_env import DummyVecEnv

    from vjepa_ac_hf.envs.sb3 import GoalFeatures, SB3VectorEnv

    with pytest.raises(ValueError, match=r"autoreset mode SAME_STEP, found .*NEXT_STEP"):
        SB3VectorEnv(SyncVectorEnv([Pictures]))
    with pytest.raises(ValueError, match="must be a vector environment"):
        SB3VectorEnv(Pictures())
    venv = DummyVecEnv([lambda: VJEPA2ACFeatureWrapper(Ends(as_dict=True), model, processor, still_keys=("goal",))])
    with pytest.raises(ValueError, match=r"must have features \(T, N, D\) and goal \(1, N, D\), found Dict"):
        GoalFeatures(venv)
    with pytest.raises(ValueError, match="pooling must be one of .*'similarity'.*found 'attentive'"):
        GoalFeatures(venv, "attentive")


def test_standardized_features_are_saved_with_the_policy():
    pytest.importorskip("stable_baselines3")
    from vjepa_ac_hf.envs.sb3 import Standardize

    seen = np.random.default_rng(0).normal(5, [1, 2, 3, 0], size=(400, 4)).astype(np.float32)
    extractor = Standardize(spaces.Box(-9, 9, (4,)))
    extractor.fit(seen)
    found = extractor(torch.from_numpy(seen)).numpy()
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(axis=0), [1, 1, 1, 0], atol=1e-5)
    other = Standardize(spaces.Box(-9, 9, (4,)))
    other.load_state_dict(extractor.state_dict())
    np.testing.assert_array_equal(other(torch.from_numpy(seen)).numpy(), found)
    assert not list(extractor.parameters())
