"""The planning program in the game: its episodes, baselines, and a second run."""

import argparse
import base64
import itertools
import json
import runpy
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_models import save_world
from helpers_streams import largest_correlation
from transformers import AutoModel, AutoProcessor

pytest.importorskip("vizdoom")

from vjepa_ac_hf import VJEPA2ACForFrameDecoding, VJEPA2ACForInverseDynamics
from vjepa_ac_hf.envs import GoalViewWrapper, ModelStepWrapper, VizDoomVPTEnv
from vjepa_ac_hf.envs.agents import make_random, play
from vjepa_ac_hf.planning import Controller
from vjepa_ac_hf.planning.report import Story, first_of_both, story_png

PROGRAM = runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "plan_vizdoom.py"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("model"))


def plan(monkeypatch, model, output, *flags, candidates=8):
    arguments = ["--model", model, "--output", output, "--resolution", "160x120", "--max_steps", 3, *flags]
    arguments += ["--candidates", candidates, "--iterations", 1]
    monkeypatch.setattr(sys, "argv", ["plan_vizdoom.py", *map(str, arguments)])
    PROGRAM["main"]()
    return [json.loads(line) for line in (output / "episodes.jsonl").read_text().splitlines()]


def test_episodes_summary_and_a_second_run(model, tmp_path, monkeypatch):
    episodes = plan(monkeypatch, model, tmp_path, "--episodes", 3)
    assert {(e["agent"], e["seed"]) for e in episodes} == {
        (agent, seed) for agent in ("planner", "random", "still", "oracle") for seed in range(3)
    }
    by_agent = {a: [e for e in episodes if e["agent"] == a] for a in ("planner", "random", "still", "oracle")}
    assert all(e["success"] and e["final_degrees"] == 0 for e in by_agent["oracle"])
    assert all(not e["success"] and e["final_degrees"] == e["start_degrees"] for e in by_agent["still"])
    assert all(e["steps"] <= 3 and (e["steps"] == 3 or e["success"]) for e in episodes)
    for agents in zip(*by_agent.values(), strict=True):  # the same goals for all
        assert len({(e["start_degrees"], e["oracle_steps"]) for e in agents}) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())["agents"]
    assert summary["oracle"]["success_rate"] == 1 and summary["still"]["success_rate"] == 0
    mean = sum(e["final_degrees"] for e in by_agent["planner"]) / 3
    assert summary["planner"]["final_degrees"] == pytest.approx(mean)
    assert (tmp_path / "success.png").read_bytes()[:4] == b"\x89PNG"

    for agent, figures in summary.items():
        seconds = [second for e in by_agent[agent] for second in e["seconds"]]
        assert figures["actions"] == len(seconds) == sum(e["steps"] for e in by_agent[agent])
        assert figures["seconds_per_action_median"] == pytest.approx(statistics.median(seconds))
        assert figures["seconds_per_action_mean"] == pytest.approx(statistics.fmean(seconds))

    # Killed while it wrote a line: that episode is played again, with the same result, and no other.
    whole = (tmp_path / "episodes.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "episodes.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20])
    again = plan(monkeypatch, model, tmp_path, "--episodes", 3)
    assert again[:-2] == episodes[:-2]  # not played again: with the same times
    assert [{**e, "seconds": None} for e in again] == [{**e, "seconds": None} for e in episodes]
    with pytest.raises(ValueError, match="tolerance_degrees: found 5.0, expected 3.0; hold: found 1, expected 2"):
        plan(monkeypatch, model, tmp_path, "--episodes", 3, "--tolerance_degrees", 3, "--hold", 2)


def test_results_belong_to_the_weights_and_the_processor(model, tmp_path, monkeypatch):
    folder = shutil.copytree(model, tmp_path / "model")
    flags = ("--episodes", 1, "--agents", "still")
    plan(monkeypatch, folder, tmp_path / "out", *flags)
    other = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        other.predictor.norm.bias[0] += 1e-3
    other.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"made with other arguments \(weights: found \w{8}, expected \w{8}\); choose"):
        plan(monkeypatch, folder, tmp_path / "out", *flags)
    shutil.copytree(model, folder, dirs_exist_ok=True)
    plan(monkeypatch, folder, tmp_path / "out", *flags)
    processor = AutoProcessor.from_pretrained(folder)
    processor.action_statistics["mean"][2] += 1.0
    processor.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"made with other arguments \(processor: found \w{8}, expected \w{8}\); choose"
    ):
        plan(monkeypatch, folder, tmp_path / "out", *flags)


def at_another_rate(model, folder, **values):
    shutil.copytree(model, folder)
    processor = AutoProcessor.from_pretrained(folder)
    for name, value in values.items():
        setattr(processor, name, value)
    processor.save_pretrained(folder)
    return folder


def test_a_step_lasts_as_long_as_the_models(model, tmp_path, monkeypatch):
    """Trained on 4 frames a second, 2 a step: 10 ticks; other ticks or frames a step than the model's are refused."""
    ticks, step = [], ModelStepWrapper.step

    def watched(self, action):
        result = step(self, action)
        ticks.append(result[-1]["ticks"])
        return result

    monkeypatch.setattr(ModelStepWrapper, "step", watched)
    flags = ("--episodes", 1, "--agents", "still", "planner")
    plan(monkeypatch, at_another_rate(model, tmp_path / "slower", fps=4), tmp_path / "out", *flags)
    assert ticks and set(ticks) == {10}
    refused: dict = {
        "the game has 20 ticks a second, the recordings .* have 60": {"native_fps": 60, "fps": 15},
        "tubelet_size is 2, but the processor's tubelet_size is 4": {"tubelet_size": 4},
        "must be a whole number, found 20 / 6": {"fps": 6},
    }
    for number, (message, values) in enumerate(refused.items()):
        folder = at_another_rate(model, tmp_path / f"model{number}", **values)
        with pytest.raises(ValueError, match=message):
            plan(monkeypatch, folder, tmp_path / f"out{number}", "--agents", "still", "--episodes", 1)
        assert not (tmp_path / f"out{number}").exists()


def test_ways_to_search(model, tmp_path, monkeypatch):
    """Each changes what is done, and none belongs into another's folder."""
    world = AutoModel.from_pretrained(model)
    statistics = AutoProcessor.from_pretrained(model).action_statistics
    small = {"head_hidden_size": 16, "head_num_hidden_layers": 1, "head_num_attention_heads": 2}
    torch.manual_seed(0)
    head = VJEPA2ACForInverseDynamics.from_world_model(
        world, action_space=["yaw_delta"], action_statistics=statistics, **small
    )
    head.save_pretrained(tmp_path / "head")
    proposed = ("--inverse_dynamics", tmp_path / "head")
    ways = [(), ("--method", "icem", "--horizon", 2), ("--method", "mppi"), ("--gradient_steps", 2), proposed]
    ways.append((*proposed, "--propose", "candidate"))
    played, made = [], []
    watched = lambda *a, **options: (made.append(options), Controller(*a, **options))[1]  # noqa: E731
    monkeypatch.setitem(PROGRAM["main"].__globals__, "Controller", watched)
    for number, flags in enumerate(ways):
        output = tmp_path / str(number)
        played += plan(monkeypatch, model, output, "--agents", "planner", "--episodes", 1, *flags)
    assert all(e["agent"] == "planner" and e["steps"] <= 3 for e in played)
    assert [type(options["method"]).__name__ for options in made] == ["CEM", "ICEM", "MPPI", "CEM", "CEM", "CEM"]
    assert [options["horizon"] for options in made] == [1, 2, 1, 1, 1, 1]
    assert [options["refinement"] and options["refinement"].steps for options in made] == [None] * 3 + [2, None, None]
    assert [options["proposals"] is not None for options in made] == [False] * 4 + [True] * 2
    assert [options["proposal_mean"] for options in made] == [True] * 5 + [False]
    settings = json.loads((tmp_path / "4" / "settings.json").read_text())
    assert settings["propose"] == "mean" and len(settings["inverse_dynamics_weights"]) == 8
    with pytest.raises(
        ValueError, match="gradient_steps: found 0, expected 3; inverse_dynamics: found .*, expected None"
    ):
        plan(monkeypatch, model, tmp_path / "4", "--gradient_steps", 3)
    with torch.no_grad():
        head.vjepa2_ac.encoder.layernorm.bias.add_(1.0)
    head.save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match=r"the head was trained on another encoder, checksum \w{8}, the model's"):
        plan(monkeypatch, model, tmp_path / "new", *proposed)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "manifest", "method"),
    [
        ((), "view-easy-v1", "headings"),
        ((), None, "headings"),
        ((), "walk-v1", "cem"),
        (("--horizon", 2), "view-hard-v1", "cem"),
        (("--gradient_steps", 0), None, "cem"),
        (("--method", "icem", "--candidates", 9), None, "icem"),
    ],
)
def test_the_method_follows_from_task_and_flags(monkeypatch, flags, manifest, method):
    given = ["x", "--model", "m/m", "--output", "o", *flags, *(["--manifest", manifest] if manifest else [])]
    monkeypatch.setattr(sys, "argv", [*map(str, given)])
    arguments = PROGRAM["parse_arguments"]()
    PROGRAM["read_task"](arguments)
    assert (arguments.method, arguments.iterations) == (method, 4)
    assert arguments.candidates == (9 if "--candidates" in flags else 64)
    assert arguments.horizon == (2 if "--horizon" in flags else 1)


def test_methods_that_do_not_fit(model, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        plan(monkeypatch, model, tmp_path / "no", "--method", "headings")
    assert "--method headings takes no --candidates, --iterations: they are for" in capsys.readouterr().err
    flags = ["x", "--model", model, "--output", tmp_path / "no", "--method", "headings"]
    monkeypatch.setattr(sys, "argv", [*map(str, flags), "--manifest", "walk-v1"])
    with pytest.raises(ValueError, match=r"headings turns and presses no keys, the task has \['key.w'\]: use cem"):
        PROGRAM["main"]()
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["x", "--output", str(tmp_path / "no"), "--agents", "planner"])
        PROGRAM["main"]()
    assert "--model is needed: the agents have a planner" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_several_models_by_the_program(model, tmp_path, monkeypatch):
    """Their weights are among the settings; another order of them is another result."""
    folder = shutil.copytree(model, tmp_path / "other")
    other = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        other.encoder.layernorm.bias[0] += 0.1
    other.save_pretrained(folder)
    flags = ("--episodes", 1, "--agents", "planner")
    plan(monkeypatch, model, tmp_path / "out", *flags, "--ensemble", folder, "--doubt", 0.5)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["ensemble"] == [str(folder)] and settings["doubt"] == 0.5
    assert settings["ensemble_weights"][0] != settings["weights"]
    with pytest.raises(ValueError, match="doubt: found 0.5, expected 0.0"):
        plan(monkeypatch, model, tmp_path / "out", *flags, "--ensemble", folder)
    processor = AutoProcessor.from_pretrained(folder)
    processor.fps = 10
    processor.save_pretrained(folder)
    with pytest.raises(ValueError, match="need one fps: the first has 5.*, another 10"):
        plan(monkeypatch, model, tmp_path / "new", *flags, "--ensemble", folder)


def test_too_few_candidates_are_refused(model, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        plan(monkeypatch, model, tmp_path / "no", candidates=2)
    assert "--candidates must be at least 3, found 2" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_goals_to_be_held(model, tmp_path, monkeypatch):
    flags = ("--episodes", 2, "--hold", 2, "--max_steps", 4, "--agents", "oracle")
    for episode in plan(monkeypatch, model, tmp_path, *flags):
        assert episode["success"] and episode["steps"] == episode["oracle_steps"] + 1


def test_a_game_that_ends_in_the_middle_of_a_plan(model, tmp_path, monkeypatch):
    """Teleported three ticks into the second of three planned steps: the episode is over, the next one is new."""
    flags = ("--agents", "planner", "--horizon", 3)
    (undisturbed,) = plan(monkeypatch, model, tmp_path / "undisturbed", *flags, "--episodes", 1, "--seed", 1)
    env = VizDoomVPTEnv(resolution="160x120")
    env.reset(seed=7)
    place = env.position
    env.close()
    steps, ticks = itertools.count(1), itertools.count(1)
    step, tick = GoalViewWrapper.step, VizDoomVPTEnv.step
    second = False

    def goal_step(self, action):
        nonlocal second
        second = next(steps) == 2
        return step(self, action)

    def game_tick(self, action):
        if second and next(ticks) == 3:
            self.game.send_game_command(f"warp {place[0]} {place[1]}")
        return tick(self, action)

    monkeypatch.setattr(GoalViewWrapper, "step", goal_step)
    monkeypatch.setattr(VizDoomVPTEnv, "step", game_tick)
    ended, following = plan(monkeypatch, model, tmp_path / "ended", *flags, "--episodes", 2)
    assert (ended["ended"], ended["steps"], ended["success"]) == ("teleport", 2, False)
    assert {**following, "seconds": None} == {**undisturbed, "seconds": None}
    summary = json.loads((tmp_path / "ended" / "summary.json").read_text())["agents"]["planner"]
    assert summary["episodes"] == 2 and summary["ended_early"] == 1


def test_a_time_limit_in_the_middle_of_a_plan(model):
    """Reached after 5 of the 8 ticks of the second of three planned steps; a controller that is reset begins afresh."""
    game = VizDoomVPTEnv(resolution="160x120", max_ticks=13)
    env = GoalViewWrapper(ModelStepWrapper(game), steps=(1, 1), tolerance_degrees=0.01)
    loaded = (AutoModel.from_pretrained(model).eval(), AutoProcessor.from_pretrained(model))
    arguments = argparse.Namespace(
        iterations=1, candidates=8, horizon=3, method="cem", gradient_steps=0, propose="mean", doubt=0.0
    )
    planner = PROGRAM["Planner"](arguments, *loaded)
    played = play(env, "planner", planner, 1, env.reset(seed=1))
    assert (played["ended"], played["steps"], played["success"]) == ("ticks", 2, False)

    def make_controller(seed: int) -> Controller:
        generator = torch.Generator().manual_seed(seed)
        return Controller(
            planner.model, planner.processor, goal, generator=generator, replan_every=3, **planner.options
        )

    seen, info = env.reset(seed=3)
    goal = np.moveaxis(seen["goal"], -1, 0)
    controller = make_controller(0)
    action = controller.act(seen["frame"][None], seen["state"])
    chosen, taken = controller.plan, []
    for ticks in (8, 5):
        seen, _, terminated, truncated, info = env.step(action.numpy())
        taken.append(info["ticks"])
        assert truncated == (ticks == 5) and not terminated
        frames = np.concatenate([seen["tubelet"][1:], seen["frame"][None]])
        action = controller.act(frames, seen["state"], executed=info["action"])
    assert taken == [8, 5] and controller.plan is chosen and torch.equal(action, chosen.actions[2])
    with pytest.raises(RuntimeError, match=r"the episode has ended.*call reset\(\)"):
        env.step(action.numpy())

    seen, _ = env.reset(seed=4)
    with pytest.raises(ValueError, match=r"\(2, 3, height, width\), those since the last call, found \(1, "):
        controller.act(seen["frame"][None], seen["state"])  # the controller has not been told
    controller.reset()
    fresh = make_controller(0)
    fresh.act(seen["frame"][None], seen["state"])  # draws what the first episode has drawn
    fresh.reset()
    assert torch.equal(
        controller.act(seen["frame"][None], seen["state"]), fresh.act(seen["frame"][None], seen["state"])
    )
    env.close()


def test_random_turns_know_nothing_of_the_goal():
    """Drawn from the environment's own stream, the second turn is a quarter of the heading."""

    class Game:
        max_steps, goal = 8, argparse.Namespace(actions=[])

        def reset(self, seed):
            self.turns = []
            return {}, {"goal_degrees": 40.0}

        def step(self, action):
            self.turns.append(float(action[2]))
            return {}, 0.0, False, False, {"success": False, "goal_degrees": 40.0, "goal_units": 0.0, "ended": ""}

    game = Game()

    def turns(seed: int) -> list[float]:
        play(game, "random", make_random(45.0), seed, game.reset(seed))
        return game.turns

    assert largest_correlation(turns) < 0.35
    assert turns(3) == turns(3) != turns(4) and max(map(abs, turns(3))) <= 45


def test_what_the_plan_expected_is_shown_beside_what_happened(model, tmp_path, monkeypatch):
    """Against the controller's own plans and the game played again: goal, frames, turns and distances of an episode."""
    world = AutoModel.from_pretrained(model)
    small = {"head_hidden_size": 16, "head_num_hidden_layers": 1, "head_num_attention_heads": 2}
    torch.manual_seed(0)
    decoder = VJEPA2ACForFrameDecoding.from_world_model(world, **small).eval()
    decoder.save_pretrained(tmp_path / "decoder")
    scope, stories, plans = PROGRAM["main"].__globals__, [], []
    draw_story = scope["story_png"]
    monkeypatch.setitem(scope, "story_png", lambda story: (stories.append(story), draw_story(story))[1])

    class Noted(Controller):
        def act(self, *arguments, **options):
            action = super().act(*arguments, **options)
            plans.append(self.plan.features[0])
            return action

    monkeypatch.setitem(scope, "Controller", Noted)
    output, flags = tmp_path / "<out>", ("--agents", "planner", "--episodes", 2)
    episodes = plan(monkeypatch, model, output, *flags, "--decoder", tmp_path / "decoder")
    assert len(stories) == 2 and sum(e["steps"] for e in episodes) == len(plans)
    with torch.no_grad():
        told = decoder(features=torch.stack(plans)[None]).frames[0, ::2].permute(0, 2, 3, 1).numpy()
    env = GoalViewWrapper(ModelStepWrapper(VizDoomVPTEnv(resolution="160x120")), max_steps=3)
    first = 0
    for episode, story in zip(episodes, stories, strict=True):
        seen, info = env.reset(seed=episode["seed"])
        assert np.array_equal(story.goal, seen["goal"]) and len(story.expected) == episode["steps"]
        for step in range(episode["steps"] + 1):
            assert np.array_equal(story.seen[step], seen["frame"])
            assert story.degrees[step] == pytest.approx(info["goal_degrees"])
            if step < episode["steps"]:
                np.testing.assert_allclose(story.expected[step], told[first + step], atol=1e-5)
                seen, *_, info = env.step(story.actions[step])
        assert round(story.degrees[-1], 4) == episode["final_degrees"]
        first += episode["steps"]
    env.close()
    page = (output / "report.html").read_text()
    for episode in episodes:
        picture = (output / "plans" / f"planner-{episode['seed']}.png").read_bytes()
        assert base64.b64encode(picture).decode() in page
        assert f"seed {episode['seed']}: {'reached' if episode['success'] else 'not reached'}" in page
    # Other agents alone have no plans, a decoder of another encoder is refused, and results without it are the same.
    assert plan(monkeypatch, model, tmp_path / "plain", *flags)[0]["final_degrees"] == episodes[0]["final_degrees"]
    with pytest.raises(SystemExit):
        plan(monkeypatch, model, output, "--agents", "still", "--decoder", tmp_path / "decoder")
    with torch.no_grad():
        world.encoder.layernorm.bias.add_(1.0)
    VJEPA2ACForFrameDecoding.from_world_model(world, **small).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other: the decoder was trained on another encoder, checksum \w{8}"):
        plan(monkeypatch, model, tmp_path / "none", *flags, "--decoder", tmp_path / "other")
    assert not (tmp_path / "none").exists()


def test_first_successes_and_failures_and_stories_that_do_not_fit():
    won = {3: True, 4: False, 5: True, 6: True, 7: False}
    assert first_of_both(won, 2) == [3, 4, 5, 7] and first_of_both({}, 2) == []
    frame = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match="found 2 frames, 1 distances, 0 expected frames and 0 actions"):
        story_png(Story(frame, [frame, frame], [1.0]))
