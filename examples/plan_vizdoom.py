"""Plan towards goal views in ViZDoom: how often planner, random actions and oracle get there (docs/environments.md).

    python examples/plan_vizdoom.py --model demo/model --manifest view-easy-v1 --output plans
    python examples/plan_vizdoom.py --policy my_policy.py:agent --manifest view-easy-v1 --output plans-of-mine
    python examples/plan_vizdoom.py --model demo/model --output plans --episodes 50
    python examples/plan_vizdoom.py --make_manifest view-easy-v1 --output manifests

A manifest holds goals that are always the same, and what counts as reached. Without one every episode's goal is drawn
from its seed. All agents have the same goals. OUT/episodes.jsonl gets a line an episode, as it ends: a second run
continues. OUT/summary.json has success rates (Wilson's 95 % intervals), final distances and the time of an action,
OUT/success.png shows them; with --decoder OUT/report.html has what plans expected beside what happened.
"""

import argparse
import io
import math
from pathlib import Path
from typing import Any

from vjepa_ac_hf.console import Parser, folder_or_repo, made

AGENTS = ("planner", "random", "still", "oracle")
ROWS, COLOURS = (*AGENTS, "policy"), ("#0072B2", "#D55E00", "#7f7f7f", "#009E73", "#CC79A7")
METHODS = ("headings", "cem", "icem", "mppi")
# What the package offers, without importing it (tests/test_programs.py holds both equal).
RESOLUTIONS = ("160x120", "256x144", "320x180", "640x360", "640x480", "1280x720")
MANIFESTS = ("view-easy-v1", "view-hard-v1", "walk-v1")
# Flags of the methods that search by drawing candidates.
SEARCH = {"horizon": 1, "candidates": 64, "iterations": 4, "gradient_steps": 0, "inverse_dynamics": None}
# What a manifest decides, and its values without one.
TASK = {"episodes": 50, "seed": 0, "resolution": "256x144", "max_steps": 6, "tolerance_degrees": 5.0, "hold": 1}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=folder_or_repo, help="folder or Hub repository of model and processor")
    parser.add_argument("--output", required=True, type=Path, help="folder for episodes.jsonl and summary.json")
    parser.add_argument("--manifest", help=f"{', '.join(MANIFESTS)}, or a file: goals, and what counts as reached")
    parser.add_argument("--agents", nargs="+", choices=AGENTS, help="default: all, planner with --model alone")
    parser.add_argument(
        "--policy", help="one more agent: 'module:function' or 'FILE.py:function' (docs/environments.md)"
    )
    parser.add_argument("--make_manifest", choices=MANIFESTS, help="draw it (of --seed and --episodes), and do no more")
    task = parser.add_argument_group("task", "without a manifest, which has its own")
    task.add_argument("--episodes", type=int, help="goals for each agent (default 50)")
    task.add_argument("--seed", type=int, help="of the first episode; the next one's is one more (default 0)")
    task.add_argument("--resolution", choices=RESOLUTIONS, help="as the model's recordings were (default 256x144)")
    task.add_argument("--max_steps", type=int, help="steps of an episode (default 6)")
    task.add_argument("--tolerance_degrees", type=float, help="a success is this near (default 5)")
    task.add_argument("--hold", type=int, help="steps in a row that must end so near (default 1)")
    search = parser.add_argument_group("search", "what the planner does")
    search.add_argument(
        "--method",
        choices=METHODS,
        help="default: headings (turn until the goal is seen); cem where the task has keys, or a flag of its is given",
    )
    search.add_argument("--horizon", type=int, help="steps that cem, icem and mppi look ahead (default 1)")
    search.add_argument("--candidates", type=int, help="of an iteration of theirs (default 64)")
    search.add_argument("--iterations", type=int, help="of theirs (default 4)")
    search.add_argument("--gradient_steps", type=int, help="down the cost's gradient, after them (default 0)")
    search.add_argument("--inverse_dynamics", help="folder or Hub repository of a head that proposes where to begin")
    search.add_argument(
        "--distance", help="folder or repository of a head that tells steps: the cost (docs/planning.md)"
    )
    search.add_argument(
        "--ensemble", nargs="+", type=folder_or_repo, default=[], help="more models, which judge together with --model"
    )
    search.add_argument("--doubt", type=float, default=0.0, help="weight of their disagreement in the cost (default 0)")
    search.add_argument(
        "--propose",
        choices=("mean", "candidate"),
        default="mean",
        help="search around it, or try it too (default mean)",
    )
    parser.add_argument("--decoder", type=folder_or_repo, help="frame decoder: OUT/report.html shows what plans expect")
    parser.add_argument("--device", default="cpu", help="for the model (default cpu)")
    arguments = parser.parse_args()
    for name, least in (("episodes", 1), ("candidates", 3), ("iterations", 1), ("gradient_steps", 0)):
        if (getattr(arguments, name) or least) < least or getattr(arguments, name) == 0 < least:
            parser.error(f"--{name} must be at least {least}, found {getattr(arguments, name)}")
    searched = [f"--{name}" for name in SEARCH if getattr(arguments, name) is not None]
    if arguments.method == "headings" and searched:
        parser.error(f"--method headings takes no {', '.join(searched)}: they are for the other methods")
    if arguments.method is None and searched:
        arguments.method = "cem"
    for name, value in SEARCH.items():
        setattr(arguments, name, value if getattr(arguments, name) is None else getattr(arguments, name))
    if arguments.distance and arguments.ensemble:
        parser.error("--distance is of one model's features: it takes no --ensemble")
    if arguments.agents is None:
        arguments.agents = [agent for agent in AGENTS if agent != "planner" or arguments.model]
    if "planner" in arguments.agents and not (arguments.model or arguments.make_manifest):
        parser.error("--model is needed: the agents have a planner")
    if arguments.decoder and "planner" not in arguments.agents:
        parser.error("--decoder shows what plans expect: the agents have no planner")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

import vjepa_ac_hf  # noqa: F401 (registers the model with AutoModel and AutoProcessor)
from vjepa_ac_hf.envs import GoalViewWrapper, ModelStepWrapper, VizDoomVPTEnv, step_options
from vjepa_ac_hf.envs.agents import Act, Agent, load_policy, make_oracle, make_random, play, still
from vjepa_ac_hf.envs.episodes import ResultLines, summarize, table
from vjepa_ac_hf.envs.manifests import Manifest, draw_manifest, load_manifest, manifest_text
from vjepa_ac_hf.evaluation.decoding import load_decoder
from vjepa_ac_hf.pages import new_figure
from vjepa_ac_hf.planning import (
    CEM,
    ICEM,
    MPPI,
    Controller,
    DistanceCost,
    GradientRefinement,
    HeadingController,
    InverseDynamicsProposals,
    SearchSpace,
    encode_goal,
)
from vjepa_ac_hf.planning.planner import check_horizon, check_same_steps
from vjepa_ac_hf.planning.report import Story, first_of_both, planning_page, story_png
from vjepa_ac_hf.records import claim_folder, json_checksum, versions, weights_checksum, write_file, write_json

CEMS = {"cem": CEM, "icem": ICEM}
SHOWN = 3  # successes, and as many failures, in the report
LARGEST_TURN = 45.0  # degrees a step that planner and random may choose from
KEPT = ("model", "seed", "resolution", "max_steps", "tolerance_degrees", "hold", "horizon", "candidates", "iterations")
KEPT += ("method", "gradient_steps", "inverse_dynamics", "propose", "policy", "ensemble", "doubt", "distance")
BEFORE = {"ensemble": [], "doubt": 0.0, "policy": None, "distance": None}  # settings of files that do not name them


class Planner:
    """Acts by the model, from frames and states alone: an agent."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        model: Any,
        processor: Any,
        head: Any = None,
        task: Any = None,
        others: Any = (),
        distance: Any = None,
    ):
        self.model, self.processor, self.method, self.distance = model, processor, arguments.method, distance
        if distance is not None:  # refused before any goal is known
            DistanceCost(distance, model, torch.zeros(model.config.num_tokens, model.config.feature_size))
        self.options: dict[str, Any]
        self.expected: list[torch.Tensor] = []  # of this episode: features `(N, D)` that each action was to lead to
        task = task or {"keys": [], "largest_turn": LARGEST_TURN}
        if arguments.method == "headings":
            if task["keys"]:
                raise ValueError(f"--method headings turns and presses no keys, the task has {task['keys']}: use cem")
            for one in (model, *[other for other, _ in others]):
                check_horizon(one, 1, math.ceil(180 / task["largest_turn"]))
            self.options = {"largest_turn": task["largest_turn"], "others": others, "doubt": arguments.doubt}
            return
        sizes = {"iterations": arguments.iterations, "candidates": arguments.candidates}
        elites = max(arguments.candidates // 8, 1)
        self.options = {
            "horizon": arguments.horizon,
            "method": MPPI(**sizes) if arguments.method == "mppi" else CEMS[arguments.method](**sizes, elites=elites),
            "refinement": GradientRefinement(steps=arguments.gradient_steps) if arguments.gradient_steps else None,
            "proposals": InverseDynamicsProposals(head, model) if head else None,
            "proposal_mean": arguments.propose == "mean",
            "others": others,
            "doubt": arguments.doubt,
        }
        # Turns, and the keys that the task asks for; the view stays level.
        keys = [c for c in self.processor.action_space if c.startswith(("key.", "mouse.l", "mouse.r", "mouse.m"))]
        fixed = {**dict.fromkeys([key for key in keys if key not in task["keys"]], 0), "pitch_delta": 0.0}
        bounds = {"yaw_delta": (-task["largest_turn"], task["largest_turn"])}
        self.options["space"] = SearchSpace(self.processor.action_space, bounds=bounds, fixed=fixed)

    def __call__(self, seed: int) -> Act:
        controller, generator = None, torch.Generator().manual_seed(seed)
        self.expected = []

        def act(seen: dict, info: dict) -> np.ndarray:
            nonlocal controller
            frames, executed = seen["frame"][None], None
            if controller is None:
                goal: Any = np.moveaxis(seen["goal"], -1, 0)
                if self.distance is not None:
                    goal = DistanceCost(self.distance, self.model, encode_goal(self.model, self.processor, goal))
                if self.method == "headings":
                    controller = HeadingController(self.model, self.processor, goal, **self.options)
                else:
                    controller = Controller(self.model, self.processor, goal, generator=generator, **self.options)
            else:
                frames, executed = np.concatenate([seen["tubelet"][1:], frames]), info["action"]
            action = controller.act(frames, seen["state"], slot=max(info["hotbar"], 0), executed=executed).numpy()
            self.expected.append(controller.plan.features[0])
            return action

        return act


class Watched:
    """An environment whose episode is noted: what `play` needs of one."""

    def __init__(self, env: GoalViewWrapper, begun: tuple[dict, dict]):
        self.env, self.goal, self.max_steps = env, env.goal, env.max_steps
        seen, info = begun
        self.story = Story(seen["goal"], [seen["frame"]], [info["goal_degrees"]])

    def step(self, action: np.ndarray) -> tuple:
        found = self.env.step(action)
        seen, info = found[0], found[-1]
        self.story.actions.append(info["action"])
        self.story.seen.append(seen["frame"])
        self.story.degrees.append(info["goal_degrees"])
        return found


def play_and_draw(env: GoalViewWrapper, planner: Planner, decoder: Any, begun: tuple, seed: int, folder: Path) -> dict:
    """An episode of the planner, as `play` gives it, with its picture in a file of the folder."""
    watched = Watched(env, begun)
    line = play(watched, "planner", planner, seed, begun)  # type: ignore[arg-type]
    with torch.no_grad():
        frames = decoder(features=torch.stack(planner.expected)[None].to(decoder.device)).frames[0]
    size = decoder.config.encoder_config.tubelet_size
    watched.story.expected = list(frames[::size].cpu().movedim(1, 3).numpy())
    folder.mkdir(exist_ok=True)
    write_file(folder / f"planner-{seed}.png", story_png(watched.story))
    return line


def draw(agents: dict[str, Any], episodes: list[dict]) -> bytes:
    """Success rates with their intervals, and the share of episodes that end within a distance."""
    figure = new_figure(9, 3.6)
    rates, distances = figure.subplots(1, 2)
    for i, (agent, colour) in enumerate(zip(ROWS, COLOURS, strict=True)):
        if agent not in agents:
            continue
        rate, (low, high) = agents[agent]["success_rate"], agents[agent]["success_rate_ci95"]
        rates.bar(i, rate, color=colour, yerr=[[max(rate - low, 0.0)], [max(high - rate, 0.0)]], capsize=3)
        final = np.sort([e["final_degrees"] for e in episodes if e["agent"] == agent])
        distances.step(final, np.arange(1, len(final) + 1) / len(final), where="post", color=colour, label=agent)
    rates.set(ylabel="success rate", ylim=(0, 1.05))
    rates.set_xticks(range(len(ROWS)), ROWS)
    distances.set(xlabel="degrees to the goal at the end", ylabel="share of episodes", ylim=(0, 1.05))
    distances.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def read_task(arguments: argparse.Namespace) -> Manifest | None:
    """Fill in what the task's flags leave open; the manifest, if there is one."""
    given = {name: getattr(arguments, name) for name in TASK}
    manifest = load_manifest(arguments.manifest) if arguments.manifest else None
    if manifest:
        manifest.check_settings(given, "flags")
    own = {**manifest.task, "seed": manifest.seeds[0], "episodes": len(manifest.seeds)} if manifest else TASK
    for name, value in given.items():
        setattr(arguments, name, own[name] if value is None else value)
    if arguments.method is None:
        arguments.method = "cem" if manifest and manifest.task["keys"] else "headings"
    return manifest


def make_environment(arguments: argparse.Namespace, manifest: Manifest | None, rate: dict) -> GoalViewWrapper:
    if manifest:
        return manifest.make_environment()
    steps = ModelStepWrapper(VizDoomVPTEnv(resolution=arguments.resolution), **rate)
    return GoalViewWrapper(
        steps, tolerance_degrees=arguments.tolerance_degrees, hold=arguments.hold, max_steps=arguments.max_steps
    )


def load_agents(arguments: argparse.Namespace, manifest: Manifest | None) -> tuple[dict[str, Agent], dict, dict]:
    """Agents by row, but for the oracle, the settings that results depend on, and how long the model's steps are."""
    settings = {name: getattr(arguments, name) for name in KEPT} | (manifest.identity if manifest else {})
    task = manifest.task if manifest else {"keys": [], "largest_turn": LARGEST_TURN}
    agents: dict[str, Agent] = {"random": make_random(task["largest_turn"], task["keys"]), "still": still}
    if arguments.policy:
        agents["policy"], settings["policy_file"] = load_policy(arguments.policy)
    if arguments.model is None:
        return agents, settings, {}
    model = AutoModel.from_pretrained(arguments.model).eval().to(arguments.device)
    processor = AutoProcessor.from_pretrained(arguments.model)
    settings |= {"weights": weights_checksum(model), "processor": json_checksum(processor.to_dict())}
    rate = step_options(model, processor)
    if manifest:
        manifest.check_settings(rate, "the model's steps")
    head = None
    if arguments.inverse_dynamics:
        head = AutoModel.from_pretrained(arguments.inverse_dynamics).eval().to(arguments.device)
        settings["inverse_dynamics_weights"] = weights_checksum(head)
    if "planner" in arguments.agents:
        distance = None
        if arguments.distance:
            distance = AutoModel.from_pretrained(arguments.distance).eval().to(arguments.device)
            settings["distance_weights"] = weights_checksum(distance)
        others = []
        for name in arguments.ensemble:
            other = AutoModel.from_pretrained(name).eval().to(arguments.device)
            others.append((other, AutoProcessor.from_pretrained(name)))
            check_same_steps(processor, others[-1][1])
        settings["ensemble_weights"] = [weights_checksum(other) for other, _ in others]
        agents["planner"] = Planner(arguments, model, processor, head, task, others, distance)
    return agents, settings, rate


def write_summary(output: Path, settings: dict[str, Any], episodes: list[dict]) -> None:
    """summary.json, success.png, with pictures of plans report.html, and the table on the screen."""
    agents = summarize(episodes, ROWS)
    write_json(output / "summary.json", {"settings": settings, "agents": agents, "versions": versions()})
    write_file(output / "success.png", draw(agents, episodes))
    pictures = {e["seed"]: output / "plans" / f"planner-{e['seed']}.png" for e in episodes if e["agent"] == "planner"}
    won = {e["seed"]: e["success"] for e in episodes if e["agent"] == "planner" and pictures[e["seed"]].is_file()}
    if won:
        files = {"success rates, and distances at the end": output / "success.png"}
        for seed in first_of_both(won, SHOWN):
            files[f"seed {seed}: {'reached' if won[seed] else 'not reached'}"] = pictures[seed]
        page = planning_page(f"Plans of {settings['model']}", agents, files)
        write_file(output / "report.html", page.encode())
        print(made("report", output / "report.html"))
    print(table(agents))
    print(made("summary", output / "summary.json"))


def main() -> None:
    arguments = parse_arguments()
    if arguments.make_manifest:
        content = draw_manifest(arguments.make_manifest, episodes=arguments.episodes or 100, first_seed=arguments.seed)
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"{content['name']}.json"
        write_file(path, manifest_text(content).encode())
        print(made("manifest", path, {"episodes": len(content["episodes"]), **content["drawn"]["left_out"]}))
        return
    new_figure(1, 1)  # matplotlib is optional: its absence should not end a run after the work is done
    manifest = read_task(arguments)
    # What does not fit together is refused before there is a folder.
    agents, settings, rate = load_agents(arguments, manifest)
    decoder = None if arguments.decoder is None else load_decoder(arguments.decoder, agents["planner"].model)
    claim_folder(arguments.output, settings, defaults=BEFORE)
    seeds = manifest.seeds if manifest else range(arguments.seed, arguments.seed + arguments.episodes)
    rows = [*arguments.agents, *(["policy"] if arguments.policy else [])]
    wanted = [(agent, seed) for seed in seeds for agent in rows]
    mark = {"manifest": manifest.sha256} if manifest else {}
    env = make_environment(arguments, manifest, rate)
    agents["oracle"] = make_oracle(env)
    with ResultLines(arguments.output / "episodes.jsonl", key=("agent", "seed")) as episodes:
        for agent, seed in tqdm(wanted, unit="episode"):
            if (agent, seed) not in episodes:
                begun = manifest.begin(env, seed) if manifest else env.reset(seed=seed)
                if agent == "planner" and decoder is not None:
                    line = play_and_draw(env, agents[agent], decoder, begun, seed, arguments.output / "plans")
                else:
                    line = play(env, agent, agents[agent], seed, begun)
                episodes.add({**line, **mark})
    env.close()
    write_summary(arguments.output, settings, episodes.select(wanted))


if __name__ == "__main__":
    main()
