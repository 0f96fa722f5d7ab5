"""Plan towards goal views in ViZDoom: how often planner, random actions and oracle get there (docs/environments.md).

    python examples/plan_vizdoom.py --model demo/model --output plans --episodes 50

Every episode's goal is drawn from its seed and is the same for all agents. OUT/episodes.jsonl gets a line an episode,
as it ends: a second run continues. OUT/summary.json has success rates (Wilson's 95 % intervals) and final distances,
OUT/success.png shows them.
"""

import argparse
import io
from pathlib import Path
from typing import Any

from vjepa_ac_hf.console import Parser, folder_or_repo, made

AGENTS = ("planner", "random", "still", "oracle")
METHODS = ("cem", "icem", "mppi")
# What the package offers, without importing it (tests/test_programs.py holds both equal).
RESOLUTIONS = ("160x120", "256x144", "320x180", "640x360", "640x480", "1280x720")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--model", required=True, type=folder_or_repo, help="folder or Hub repository of model and processor"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for episodes.jsonl and summary.json")
    parser.add_argument("--episodes", type=int, default=50, help="goals for each agent (default 50)")
    parser.add_argument("--agents", nargs="+", choices=AGENTS, default=list(AGENTS), help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode; the next one's is one more")
    parser.add_argument("--resolution", choices=RESOLUTIONS, default="256x144", help="as the model's recordings were")
    parser.add_argument("--max_steps", type=int, default=6, help="steps of an episode (default 6)")
    parser.add_argument("--tolerance_degrees", type=float, default=5.0, help="a success is this near (default 5)")
    parser.add_argument("--hold", type=int, default=1, help="steps in a row that must end so near (default 1)")
    parser.add_argument("--horizon", type=int, default=1, help="steps that the planner looks ahead (default 1)")
    parser.add_argument("--method", choices=METHODS, default="cem", help="that the planner searches by (default cem)")
    parser.add_argument("--candidates", type=int, default=64, help="of an iteration of the method (default 64)")
    parser.add_argument("--iterations", type=int, default=4, help="of the method (default 4)")
    parser.add_argument("--gradient_steps", type=int, default=0, help="down the cost's gradient, after it (default 0)")
    parser.add_argument("--inverse_dynamics", help="folder or Hub repository of a head that proposes where to begin")
    parser.add_argument(
        "--propose",
        choices=("mean", "candidate"),
        default="mean",
        help="search around it, or try it too (default mean)",
    )
    parser.add_argument("--device", default="cpu", help="for the model (default cpu)")
    arguments = parser.parse_args()
    for name, least in (("episodes", 1), ("candidates", 3), ("iterations", 1), ("gradient_steps", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, found {getattr(arguments, name)}")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

import vjepa_ac_hf  # noqa: F401 (registers the model with AutoModel and AutoProcessor)
from vjepa_ac_hf.envs import GoalViewWrapper, ModelStepWrapper, VizDoomVPTEnv, raw_action
from vjepa_ac_hf.envs.episodes import ResultLines, agent_generator, summarize, table
from vjepa_ac_hf.pages import new_figure
from vjepa_ac_hf.planning import (
    CEM,
    ICEM,
    MPPI,
    Controller,
    GradientRefinement,
    InverseDynamicsProposals,
    SearchSpace,
)
from vjepa_ac_hf.records import claim_folder, json_checksum, versions, weights_checksum, write_file, write_json

CEMS = {"cem": CEM, "icem": ICEM}
LARGEST_TURN = 45.0  # degrees a step that planner and random may choose from
KEPT = ("model", "seed", "resolution", "max_steps", "tolerance_degrees", "hold", "horizon", "candidates", "iterations")
KEPT += ("method", "gradient_steps", "inverse_dynamics", "propose")


class Planner:
    """Acts by the model, from frames and states alone."""

    def __init__(self, arguments: argparse.Namespace, model: Any, processor: Any, head: Any = None):
        self.model, self.processor = model, processor
        sizes = {"iterations": arguments.iterations, "candidates": arguments.candidates}
        elites = max(arguments.candidates // 8, 1)
        self.options: dict[str, Any] = {
            "horizon": arguments.horizon,
            "method": MPPI(**sizes) if arguments.method == "mppi" else CEMS[arguments.method](**sizes, elites=elites),
            "refinement": GradientRefinement(steps=arguments.gradient_steps) if arguments.gradient_steps else None,
            "proposals": InverseDynamicsProposals(head, model) if head else None,
            "proposal_mean": arguments.propose == "mean",
        }
        # The goals are turns: no key is pressed, and the view stays level.
        keys = [c for c in self.processor.action_space if c.startswith(("key.", "mouse.l", "mouse.r", "mouse.m"))]
        fixed = {**dict.fromkeys(keys, 0), "pitch_delta": 0.0}
        bounds = {"yaw_delta": (-LARGEST_TURN, LARGEST_TURN)}
        self.options["space"] = SearchSpace(self.processor.action_space, bounds=bounds, fixed=fixed)

    def begin(self, seen: dict, seed: int) -> None:
        self.controller = Controller(
            self.model,
            self.processor,
            np.moveaxis(seen["goal"], -1, 0),
            generator=torch.Generator().manual_seed(seed),
            **self.options,
        )
        self.first = True

    def act(self, seen: dict, info: dict) -> np.ndarray:
        frames = seen["frame"][None]
        if not self.first:
            frames = np.concatenate([seen["tubelet"][1:], frames])
        executed = None if self.first else info["action"]
        self.first = False
        return self.controller.act(frames, seen["state"], slot=max(info["hotbar"], 0), executed=executed).numpy()


def play(env: GoalViewWrapper, agent: str, planner: Planner | None, seed: int) -> dict[str, Any]:
    """One episode, as a line of the results."""
    seen, info = env.reset(seed=seed)
    goal, generator = env.goal, agent_generator(seed, agent)
    start, total = info["goal_degrees"], 0.0
    if agent == "planner":
        planner.begin(seen, seed)
    for step in range(env.max_steps):
        if agent == "planner":
            action = planner.act(seen, info)
        elif agent == "random":
            action = raw_action(turn=generator.uniform(-LARGEST_TURN, LARGEST_TURN))
        elif agent == "oracle" and step < len(goal.actions):
            action = goal.actions[step]
        else:
            action = raw_action()
        seen, reward, terminated, truncated, info = env.step(action)
        total += reward
        if terminated or truncated:
            break
    return {
        "agent": agent,
        "seed": seed,
        "success": info["success"],
        "steps": step + 1,
        "oracle_steps": len(goal.actions),
        "start_degrees": round(start, 4),
        "final_degrees": round(info["goal_degrees"], 4),
        "return": round(total, 4),
        "ended": info["ended"],
    }


def draw(agents: dict[str, Any], episodes: list[dict]) -> bytes:
    """Success rates with their intervals, and the share of episodes that end within a distance."""
    figure = new_figure(9, 3.6)
    rates, distances = figure.subplots(1, 2)
    for i, (agent, colour) in enumerate(zip(AGENTS, ("#0072B2", "#D55E00", "#7f7f7f", "#009E73"), strict=True)):
        if agent not in agents:
            continue
        rate, (low, high) = agents[agent]["success_rate"], agents[agent]["success_rate_ci95"]
        rates.bar(i, rate, color=colour, yerr=[[max(rate - low, 0.0)], [max(high - rate, 0.0)]], capsize=3)
        final = np.sort([e["final_degrees"] for e in episodes if e["agent"] == agent])
        distances.step(final, np.arange(1, len(final) + 1) / len(final), where="post", color=colour, label=agent)
    rates.set(ylabel="success rate", ylim=(0, 1.05))
    rates.set_xticks(range(len(AGENTS)), AGENTS)
    distances.set(xlabel="degrees to the goal at the end", ylabel="share of episodes", ylim=(0, 1.05))
    distances.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def main() -> None:
    arguments = parse_arguments()
    new_figure(1, 1)  # matplotlib is optional: its absence should not end a run after the work is done
    model = AutoModel.from_pretrained(arguments.model).eval().to(arguments.device)
    processor = AutoProcessor.from_pretrained(arguments.model)
    settings = {name: getattr(arguments, name) for name in KEPT}
    settings |= {"weights": weights_checksum(model), "processor": json_checksum(processor.to_dict())}
    head = None
    if arguments.inverse_dynamics:
        head = AutoModel.from_pretrained(arguments.inverse_dynamics).eval().to(arguments.device)
        settings["inverse_dynamics_weights"] = weights_checksum(head)
    # What does not fit together is refused before there is a folder.
    planner = Planner(arguments, model, processor, head) if "planner" in arguments.agents else None
    claim_folder(arguments.output, settings)
    seeds = range(arguments.seed, arguments.seed + arguments.episodes)
    wanted = [(agent, seed) for seed in seeds for agent in arguments.agents]
    episodes = ResultLines(arguments.output / "episodes.jsonl", key=("agent", "seed"))
    env = GoalViewWrapper(
        ModelStepWrapper(VizDoomVPTEnv(resolution=arguments.resolution)),
        tolerance_degrees=arguments.tolerance_degrees,
        hold=arguments.hold,
        max_steps=arguments.max_steps,
    )
    with episodes:
        for agent, seed in tqdm(wanted, unit="episode"):
            if (agent, seed) not in episodes:
                episodes.add(play(env, agent, planner, seed))
    env.close()
    counted = episodes.select(wanted)
    agents = summarize(counted, AGENTS)
    write_json(arguments.output / "summary.json", {"settings": settings, "agents": agents, "versions": versions()})
    write_file(arguments.output / "success.png", draw(agents, counted))
    print(table(agents))
    print(made("summary", arguments.output / "summary.json"))


if __name__ == "__main__":
    main()
