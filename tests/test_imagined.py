"""Imagined worlds: against the model's own rollout, the game's rules, and a world whose dynamics are known."""

import copy
import gc
import itertools
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_clips import write_clips
from helpers_models import responsive_model

gymnasium = pytest.importorskip("gymnasium")

from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from vjepa_ac_hf import ACTION_COLUMNS, VJEPA2ACProcessor
from vjepa_ac_hf.envs import ImaginedVPTEnv, ImaginedVPTVectorEnv, RecordedGoals, raw_action
from vjepa_ac_hf.envs.imagined import find_turns
from vjepa_ac_hf.loading.clips import load_action_statistics
from vjepa_ac_hf.records import weights_checksum

TURNS = (-20.0, -5.0, 0.0, 5.0, 20.0)
ACTIONS = {f"turn {degrees:g}": raw_action(turn=degrees) for degrees in TURNS}
COLUMN = {name: i for i, name in enumerate(ACTION_COLUMNS)}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips") / "clips")


@pytest.fixture(scope="module")
def processor(clips):
    statistics = load_action_statistics(str(clips)).to_dict()
    return VJEPA2ACProcessor(resolution=32, action_space="vpt-38", action_statistics=statistics)


@pytest.fixture(scope="module")
def model():
    return responsive_model(list(ACTION_COLUMNS), steps=8, width=16)


@pytest.fixture(scope="module")
def goals(clips, model, processor):
    return RecordedGoals.from_dataset(str(clips), model, processor)


# ------------------------------------------------------------------------------------- a world that is known


class Compass:
    """A model whose features are yaw / 180 in every number, and add up what the actions turn: linear and exact. Others
    believe in `gain` times as much."""

    encoder = torch.nn.Identity()

    def __init__(self, processor, gain=1.0):
        self.processor, self.device, self.gain = processor, torch.device("cpu"), gain
        sizes = {"num_steps": 8, "num_tokens": 2, "feature_size": 3, "frames_per_clip": 16, "action_dim": 38}
        kinds = {"encoding": "tubelet", "normalize_features": False, "frame_shape": (32, 32), "grid": (1, 2)}
        frames = {"frame_size": None, "resolution": 32, "encoder_config": SimpleNamespace(tubelet_size=2)}
        self.config = SimpleNamespace(**sizes, **kinds, **frames, action_space=None)

    def encode(self, pixels):
        red = pixels[:, :1, 0].mean(dim=(-2, -1)) * self.processor.pixel_std[0] + self.processor.pixel_mean[0]
        return ((red * 255 - 128) / 180)[..., None, None].expand(-1, 1, 2, 3)

    def rollout(self, features, actions, states, past_key_values):
        turn = self.processor.denormalize_actions(actions)[..., COLUMN["yaw_delta"]]
        return features + self.gain * (turn / 180).float()[..., None, None]


def known_world(processor, **options):
    """Views of whole degrees from -90 to 90, one colour each, and every turn between them of one clip."""
    rng = np.random.default_rng(0)
    yaw = rng.integers(-60, 61, size=(60, 8)).astype(np.float64)
    frames = torch.from_numpy(np.tile((yaw + 128).astype(np.uint8)[:, :, None, None, None], (1, 1, 3, 32, 32)))
    actions = np.zeros((60, 7, 38), np.float32)
    states = np.stack([yaw, np.zeros_like(yaw)], axis=-1)
    return RecordedGoals(Compass(processor), processor, frames, actions, states, **options)


def nearest_turn(seen) -> int:
    """What the difference of the features says, as the choice that leaves least of it."""
    left = 180 * (seen["goal"] - seen["features"]).mean()
    return int(np.argmin(np.abs(np.array(TURNS) - left)))


def test_the_policy_that_is_known_to_be_best_gets_the_return_that_is_known(processor):
    env = ImaginedVPTEnv(known_world(processor), actions=ACTIONS, hold=2, success_reward=5.0)
    lengths = set()
    for seed in range(60):
        seen, info = env.reset(seed=seed)
        start = info["goal_degrees"]
        assert start == pytest.approx(180 * abs(seen["goal"] - seen["features"]).mean(), abs=1e-3)
        assert start == pytest.approx(180 * info["goal_features"], abs=1e-3)
        total, steps, ended = 0.0, 0, False
        while not ended:
            seen, reward, terminated, truncated, info = env.step(nearest_turn(seen))
            total, steps, ended = total + reward, steps + 1, terminated or truncated
        # 19.95 degrees a step until 5 or less are left, and then one more; mouse counts are whole.
        least = max(math.ceil((start - 5 - 1e-9) / 19.95), 1) + 1
        assert terminated and info["success"] and least <= steps <= least + 1
        assert info["goal_degrees"] == pytest.approx(180 * abs(seen["goal"] - seen["features"]).mean(), abs=1e-3)
        assert total == pytest.approx((start - info["goal_degrees"]) / 5 + 5)
        lengths.add(steps)
    assert len(lengths) >= 4


@pytest.mark.slow
def test_ppo_learns_the_known_world(processor):
    sb3 = pytest.importorskip("stable_baselines3")
    from vjepa_ac_hf.envs.sb3 import GoalFeatures, SB3VectorEnv, Standardize

    worlds = ImaginedVPTVectorEnv(known_world(processor), 16, actions=ACTIONS, hold=2, success_reward=5.0)
    env = GoalFeatures(SB3VectorEnv(worlds), "mean")
    policy = {"features_extractor_class": Standardize, "net_arch": [32]}
    rates = {"learning_rate": 3e-3, "gamma": 0.9, "ent_coef": 0.01}
    ppo = sb3.PPO("MlpPolicy", env, n_steps=64, policy_kwargs=policy, seed=0, device="cpu", batch_size=256, **rates)

    def success() -> float:
        env.seed(10_000)
        seen, ended = env.reset(), []
        while len(ended) < 100:
            seen, _, dones, infos = env.step(ppo.predict(seen, deterministic=False)[0])
            ended += [info["success"] for info, done in zip(infos, dones, strict=True) if done]
        return float(np.mean(ended))

    before = success()
    ppo.policy.features_extractor.fit(np.concatenate([env.reset() for _ in range(16)]))
    ppo.learn(20_480)
    assert before < 0.6 and success() > 0.9


# ------------------------------------------------------------------------------------------- against the model


def test_steps_are_the_rollout_of_the_whole_sequence(goals, model, processor):
    """Turns, keys and a slot, from four starts at once; states are what the actions add up to."""
    worlds = ImaginedVPTVectorEnv(goals, 4, max_steps=7, tolerance_degrees=1e-9)
    rng = np.random.default_rng(0)
    seen, _ = worlds.reset(seed=3)
    first, state = seen["features"], seen["state"]
    slots = np.array([int(goals.slots[0, 0])] * 4)
    raw, found, states = [], [], [state]
    for step in range(7):
        turns, looks = rng.integers(-200, 200, 4), rng.integers(-30, 30, 4)
        pressed = ["key.w", "key.3"] if step == 2 else ["key.w"]
        asked = [raw_action(turn=0.15 * t, look=0.15 * k, pressed=pressed) for t, k in zip(turns, looks, strict=True)]
        expected = np.zeros((4, 38))
        expected[:, 0], expected[:, 1], expected[:, 2], expected[:, 3] = turns, looks, 0.15 * turns, 0.15 * looks
        expected[:, [COLUMN[key] for key in pressed]] = 1
        expected[np.arange(4), COLUMN["hotbar.0"] + slots] = 1
        slots = np.full(4, 2) if step == 2 else slots
        raw.append(expected)
        seen, _, terminated, truncated, info = worlds.step(np.stack(asked))
        last = step == 6
        assert not terminated.any() and truncated.all() == truncated.any() == last
        seen = {k: np.stack([f[k] for f in info["final_obs"]]) for k in seen} if last else seen
        found.append(seen["features"][:, 0])
        states.append(seen["state"])
    actions = processor.normalize_actions(np.stack(raw, axis=1))
    integrated = processor.integrate_states(processor.normalize_states(state)[:, None], actions)
    np.testing.assert_allclose(processor.normalize_states(np.stack(states, axis=1)), integrated, atol=1e-5)
    with torch.no_grad():
        whole = model.rollout(torch.from_numpy(first), actions, integrated)
    np.testing.assert_allclose(np.stack(found, axis=1), whole, atol=2e-5)
    assert np.abs(found[0] - found[-1]).max() > 0.1


def test_start_and_goal_are_frames_of_one_clip_encoded_as_the_game_encodes_stills(goals, model, processor):
    env = ImaginedVPTEnv(goals)
    for seed in range(5):
        pair = goals.draw(np.random.default_rng(gymnasium.utils.seeding.np_random(seed)[0].bit_generator.seed_seq))
        clip, start, goal = goals.pairs[pair]
        seen, info = env.reset(seed=seed)
        for name, step in (("features", start), ("goal", goal)):
            still = goals.frames[clip, step][None, None].expand(1, 2, 3, 32, 32)
            with torch.no_grad():
                expected = model.encode(processor.normalize_pixels(still))[0]
            np.testing.assert_allclose(seen[name], expected, atol=2e-6)
        np.testing.assert_allclose(seen["state"], goals.states[clip, start], rtol=1e-6)
        turn = abs(goals.states[clip, goal, 0] - goals.states[clip, start, 0])
        assert info["goal_degrees"] == pytest.approx(turn, abs=1e-4)


def test_many_worlds_are_each_what_it_would_be_alone(goals):
    """Episodes that end by success, by doubt and by their length, at different times in different worlds."""
    goals = copy.copy(goals)
    goals._variance = -goals._variance  # views of an untrained model gain what trained ones lose: counted as lost here
    options = {"actions": ACTIONS, "max_steps": 5, "hold": 1, "success_reward": 2.0, "max_doubt": 0.5}
    worlds = ImaginedVPTVectorEnv(goals, 6, **options)
    assert worlds.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    singles = [ImaginedVPTEnv(goals, **options) for _ in range(6)]
    found, shown = worlds.reset(seed=7)
    assert found in worlds.observation_space
    alone = [single.reset(seed=7 + i) for i, single in enumerate(singles)]
    rng, ends = np.random.default_rng(0), []
    for _ in range(60):
        for i, (seen, info) in enumerate(alone):
            for key in seen:
                np.testing.assert_allclose(found[key][i], seen[key], atol=1e-3)  # other kernels; weights amplify it
            for key in ("success", "ended"):
                assert shown[key][i] == info[key] and shown[f"_{key}"][i]
            for key in ("doubt", "goal_degrees", "goal_features"):
                assert shown[key][i] == pytest.approx(info[key], abs=1e-3)
        chosen = rng.integers(len(TURNS), size=6)
        found, rewards, terminated, truncated, shown = worlds.step(chosen)
        for i, single in enumerate(singles):
            seen, reward, *ended, info = single.step(int(chosen[i]))
            assert [terminated[i], truncated[i]] == ended and rewards[i] == pytest.approx(reward, abs=1e-4)
            alone[i] = seen, info
            if any(ended):
                assert shown["_final_info"][i] and shown["final_info"]["ended"][i] == info["ended"]
                for key in seen:
                    np.testing.assert_allclose(shown["final_obs"][i][key], seen[key], atol=1e-3)
                ends.append("success" if info["success"] else info["ended"] or "length")
                alone[i] = single.reset()
    assert {"success", "doubt", "length"} <= set(ends)


def test_no_step_is_seen_twice_by_the_predictor(goals, model, monkeypatch):
    calls, forward = [], model.predictor.forward
    monkeypatch.setattr(model.predictor, "forward", lambda x, *a, **k: calls.append(x.shape[:2]) or forward(x, *a, **k))
    worlds = ImaginedVPTVectorEnv(goals, 8, actions=ACTIONS, max_steps=7, tolerance_degrees=1e-9)
    worlds.reset(seed=0)
    for _ in range(14):  # all began together: one call a step, of one new step each
        worlds.step(np.zeros(8, dtype=int))
    assert calls == [(8, 1)] * 14
    calls.clear()
    rng = np.random.default_rng(0)
    worlds = ImaginedVPTVectorEnv(goals, 8, actions=ACTIONS, max_steps=7, tolerance_degrees=8.0)
    worlds.reset(seed=0)
    for _ in range(20):
        worlds.step(rng.integers(5, size=8))
    assert {steps for _, steps in calls} == {1} and sum(count for count, _ in calls) == 20 * 8
    assert len(calls) > 20


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_steps_and_closing_frees_it(goals):
    others = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]  # kept: they do not end meanwhile
    known = {id(t) for t in others}
    worlds = ImaginedVPTVectorEnv(goals, 4, actions=ACTIONS, max_steps=6, tolerance_degrees=8.0)
    rng = np.random.default_rng(0)

    def play(steps: int) -> tuple[int, int]:
        for _ in range(steps):
            worlds.step(rng.integers(5, size=4))
        gc.collect()
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and id(t) not in known]
        return len(tensors), sum(t.nbytes for t in tensors)

    worlds.reset(seed=0)
    play(10)
    before = play(490)
    assert play(500) == before
    past = weakref.ref(worlds._worlds.imaginations[0]._past[0][0])
    worlds.close()
    gc.collect()
    assert past() is None


# -------------------------------------------------------------------------------------------------- its rules


def test_gymnasium_takes_it_and_seeds_reproduce(goals):
    for env in (ImaginedVPTEnv(goals), ImaginedVPTEnv(goals, actions=ACTIONS)):
        check_env(env, skip_render_check=True)

    def play(seeds) -> list:
        worlds = ImaginedVPTVectorEnv(goals, 3, actions=ACTIONS, max_steps=3)
        rng, seen = np.random.default_rng(0), [worlds.reset(seed=seeds)[0]["features"]]
        return [*seen, *(worlds.step(rng.integers(5, size=3))[0]["features"] for _ in range(10))]

    one, same, other = play(5), play([5, 6, 7]), play(6)
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_reward_and_success_are_the_games(goals):
    """Decrease of the distance in tolerances; two steps in a row that end near enough, and no passing by."""
    env = ImaginedVPTEnv(goals, max_steps=7, tolerance_degrees=6.0, hold=2, success_reward=3.0)
    outcomes = set()
    for seed in range(40):
        seen, info = env.reset(seed=seed)
        yaw, goal = float(seen["state"][0]), env._worlds.goal_state[0, 0]
        near, before, rng = 0, info["goal_degrees"], np.random.default_rng(seed)
        for step in itertools.count(1):
            left = (goal - yaw + 180) % 360 - 180
            counts = round((left if rng.random() < 0.6 else rng.uniform(-30, 30)) / 0.15)
            action = np.zeros(38, np.float32)
            action[0] = counts  # what the view does follows from the mouse, whatever the other columns say
            action[2] = 77
            _, reward, terminated, truncated, info = env.step(action)
            yaw += counts * 0.15
            after = abs((goal - yaw + 180) % 360 - 180)
            near = near + 1 if after <= 6 else 0
            assert info["goal_degrees"] == pytest.approx(after, abs=1e-3)
            assert reward == pytest.approx((before - after) / 6 + 3 * (near == 2), abs=1e-3)
            assert terminated == info["success"] == (near == 2) and truncated == (step == 7 and near != 2)
            before = after
            if terminated or truncated:
                outcomes.add((terminated, step))
                break
    assert {(True, 2), (False, 7)} <= outcomes
    with pytest.raises(RuntimeError, match="the episode has ended"):
        env.step(action)


def test_turns_on_the_spot_are_found_as_a_loop_finds_them():
    rng = np.random.default_rng(0)
    actions = np.zeros((30, 7, 38), np.float32)
    for name in ("key.w", "key.space", "gui_open", "key.3"):
        actions[..., COLUMN[name]] = rng.random((30, 7)) < 0.1
    yaw, pitch = (rng.normal(0, scale, (30, 8)).cumsum(axis=1) for scale in (20, 1))
    states = np.stack([yaw + 175, pitch], axis=-1)
    expected = set()
    for clip in range(30):
        for start, goal in itertools.permutations(range(8), 2):
            between = actions[clip, min(start, goal) : max(start, goal)]
            moved = sum(float(between[:, COLUMN[n]].sum()) for n in ("key.w", "key.space", "gui_open"))
            turn = (yaw[clip, goal] - yaw[clip, start] + 180) % 360 - 180
            if not moved and abs(turn) <= 70 and abs(pitch[clip, goal] - pitch[clip, start]) <= 2:
                expected.add((clip, start, goal, round(turn, 6)))
    pairs = find_turns(actions, states, most_degrees=70)
    turns = [(yaw[c, g] - yaw[c, s] + 180) % 360 - 180 for c, s, g in pairs]
    assert {(*map(int, p), round(t, 6)) for p, t in zip(pairs, turns, strict=True)} == expected
    assert len(pairs) == len(expected) > 100 and turns == sorted(turns)


def test_goals_are_as_far_away_as_the_games(processor):
    """One to three turns of 10 to 30 degrees to one side: mean 40 degrees, none below 10 or above 90, both sides."""
    goals = known_world(processor, on_the_way=False)
    rng = np.random.default_rng(0)
    drawn = np.array([goals.turns[goals.draw(rng)] for _ in range(4000)])
    assert np.abs(drawn).mean() == pytest.approx(40, abs=1) and np.mean(drawn > 0) == pytest.approx(0.5, abs=0.03)
    assert np.abs(drawn).min() > 8 and np.abs(drawn).max() <= 90
    # P(one turn) = 1/3 and half of these are above 20 degrees; two turns of at least 10 are always.
    assert np.mean(np.abs(drawn) <= 20) == pytest.approx(1 / 6, abs=0.03)
    nearer = known_world(processor)
    drawn = np.array([nearer.turns[nearer.draw(rng)] for _ in range(4000)])
    assert np.abs(drawn).mean() == pytest.approx(20, abs=1) and np.mean(np.abs(drawn) < 5) > 0.1


def test_doubt_is_what_a_view_has_lost_of_what_tells_it_from_others(goals, model, processor):
    views = goals.frames.flatten(0, 1)
    with torch.no_grad():
        real = model.encode(processor.normalize_pixels(views[:, None].expand(-1, 2, -1, -1, -1)))[:, 0]
    mean = real.mean(dim=0)
    own = ((real - mean) ** 2).mean(dim=(1, 2)) / ((real - mean) ** 2).mean()
    np.testing.assert_allclose(goals.structure(real), own, rtol=0.1, atol=0.02)
    assert goals.structure(mean[None]) < 0.01
    np.testing.assert_allclose(goals.structure(mean + 0.5 * (real - mean)), 0.25 * own, rtol=0.2, atol=0.02)
    env = ImaginedVPTEnv(goals, actions=ACTIONS)
    for seed in range(3):
        start, info = env.reset(seed=seed)
        assert info["doubt"] == 0
        seen, *_, info = env.step(0)
        lost = goals.structure(torch.from_numpy(start["features"])) - goals.structure(
            torch.from_numpy(seen["features"])
        )
        assert info["doubt"] == pytest.approx(lost[0], abs=1e-5)


def another(model, seed):
    """The same encoder, another predictor."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.predictor.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    return other


def test_doubt_of_several_models_is_how_far_their_rollouts_lie_apart(goals, model, processor):
    """Against whole rollouts of each, and a variance that is written out; what is seen stays the first one's."""
    models = [model, another(model, 1), another(model, 2)]
    options = {"max_steps": 5, "tolerance_degrees": 1e-9}
    alone = ImaginedVPTVectorEnv(goals, 3, **options)
    worlds = ImaginedVPTVectorEnv(goals, 3, **options, others=[(other, processor) for other in models[1:]])
    views = model.encode(processor.normalize_pixels(goals.frames.flatten(0, 1)[:, None].expand(-1, 2, -1, -1, -1)))
    variance = float(((views - views.mean(dim=0)) ** 2).mean())
    seen, info = worlds.reset(seed=11)
    alone.reset(seed=11)
    assert not info["doubt"].any()
    start, views, raw, doubts = seen["features"], [seen["state"]], [], []
    rng = np.random.default_rng(1)
    for step in range(5):
        asked = np.stack([raw_action(turn=0.15 * int(turn)) for turn in rng.integers(-200, 200, 3)])
        seen, _, _, truncated, info = worlds.step(asked)
        first = alone.step(asked)[0]
        final = step == 4
        assert truncated.all() == final
        doubts.append(info["final_info"]["doubt"] if final else info["doubt"])
        if not final:
            np.testing.assert_array_equal(seen["features"], first["features"])
            views.append(seen["state"])
        asked[np.arange(3), COLUMN["hotbar.0"]] = 0
        asked[:, COLUMN["hotbar.0"] + int(goals.slots[0, 0])] = 1
        raw.append(asked)
    actions = processor.normalize_actions(np.stack(raw, axis=1))
    states = processor.normalize_states(np.stack(views, axis=1))
    with torch.no_grad():
        a, b, c = (m.rollout(torch.from_numpy(start), actions, states).double() for m in models)
    middle = (a + b + c) / 3
    apart = ((a - middle) ** 2 + (b - middle) ** 2 + (c - middle) ** 2) / 3
    expected = apart.mean(dim=(2, 3)) / variance
    np.testing.assert_allclose(np.stack(doubts, axis=1), expected, rtol=0.05)
    assert expected.min() > 1e-6 and expected[:, -1].mean() > 2 * expected[:, 0].mean()


def test_an_episode_ends_where_models_disagree(processor):
    """A second compass believes in 1.5 times the turn: after t degrees both are t / 720 from their mean."""
    goals = known_world(processor)
    variance = float(np.var(goals.states[..., 0].round() / 180))
    options = {"actions": ACTIONS, "tolerance_degrees": 1e-9, "max_doubt": 0.02}
    worlds = ImaginedVPTVectorEnv(goals, 8, **options, others=[(Compass(processor, 1.5), processor)])
    worlds.reset(seed=0)
    rng, turned, steps = np.random.default_rng(0), np.zeros(8), np.zeros(8)
    ends = {"doubt": 0, "": 0}
    for _ in range(60):
        chosen = rng.integers(len(TURNS), size=8)
        _, _, terminated, truncated, info = worlds.step(chosen)
        turned += np.round(np.array(TURNS)[chosen] / 0.15) * 0.15
        steps += 1
        doubt, ended = (turned / 720) ** 2 / variance, terminated | truncated
        for i in range(8):
            said = info["final_info"] if ended[i] else info
            assert said["doubt"][i] == pytest.approx(doubt[i], rel=0.05, abs=1e-6)
            assert terminated[i] or truncated[i] == (doubt[i] > 0.02 or steps[i] == 7)
            if truncated[i]:
                ends[said["ended"][i]] += 1
                assert (said["ended"][i] == "doubt") == (doubt[i] > 0.02)
        turned[ended] = steps[ended] = 0
    assert min(ends.values()) > 3


def test_models_that_cannot_judge_together(goals, model, processor):
    stranger = responsive_model(list(ACTION_COLUMNS), steps=8, width=16)
    with torch.no_grad():
        next(stranger.encoder.parameters()).add_(1.0)
    ours, theirs = weights_checksum(model.encoder), weights_checksum(stranger.encoder)
    with pytest.raises(ValueError, match=f"other model 2 was trained on another encoder, .* {theirs}, .* {ours}"):
        ImaginedVPTEnv(goals, others=[(model, processor), (stranger, processor)])
    statistics = processor.action_statistics
    faster = VJEPA2ACProcessor(resolution=32, action_space="vpt-38", action_statistics=statistics, fps=10)
    with pytest.raises(ValueError, match="need one fps: the first has 5.*, another 10"):
        ImaginedVPTEnv(goals, others=[(model, faster)])
    fewer = VJEPA2ACProcessor(resolution=32, action_statistics=statistics)
    with pytest.raises(ValueError, match="action_dim is 38, but the processor's .* is 13"):
        ImaginedVPTEnv(goals, others=[(model, fewer)])


def test_steps_of_recordings_are_counted_once(clips, goals):
    """24 clips of 64 ticks, one after the other, three a recording."""
    assert goals.recorded_steps == 24 * 8


# -------------------------------------------------------------------------------------------------- bad input


def test_more_steps_than_the_model_knows_and_other_contradictions(goals):
    for make in (lambda **o: ImaginedVPTEnv(goals, **o), lambda **o: ImaginedVPTVectorEnv(goals, 2, **o)):
        with pytest.raises(ValueError, match="max_steps must be 1 to 7, since the model knows clips of 8.*found 12"):
            make(max_steps=12)
        with pytest.raises(ValueError, match="hold must be 1 to max_steps 3, found 4"):
            make(max_steps=3, hold=4)
        with pytest.raises(ValueError, match="max_doubt must be above 0.*found 0"):
            make(max_doubt=0.0)
        with pytest.raises(ValueError, match="tolerance_degrees must be above 0.*found -1"):
            make(tolerance_degrees=-1)
        with pytest.raises(ValueError, match=r"(?s)actions must be in Box.*found others: \['far'\]"):
            make(actions={"far": np.full(38, 1e9, np.float32)})
    worlds = ImaginedVPTVectorEnv(goals, 2, actions=ACTIONS)
    with pytest.raises(RuntimeError, match="call reset"):
        worlds.step([0, 0])
    with pytest.raises(ValueError, match="one for each of 2 worlds, found 3"):
        worlds.reset(seed=[1, 2, 3])
    worlds.reset(seed=0)
    with pytest.raises(ValueError, match="actions must be 2 numbers below 5, found"):
        worlds.step([0, 5])
    env = ImaginedVPTEnv(goals)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must be raw, \(1, 38\) finite numbers"):
        env.step(np.full(38, np.nan))
    with pytest.raises(ValueError, match="num_envs must be at least 1, found 0"):
        ImaginedVPTVectorEnv(goals, 0)


def test_clips_of_another_rate_shape_or_model(clips, model, processor, tmp_path):
    faster = write_clips(tmp_path / "faster", validation=0, fps=10)
    with pytest.raises(ValueError, match="the processor's fps is 5, the video has 10 frames a second"):
        RecordedGoals.from_dataset(str(faster), model, processor)
    with pytest.raises(ValueError, match="no split 'test', found"):
        RecordedGoals.from_dataset(str(clips), model, processor, split="test")
    fewer = VJEPA2ACProcessor(resolution=32, action_statistics=processor.action_statistics)
    with pytest.raises(ValueError, match="the model's action_dim is 38, but the processor's .* is 13"):
        RecordedGoals.from_dataset(str(clips), model, fewer)
    shorter = responsive_model(list(ACTION_COLUMNS), steps=4, width=16)
    with pytest.raises(ValueError, match="the model's frames_per_clip is 8, but the processor's .* is 16"):
        RecordedGoals.from_dataset(str(clips), shorter, processor)


def test_clips_without_turns(model, processor):
    frames, actions = torch.zeros(3, 8, 3, 32, 32, dtype=torch.uint8), np.zeros((3, 7, 38), np.float32)
    states = np.zeros((3, 8, 2))
    states[0, 4:, 0] = 6.5
    with pytest.raises(ValueError, match="at least 10 degrees, the largest in these 3 clips is of 6.5 degrees"):
        RecordedGoals(model, processor, frames, actions, states)
    with pytest.raises(ValueError, match=r"need actions \(3, 7, 38\) and states \(3, 8, 2\), found \(2, 7, 38\)"):
        RecordedGoals(model, processor, frames, actions[:2], states)
    with pytest.raises(ValueError, match="together below 180 degrees, found .*9"):
        RecordedGoals(model, processor, frames, actions, states, steps=(1, 9))
