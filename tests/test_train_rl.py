"""The reinforcement learning program in the game: its figures, its second run, and what is killed."""

import argparse
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_clips import write_clips
from helpers_models import save_world
from helpers_streams import largest_correlation

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("vizdoom")
pytest.importorskip("stable_baselines3")

from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_for_stable_baselines
from stable_baselines3.common.vec_env import DummyVecEnv
from transformers import AutoModel, AutoProcessor

from vjepa_ac_hf.envs import make_goals

PATH = Path(__file__).resolve().parents[1] / "examples" / "train_rl.py"
PROGRAM = runpy.run_path(str(PATH))
SMALL = ["--resolution", "160x120", "--num_envs", "2", "--rollout", "8", "--batch_size", "8", "--save_every", "16"]
SMALL += ["--max_steps", "8", "--steps", "32", "--eval_episodes", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("model"))


def flags(model, output, *more) -> list[str]:
    return ["--model", str(model), "--output", str(output), *SMALL, *map(str, more)]


def run(monkeypatch, model, output, *more) -> dict:
    monkeypatch.setattr(sys, "argv", ["train_rl.py", *flags(model, output, *more)])
    PROGRAM["main"]()
    return json.loads((output / "summary.json").read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return PPO.load(path, device="cpu").policy.state_dict()


def check_rate(found: dict, successes: list[bool]) -> None:
    """Wilson's interval as the roots of (p - rate)^2 n = z^2 p (1 - p)."""
    n, rate = len(successes), sum(successes) / len(successes)
    assert found["episodes"] == n and found["success_rate"] == pytest.approx(rate)
    roots = np.sort(np.roots([n + 1.96**2, -(2 * n * rate + 1.96**2), n * rate**2]).real)
    assert found["success_rate_ci95"] == pytest.approx(roots.tolist(), abs=1e-6)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A run that nothing has disturbed."""
    output = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, model, output)
    return output


def test_figures_come_from_the_episodes_and_a_second_run_adds_nothing(model, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    evaluation = lines(tmp_path / "evaluation.jsonl")
    trained = ("features", "pixels")
    agents = ("features", "features_sampled", "pixels", "pixels_sampled", "random", "still", "oracle")
    assert {(e["agent"], e["trained_steps"], e["seed"] - 10**9) for e in evaluation} == {
        (agent, 32 * agent.startswith(trained), i) for agent in agents for i in range(2)
    }
    for seed in {e["seed"] for e in evaluation}:  # the same goals for all
        assert len({e["start_degrees"] for e in evaluation if e["seed"] == seed}) == 1
    for e in evaluation:  # success is told apart from what the angles say
        assert not e["success"] or (e["final_degrees"] <= 5 and e["steps"] >= 2)
        assert e["success"] or e["steps"] == 8
        nearer = (e["start_degrees"] - e["final_degrees"]) / 5
        assert e["return"] == pytest.approx(nearer + 5 * e["success"], abs=1e-3)
    for agent in agents:
        own, found = [e for e in evaluation if e["agent"] == agent], summary["agents"][agent]
        check_rate(found, [e["success"] for e in own])
        for name in ("steps", "start_degrees", "final_degrees", "return"):
            assert found[name] == pytest.approx(sum(e[name] for e in own) / 2)
    for e in (e for e in evaluation if e["agent"] == "still"):
        assert not e["success"] and e["final_degrees"] == e["start_degrees"] >= 9.9
    # Turns of at most 20 degrees to come near enough, and a step to stay.
    for e in (e for e in evaluation if e["agent"] == "oracle"):
        least = math.ceil((e["start_degrees"] - 5) / 20) + 1
        assert e["success"] and least <= e["steps"] <= least + 1
    for agent in trained:
        training, episodes = summary["agents"][agent]["training"], lines(tmp_path / f"{agent}.jsonl")
        saves = lines(tmp_path / f"{agent}_saves.jsonl")
        assert [s["step"] for s in saves] == [16, 32] == [p["step"] for p in training["curve"]]
        assert training["steps_per_second"] == pytest.approx(32 / sum(s["seconds"] for s in saves))
        assert sum(p["episodes"] for p in training["curve"]) == len(episodes) > 0
        for point in training["curve"]:
            own = [e["success"] for e in episodes if point["step"] - 16 < e["step"] <= point["step"]]
            assert point["episodes"] == len(own)
            if own:
                check_rate(point, own)
        assert PPO.load(tmp_path / f"{agent}.zip").num_timesteps == 32
    report = (tmp_path / "report.html").read_text()
    cells = re.findall(r"<tr><th>(\w+)</th><td>([\d.]+) ", report)
    assert cells == [(a, f"{100 * summary['agents'][a]['success_rate']:.1f}") for a in agents]
    assert (tmp_path / "success.png").read_bytes()[:4] == b"\x89PNG"

    # Killed while it wrote a line: that episode is played again, and nothing is trained.
    whole, agent = (tmp_path / "evaluation.jsonl").read_text(), (tmp_path / "pixels.zip").read_bytes()
    (tmp_path / "evaluation.jsonl").write_text(whole[:-30])
    monkeypatch.setattr(PPO, "learn", None)
    assert {**run(monkeypatch, model, tmp_path), "command": summary["command"]} == summary
    assert (tmp_path / "evaluation.jsonl").read_text() == whole
    assert (tmp_path / "pixels.zip").read_bytes() == agent
    with pytest.raises(ValueError, match="settings.json: .*max_steps: found 8, expected 9.*another --output"):
        run(monkeypatch, model, tmp_path, "--max_steps", 9)
    with pytest.raises(ValueError, match=r"features.zip: trained for 32 steps already, --steps is 16"):
        run(monkeypatch, model, tmp_path, "--steps", 16)
    assert (tmp_path / "evaluation.jsonl").read_text() == whole
    processor = AutoProcessor.from_pretrained(shutil.copytree(model, tmp_path / "other"))
    processor.resize_mode = "squash"
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"processor: found \w{8}, expected \w{8}"):
        run(monkeypatch, tmp_path / "other", tmp_path)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips") / "clips", validation=0)


def test_an_agent_that_learns_in_imagination_meets_the_game_when_it_is_trained(model, clips, tmp_path, monkeypatch):
    """Trained at once, or interrupted between two saves and continued: the same agent, and the same episodes."""
    names, made = PROGRAM["main"].__globals__, []
    make_goals, collect = names["make_goals"], PPO.collect_rollouts
    more = ("--agents", "imagined", "--dataset", clips, "--imagined_steps", 32, "--eval_episodes", 1)
    monkeypatch.setitem(
        names, "make_goals", lambda **o: made.append((tmp_path / "whole/imagined.zip").is_file()) or make_goals(**o)
    )
    summary = run(monkeypatch, model, tmp_path / "whole", *more)
    assert made and PPO.load(tmp_path / "whole/imagined.zip").num_timesteps == 32
    assert set(summary["agents"]) == {"imagined", "imagined_sampled", "random", "still", "oracle"}
    assert summary["agents"]["imagined"]["training"]["steps"] == 32
    for e in lines(tmp_path / "whole/imagined.jsonl"):
        assert (
            e["steps"] <= 4
            and e["ended"] == ""
            and e["success"] == (e["return"] > 5 - 1e-3 and e["final_degrees"] <= 5)
        )
    assert summary["settings"].keys() >= {"dataset", "recorded", "predictor", "imagined_max_steps"}

    def interrupted(*arguments, **options):
        collect(*arguments, **options)
        if arguments[0].num_timesteps > 16:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(PPO, "collect_rollouts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, model, tmp_path / "parts", *more)
    monkeypatch.setattr(PPO, "collect_rollouts", collect)
    assert PPO.load(tmp_path / "parts/imagined.zip").num_timesteps == 16
    assert run(monkeypatch, model, tmp_path / "parts", *more)["agents"]["imagined"]["return"] == pytest.approx(
        summary["agents"]["imagined"]["return"]
    )
    one, other = (weights(tmp_path / part / "imagined.zip") for part in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    # What several models disagree on ends episodes: here every step of every one.
    apart = tmp_path / "apart"
    other = AutoModel.from_pretrained(model)
    with torch.no_grad():
        for weight in other.predictor.parameters():
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std()
    other.save_pretrained(apart / "model")
    AutoProcessor.from_pretrained(model).save_pretrained(apart / "model")
    doubting = (*more, "--ensemble", apart / "model", "--max_doubt", 1e-9, "--imagined_steps", 16)
    settings = run(monkeypatch, model, apart / "out", *doubting)["settings"]
    assert {e["ended"] or e["success"] for e in lines(apart / "out/imagined.jsonl")} <= {"doubt", True}
    assert settings["ensemble"] == [str(apart / "model")] and len(settings["ensemble_weights"]) == 1
    with pytest.raises(ValueError, match=r"ensemble: found \['.*model'\], expected \[\]"):
        run(monkeypatch, model, apart / "out", *more, "--max_doubt", 1e-9, "--imagined_steps", 16)
    with pytest.raises(ValueError, match="trained for 32 steps already, --imagined_steps is 16"):
        run(monkeypatch, model, tmp_path / "parts", *more, "--imagined_steps", 16)
    with pytest.raises(ValueError, match="max_steps must be 1 to 7, since the model knows clips of 8 steps.*found 8"):
        run(monkeypatch, model, tmp_path / "no", *more, "--imagined_max_steps", 8)
    assert not (tmp_path / "no").exists()


def test_a_planner_plays_the_same_task_with_the_same_actions(model, tmp_path, monkeypatch):
    summary = run(monkeypatch, model, tmp_path / "out", "--agents", "planner")
    assert list(summary["agents"]) == ["planner", "random", "still", "oracle"]
    assert not list((tmp_path / "out").glob("*.zip")) and summary["settings"]["predictor"]
    episodes = lines(tmp_path / "out/evaluation.jsonl")
    assert {(e["agent"], e["seed"] - 10**9) for e in episodes} == {
        (agent, seed) for agent in summary["agents"] for seed in range(2)
    }
    for seed in (10**9, 10**9 + 1):
        assert len({e["start_degrees"] for e in episodes if e["seed"] == seed}) == 1
    assert "<th>planner</th>" in (tmp_path / "out/report.html").read_text()
    # Where it would turn by 13 degrees, the nearest action that all agents have is 20; by -12, it is -5.
    asked, calls = [13.0, -12.0, 2.0, 2.0], []

    class Scripted:
        def __init__(self, world, processor, goal):
            calls.append(goal)

        def act(self, frames, state, *, slot, executed):
            calls.append((frames, state.copy(), slot, executed))
            return torch.from_numpy(PROGRAM["raw_action"](turn=asked[len(calls) - 2]))

    names = PROGRAM["main"].__globals__
    monkeypatch.setitem(names, "HeadingController", Scripted)
    monkeypatch.setattr(sys, "argv", ["train_rl.py", *flags(model, tmp_path / "no", "--max_steps", 4)])
    world, processor = AutoModel.from_pretrained(model), AutoProcessor.from_pretrained(model)
    env = names["make_env"]("planner", PROGRAM["parse_arguments"](), world, processor, 1)
    line = PROGRAM["play"](env, 7, PROGRAM["planner"](world, processor))
    env.close()
    [goal, *acts] = calls
    assert line["steps"] == len(acts) == 4 and goal.shape == (3, 120, 160)
    turns = np.diff([state[0] for _, state, _, _ in acts])
    np.testing.assert_allclose((turns + 180) % 360 - 180, [20, -5, 0], atol=0.08)  # to a whole count of the mouse
    assert acts[0][0].shape == (1, 120, 160, 3) and acts[0][3] is None
    for before, (frames, _, slot, executed), turn in zip(acts, acts[1:], turns, strict=False):
        assert frames.shape == (2, 120, 160, 3) and slot == 1 == np.argmax(executed[28:37])
        assert executed[2] == pytest.approx((turn + 180) % 360 - 180, abs=1e-3)
        # The tubelet's first frame was seen when the step began: only its second one is new, and the frame now.
        if executed[2]:
            assert not np.array_equal(frames[-1], before[0][-1]) and not np.array_equal(frames[0], before[0][-1])


def test_as_many_steps_as_the_data_hold():
    recorded = argparse.Namespace(name="clips, split train", recorded_steps=7696)
    assert PROGRAM["steps_of_data"](argparse.Namespace(save_every=1024), recorded) == 7168
    with pytest.raises(ValueError, match="clips, split train: holds 7696 steps, fewer than --save_every 8192"):
        PROGRAM["steps_of_data"](argparse.Namespace(save_every=8192), recorded)


@pytest.mark.slow
def test_an_interrupted_training_comes_to_the_same_agent(model, finished, tmp_path, monkeypatch):
    """Trained for fewer steps first; then interrupted between two saves, with episodes that were not saved."""
    alone = ("--agents", "features")
    run(monkeypatch, model, tmp_path / "parts", *alone, "--steps", 16, "--eval_episodes", 1)
    collect = PPO.collect_rollouts

    def interrupted(*arguments, **options):
        collect(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(PPO, "collect_rollouts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, model, tmp_path / "parts", *alone)
    monkeypatch.setattr(PPO, "collect_rollouts", collect)
    assert PPO.load(tmp_path / "parts/features.zip").num_timesteps == 16
    assert lines(tmp_path / "parts/features.jsonl")[-1]["step"] > 16
    with open(tmp_path / "parts/features.jsonl", "a") as file:
        file.write('{"step": 4')
    run(monkeypatch, model, tmp_path / "parts", *alone)
    assert lines(tmp_path / "parts/features.jsonl") == lines(finished / "features.jsonl")
    expected = [e for e in lines(finished / "evaluation.jsonl") if not e["agent"].startswith("pixels")]
    found = [e for e in lines(tmp_path / "parts/evaluation.jsonl") if e["trained_steps"] != 16]
    assert sorted(found, key=str) == sorted(expected, key=str)
    summary = json.loads((tmp_path / "parts/summary.json").read_text())
    assert summary["settings"]["steps"] == 32 and summary["agents"]["features"]["episodes"] == 2
    one, other = (weights(output / "features.zip") for output in (finished, tmp_path / "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    # What the policy sees is standardised over what random choices have seen.
    assert len(one["features_extractor.mean"]) == 16 and (one["features_extractor.deviation"] > 0).all()


@pytest.mark.slow
def test_a_killed_training_is_continued(model, tmp_path):
    """Killed for good, twice, through the command line."""
    more = ("--agents", "pixels")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(output):
        command = [sys.executable, str(PATH), *flags(model, output, *more)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    assert whole.wait(300) == 0
    parts, saved = tmp_path / "parts", tmp_path / "parts/pixels.zip"
    for steps in (16, 32):
        process, before = start(parts), saved.stat().st_mtime_ns if saved.is_file() else 0
        while not (saved.is_file() and saved.stat().st_mtime_ns > before):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert PPO.load(saved).num_timesteps == steps
    assert start(parts).wait(300) == 0
    assert (parts / "pixels.jsonl").read_text() == (tmp_path / "whole/pixels.jsonl").read_text()
    one, other = weights(tmp_path / "whole/pixels.zip"), weights(saved)
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    found = [json.loads((p / "summary.json").read_text())["agents"] for p in (tmp_path / "whole", parts)]
    for agents in found:
        agents["pixels"]["training"] = agents["pixels"]["training"]["curve"]  # seconds differ
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch_size", 7], "multiple of --batch_size.* found 2 \\* 8 and 7"),
        (["--save_every", 24], "found 32, 24 and 16"),
        (["--steps", 40], "found 40, 16 and 16"),
        (["--eval_episodes", 0], "--eval_episodes must be at least 1, found 0"),
        (["--agents", "imagined"], "the agent 'imagined' and --steps data need --dataset"),
        (["--steps", "data"], "the agent 'imagined' and --steps data need --dataset"),
        (["--ensemble", "org/other"], "--ensemble is for the agent 'imagined', found --agents features pixels"),
        (["--agents", "imagined", "--imagined_steps", 40], "found 40, 16 and 16"),
    ],
)
def test_arguments_that_contradict_each_other(model, tmp_path, monkeypatch, capsys, more, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, model, tmp_path / "no", *more)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "no").exists()


@pytest.fixture(scope="module")
def goals():
    env = make_goals(resolution="160x120", places=2, max_steps=6, hold=2, success_reward=5.0)
    yield env
    env.close()


def test_a_step_lasts_as_long_as_the_models(model, tmp_path, monkeypatch):
    """Trained on 4 frames a second, 2 a step: 10 ticks, for both agents; other ticks than the game's: refused."""
    parameters, world = PROGRAM["parse_arguments"].__globals__, AutoModel.from_pretrained(model).eval()
    monkeypatch.setattr(sys, "argv", ["train_rl.py", *flags(model, tmp_path / "out")])
    arguments, processor = PROGRAM["parse_arguments"](), AutoProcessor.from_pretrained(model)
    processor.fps = 4
    for agent in ("features", "pixels"):
        env = parameters["make_env"](agent, arguments, world, processor, 1)
        env.reset()
        assert env.step(np.array([2]))[3][0]["ticks"] == 10
        env.close()
    folder = shutil.copytree(model, tmp_path / "model")
    processor.native_fps, processor.fps = 60, 15
    processor.save_pretrained(folder)
    with pytest.raises(ValueError, match="the game has 20 ticks a second, the recordings .* have 60"):
        run(monkeypatch, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_agents_see_is_what_stable_baselines_and_gymnasium_take(goals):
    discrete = PROGRAM["DiscreteActions"](goals)
    seen, _ = goals.reset(seed=3)
    view, goal = seen["frame"], seen["goal"]
    pixels = PROGRAM["ViewAndGoalPixels"](discrete)
    check_env(pixels, skip_render_check=True)
    check_for_stable_baselines(pixels)
    found = pixels.reset(seed=3)[0]
    assert found.shape == (60, 80, 6)
    for y, x in ((0, 0), (7, 31), (59, 79)):
        np.testing.assert_array_equal(found[y, x], [*view[2 * y, 2 * x], *goal[2 * y, 2 * x]])


def test_trained_agents_act_as_in_training_and_at_their_most_likely_action():
    """A policy of known probabilities: drawn actions follow them, the same for the same episode; the others do not."""
    env = DummyVecEnv([lambda: gymnasium.make("CartPole-v1")])
    ppo = PPO("MlpPolicy", env, n_steps=2, batch_size=2, seed=0, device="cpu")
    with torch.no_grad():
        ppo.policy.action_net.weight.zero_()
        ppo.policy.action_net.bias.copy_(torch.tensor([0.3, 0.7]).log())
    seen = np.zeros((1, 4), np.float32)

    def choices(agent: str, seed: int) -> list[int]:
        choose = PROGRAM["chooser"](agent, env, ppo, seed)
        return [choose(seen, {}) for _ in range(40)]

    drawn = [choices("features_sampled", seed) for seed in range(20)]
    assert np.mean(drawn) == pytest.approx(0.7, abs=0.06) and len({tuple(row) for row in drawn}) == 20
    assert choices("features_sampled", 7) == drawn[7]
    assert choices("features", 7) == [1] * 40


def test_few_places_and_many_headings(goals):
    begun = [goals.reset(seed=seed)[1] for seed in range(12)]
    assert {i["engine_seed"] for i in begun} == {1, 2}
    assert len({tuple(np.round(i["position"], 3)) for i in begun}) == 2
    assert len({i["heading"] for i in begun}) == 12
    with pytest.raises(ValueError, match="places must be at least 1, found 0"):
        make_goals(places=0)
    for wrong in (-1.0, math.inf):
        with pytest.raises(ValueError, match=f"success_reward must be a finite number, at least 0, found {wrong}"):
            type(goals)(goals.env, success_reward=wrong)


def test_random_choices_know_nothing_of_the_goal():
    """Drawn from the environment's own stream, the second choice tells the goal's side."""

    def choices(seed: int) -> list[int]:
        choose = PROGRAM["chooser"]("random", None, None, seed)
        return [choose(None, {}) for _ in range(8)]

    assert largest_correlation(choices) < 0.35
    assert choices(3) == choices(3) != choices(4) and {*choices(3)} <= set(range(5))
