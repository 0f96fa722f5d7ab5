"""Reinforcement learning towards goal views in ViZDoom: PPO on frozen features, on pixels, and in imagination.

    python examples/train_rl.py --model demo/model --output rl
    python examples/train_rl.py --model demo/model --output rl --agents imagined --dataset demo/clips

All agents choose among five actions (turn by 20 or 5 degrees to either side, stay) until they have come within 5
degrees of the goal's view and ended a second step there; passing by is no success. Settings of PPO, size of the
networks after the features, goals and number of steps are the same. `features` sees features of view and goal, encoded
once a step for all environments; `pixels` sees the frames themselves, through Stable-Baselines3's convolutional
network. `imagined` sees features too, but learns in the model alone: its episodes begin at views of --dataset and are
rollouts, and the game is not started before it is evaluated there. `planner` learns nothing: it turns where the model
expects the goal (docs/planning.md, "Headings"), by the nearest of the five actions.

OUT/<agent>.jsonl gets a line an episode of the training; OUT/<agent>.zip is the agent as Stable-Baselines3 saves it,
every --save_every steps: a second run continues there, and comes to the same agent; with more --steps, to the one of a
longer training. OUT/evaluation.jsonl has episodes of the trained agents, at their most likely action and (`_sampled`)
with actions drawn as in training, of random choices, of standing still, and of an oracle that knows the angles, on
goals of their own.
OUT/summary.json, OUT/success.png and OUT/report.html compare them
(docs/environments.md, "Learning").
"""

import argparse
import base64
import html
import io
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vjepa_ac_hf.console import Parser, folder_or_repo, made

TRAINED = ("features", "pixels", "imagined")
SAMPLED = "_sampled"  # a trained agent whose actions are drawn, as in training; without it, the most likely ones
AGENTS = (*(a + choice for a in TRAINED for choice in ("", SAMPLED)), "planner", "random", "still", "oracle")
# What the package offers, without importing it (tests/test_programs.py holds both equal).
RESOLUTIONS = ("160x120", "256x144", "320x180", "640x360", "640x480", "1280x720")
GOAL_POOLINGS = ("similarity", "mean", "none")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--model", required=True, type=folder_or_repo, help="folder or Hub repository of model and processor"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for agents, episodes and report")
    parser.add_argument(
        "--agents",
        nargs="+",
        choices=(*TRAINED, "planner"),
        default=["features", "pixels"],
        help="default: features pixels",
    )
    parser.add_argument(
        "--steps",
        type=_steps,
        default=40960,
        help="steps of the model in the game for each agent (default 40960); 'data': as many as --dataset holds",
    )
    parser.add_argument(
        "--dataset", type=folder_or_repo, help="folder or Hub repository of clips: where imagined episodes begin"
    )
    parser.add_argument("--imagined_steps", type=int, default=40960, help="steps in imagination (default 40960)")
    parser.add_argument("--imagined_max_steps", type=int, default=4, help="of an imagined episode (default 4)")
    parser.add_argument("--max_doubt", type=float, help="of the model's, 0 to 1, ends such an episode (default: none)")
    parser.add_argument(
        "--ensemble",
        nargs="+",
        type=folder_or_repo,
        default=[],
        help="more models over the same encoder: their disagreement is the doubt",
    )
    parser.add_argument("--num_envs", type=int, default=8, help="games at a time (default 8)")
    parser.add_argument("--rollout", type=int, default=128, help="steps of each game between updates (default 128)")
    parser.add_argument("--batch_size", type=int, default=256, help="of PPO; divides a rollout (default 256)")
    parser.add_argument("--save_every", type=int, default=5120, help="steps between saved agents (default 5120)")
    parser.add_argument("--seed", type=int, default=0, help="of agents and training goals")
    parser.add_argument("--pooling", choices=GOAL_POOLINGS, default="similarity", help="of the features (docs)")
    parser.add_argument("--places", type=int, help="start at this many places only (default: anywhere)")
    parser.add_argument("--max_steps", type=int, default=12, help="steps of an episode (default 12)")
    parser.add_argument("--tolerance_degrees", type=float, default=5.0, help="a success is this near (default 5)")
    parser.add_argument("--eval_episodes", type=int, default=100, help="goals to compare the agents on (default 100)")
    parser.add_argument("--resolution", choices=RESOLUTIONS, default="256x144", help="as the model's recordings were")
    parser.add_argument("--device", default="cpu", help="for model and agents (default cpu)")
    arguments = parser.parse_args()
    mistake = _mistake(arguments)
    if mistake:
        parser.error(mistake)
    return arguments


def _steps(value: str) -> int | str:
    return value if value == "data" else int(value)


def _mistake(arguments: argparse.Namespace) -> str:
    """What contradicts itself; empty where nothing does."""
    for name in ("num_envs", "eval_episodes", "steps", "imagined_steps"):
        if getattr(arguments, name) != "data" and getattr(arguments, name) < 1:
            return f"--{name} must be at least 1, found {getattr(arguments, name)}"
    update = arguments.num_envs * arguments.rollout
    if arguments.rollout < 2 or arguments.batch_size < 2 or update % arguments.batch_size:
        return (
            f"--num_envs * --rollout must be a multiple of --batch_size, and the two latter at least 2, found "
            f"{arguments.num_envs} * {arguments.rollout} and {arguments.batch_size}"
        )
    steps = [arguments.imagined_steps] if "imagined" in arguments.agents else []
    in_game = arguments.steps != "data" and {"features", "pixels"} & set(arguments.agents)
    steps += [arguments.steps] if in_game else []
    for count in steps:
        if arguments.save_every < 1 or arguments.save_every % update or count % arguments.save_every:
            return (
                f"--steps and --imagined_steps must be multiples of --save_every, and that of --num_envs * --rollout, "
                f"found {count}, {arguments.save_every} and {update}"
            )
    if arguments.dataset is None and ("imagined" in arguments.agents or arguments.steps == "data"):
        return "the agent 'imagined' and --steps data need --dataset: a folder or Hub repository of clips"
    if arguments.ensemble and "imagined" not in arguments.agents:
        return f"--ensemble is for the agent 'imagined', found --agents {' '.join(arguments.agents)}"
    return ""


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

import vjepa_ac_hf  # noqa: F401 (registers the model with AutoModel and AutoProcessor)
from vjepa_ac_hf.actions_vjepa2_ac import ACTION_COLUMNS, wrap_degrees
from vjepa_ac_hf.envs import (
    DiscreteActions,
    ImaginedVPTVectorEnv,
    RecordedGoals,
    VJEPA2ACVectorFeatureWrapper,
    make_goals,
    raw_action,
    step_options,
)
from vjepa_ac_hf.envs.episodes import ResultLines, agent_generator, success_rate, summarize, table
from vjepa_ac_hf.envs.sb3 import GoalFeatures, SB3VectorEnv, Standardize
from vjepa_ac_hf.pages import PAGE_STYLE, image_tag, new_figure
from vjepa_ac_hf.planning.headings import HeadingController
from vjepa_ac_hf.records import (
    claim_folder,
    command_line,
    json_checksum,
    versions,
    weights_checksum,
    write_file,
    write_json,
)

TURNS = (-20.0, -5.0, 0.0, 5.0, 20.0)  # degrees to the right, one an action
YAW = ACTION_COLUMNS.index("yaw_delta")
EVALUATION_SEED = 1_000_000_000  # the training's are drawn from all of 32 bits
# For both agents: Stable-Baselines3's, but a horizon for short episodes, some exploration, and half the epochs.
PPO_SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "n_epochs": 5,
    "gamma": 0.9,
    "gae_lambda": 0.9,
    "ent_coef": 0.01,
}
HIDDEN_SIZES = [128, 128]
ACTIONS = {f"turn {degrees:g}": raw_action(turn=degrees) for degrees in TURNS}
KEPT = ("seed", "resolution", "pooling", "places", "max_steps", "tolerance_degrees", "num_envs", "rollout")
KEPT += ("batch_size", "save_every")


def claim_output(
    arguments: argparse.Namespace, model: Any, processor: Any, recorded: RecordedGoals | None, others: list[Any]
) -> dict[str, Any]:
    """The settings; refuses a folder that has agents of others."""
    settings = {name: getattr(arguments, name) for name in ("model", *KEPT)}
    if recorded is not None:
        settings |= {name: getattr(arguments, name) for name in ("dataset", "imagined_max_steps", "max_doubt")}
        settings |= {"recorded": recorded.checksum, "ensemble": arguments.ensemble}
        settings |= {"ensemble_weights": [weights_checksum(other) for other, _ in others]}
    if recorded is not None or "planner" in arguments.agents:
        settings |= {"predictor": weights_checksum(model.predictor)}
    settings |= {"encoder": weights_checksum(model.encoder), "processor": json_checksum(processor.to_dict())}
    settings |= {"ppo": PPO_SETTINGS, "hidden_sizes": HIDDEN_SIZES}
    step_options(model, processor)
    claim_folder(arguments.output, settings, defaults={"ensemble": [], "ensemble_weights": []})
    return settings


# ------------------------------------------------------------------------------------------------- environments


class ViewAndGoalPixels(gymnasium.ObservationWrapper):
    """What the convolutional network sees: view and goal, one after the other, every second (third, ...) pixel.

    From 60 to 120 rows, uint8 `(Y, X, 6)`.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        views = env.observation_space
        assert isinstance(views, spaces.Dict)
        height, width, _ = views["goal"].shape
        self.every = max(height // 60, 1)
        shape = (-(-height // self.every), -(-width // self.every), 6)
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)

    def observation(self, observation: dict) -> np.ndarray:
        view, goal = (observation[key][:: self.every, :: self.every] for key in ("frame", "goal"))
        return np.concatenate([view, goal], axis=-1)


def make_worlds(arguments: argparse.Namespace, recorded: RecordedGoals, others: list[Any]) -> VecEnv:
    """The game's task in the model, seen as the agent on features sees the game."""
    worlds = ImaginedVPTVectorEnv(
        recorded,
        arguments.num_envs,
        actions=ACTIONS,
        max_steps=arguments.imagined_max_steps,
        tolerance_degrees=arguments.tolerance_degrees,
        max_doubt=arguments.max_doubt,
        others=others,
        hold=2,
        success_reward=5.0,
    )
    return GoalFeatures(SB3VectorEnv(worlds), arguments.pooling)


def make_env(agent: str, arguments: argparse.Namespace, model: Any, processor: Any, num_envs: int) -> VecEnv:
    """Games in this process, as one environment of Stable-Baselines3."""

    def make() -> gymnasium.Env:
        goals = make_goals(
            resolution=arguments.resolution,
            places=arguments.places,
            tolerance_degrees=arguments.tolerance_degrees,
            max_steps=arguments.max_steps,
            hold=2,
            success_reward=5.0,
            **step_options(model, processor),
        )
        env = DiscreteActions(goals, ACTIONS)
        return env if agent in ("features", "planner") else ViewAndGoalPixels(env)

    games = SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    if agent != "features":
        return SB3VectorEnv(games)
    options: dict[str, Any] = {"still_keys": ("goal",), "still_frames": True, "pooling": "none"}
    features = VJEPA2ACVectorFeatureWrapper(games, model, processor, **options)
    return GoalFeatures(SB3VectorEnv(features), arguments.pooling)


# ----------------------------------------------------------------------------------------------------- training


class Episodes(BaseCallback):
    """A line for every episode that ends."""

    def __init__(self, lines: ResultLines, progress: tqdm):
        super().__init__()
        self.lines, self.progress = lines, progress

    def _on_step(self) -> bool:
        self.progress.update(self.training_env.num_envs)
        for info in self.locals["infos"]:
            if "episode" in info:
                line = {
                    "step": self.num_timesteps,
                    "success": bool(info["success"]),
                    "steps": int(info["episode"]["l"]),
                }
                line |= {"final_degrees": round(float(info["goal_degrees"]), 4), "ended": info["ended"]}
                self.lines.add({**line, "return": round(float(info["episode"]["r"]), 4)}, sync=False)
        return True


def new_agent(agent: str, arguments: argparse.Namespace, env: VecEnv) -> PPO:
    policy: dict[str, Any] = {"net_arch": HIDDEN_SIZES}
    if agent == "pixels":
        policy["features_extractor_kwargs"] = {"features_dim": 256}
    else:
        policy["features_extractor_class"] = Standardize
    ppo = PPO(
        "CnnPolicy" if agent == "pixels" else "MlpPolicy",
        env,
        n_steps=arguments.rollout,
        batch_size=arguments.batch_size,
        policy_kwargs=policy,
        seed=arguments.seed,
        device=arguments.device,
        **PPO_SETTINGS,
    )
    if agent != "pixels":
        generator = agent_generator(arguments.seed, "standardize")
        seen = [env.reset()]
        while len(seen) * env.num_envs < 256:
            seen.append(env.step(generator.integers(len(TURNS), size=env.num_envs))[0])
        ppo.policy.features_extractor.fit(np.concatenate(seen))
    return ppo


def steps_of(agent: str, arguments: argparse.Namespace) -> int:
    return arguments.imagined_steps if agent == "imagined" else arguments.steps


def train(agent: str, arguments: argparse.Namespace, make: Callable[[], VecEnv]) -> PPO:
    """Train one agent to the end, from where it was saved, in the environment that `make` makes."""
    wanted = steps_of(agent, arguments)
    saved = arguments.output / f"{agent}.zip"
    # Saved agents know their steps: there is no second record that could contradict them.
    ppo = PPO.load(saved, device=arguments.device) if saved.is_file() else None
    done = ppo.num_timesteps if ppo else 0
    episodes, saves = (
        ResultLines(arguments.output / f"{name}.jsonl", counts=lambda line: line["step"] <= done)
        for name in (agent, f"{agent}_saves")
    )
    if done > wanted:
        flag = "--imagined_steps" if agent == "imagined" else "--steps"
        raise ValueError(f"{saved}: trained for {done} steps already, {flag} is {wanted}")
    if ppo and done == wanted:
        print(f"{saved}: trained already, {done} steps")
        return ppo
    env = VecMonitor(make())
    ppo = ppo or new_agent(agent, arguments, env)
    with tqdm(total=wanted, initial=done, unit="step", desc=agent) as progress, episodes, saves:
        while done < wanted:
            # All that is random begins anew, and new episodes begin: a run that was killed does the same from here on.
            ppo.set_env(env, force_reset=True)
            ppo.set_random_seed(int(np.random.SeedSequence([arguments.seed, done]).generate_state(1)[0]))
            began = time.perf_counter()
            ppo.learn(arguments.save_every, callback=Episodes(episodes, progress), reset_num_timesteps=False)
            seconds, done = time.perf_counter() - began, ppo.num_timesteps
            saves.add({"step": done, "seconds": round(seconds, 3)})
            episodes.sync()
            unfinished = arguments.output / f".{agent}.tmp.zip"
            ppo.save(unfinished)
            os.replace(unfinished, saved)
    env.close()
    return ppo


# --------------------------------------------------------------------------------------------------- evaluation


Choice = Callable[[Any, dict], int]  # from what is seen, and `info`, to the number of an action


def play(env: VecEnv, seed: int, choose: Choice) -> dict[str, Any]:
    """One episode, as a line of the results."""
    env.seed(seed)
    seen, info = env.reset(), env.reset_infos[0]
    start, total, steps, done = info["goal_degrees"], 0.0, 0, False
    while not done:
        seen, rewards, dones, infos = env.step(np.array([choose(seen, info)]))
        total, steps, done, info = total + float(rewards[0]), steps + 1, bool(dones[0]), infos[0]
    return {
        "success": bool(info["success"]),
        "steps": steps,
        "start_degrees": round(float(start), 4),
        "final_degrees": round(float(info["goal_degrees"]), 4),
        "return": round(total, 4),
        "ended": str(info["ended"]),
    }


def planner(model: Any, processor: Any) -> Choice:
    """For one episode: what is nearest to the turn that a `HeadingController` asks for, which sees what was done."""
    controller: HeadingController | None = None

    def choose(seen: Any, info: dict) -> int:
        nonlocal controller
        tubelet, frame, state, goal = (seen[name][0] for name in ("tubelet", "frame", "state", "goal"))
        frames, executed = np.concatenate([tubelet[1:], frame[None]]), info["action"]
        if controller is None:
            controller = HeadingController(model, processor, np.moveaxis(goal, -1, 0))
            frames, executed = frame[None], None
        action = controller.act(frames, state, slot=max(int(info["hotbar"]), 0), executed=executed)
        return int(np.argmin(np.abs(np.array(TURNS) - float(action[YAW]))))

    return choose


def chooser(agent: str, env: VecEnv, ppo: PPO | None, seed: int) -> Choice:
    """Of an agent that needs no model, or was trained."""
    generator = agent_generator(seed, agent)

    def oracle(*_: Any) -> int:
        left = wrap_degrees(float(env.get_attr("goal")[0].state[0]) - env.get_attr("view")[0][0])
        return int(np.argmin(np.abs(np.array(TURNS) - left)))

    if ppo is not None:
        sampled = agent.endswith(SAMPLED)
        torch.manual_seed(int(generator.integers(2**63)))
        return lambda seen, _: int(ppo.predict(seen, deterministic=not sampled)[0][0])
    if agent == "still":
        return lambda *_: TURNS.index(0.0)
    return oracle if agent == "oracle" else lambda *_: int(generator.integers(len(TURNS)))


def evaluate(arguments: argparse.Namespace, trained: dict[str, PPO], model: Any, processor: Any) -> list[dict]:
    """Episodes of all agents on the same goals."""
    episodes = ResultLines(arguments.output / "evaluation.jsonl", key=("agent", "trained_steps", "seed"))
    seeds = range(EVALUATION_SEED, EVALUATION_SEED + arguments.eval_episodes)
    policies = {agent: trained.get(agent.removesuffix(SAMPLED)) for agent in AGENTS}
    agents = [a for a in AGENTS if policies[a] or a in (*arguments.agents, "random", "still", "oracle")]
    wanted = [(a, policies[a].num_timesteps if policies[a] else 0, seed) for a in agents for seed in seeds]
    env, current = None, ""
    with episodes:
        for agent, steps, seed in tqdm(wanted, unit="episode", desc="evaluation"):
            if (agent, steps, seed) in episodes:
                continue
            sees = "features" if agent.startswith(("features", "imagined")) else "pixels"
            sees = agent if agent == "planner" else sees
            if env is None or sees != current:
                if env is not None:
                    env.close()
                env, current = make_env(sees, arguments, model, processor, 1), sees
            line = {"agent": agent, "trained_steps": steps, "seed": seed}
            own = planner(model, processor) if agent == "planner" else chooser(agent, env, policies[agent], seed)
            episodes.add({**line, **play(env, seed, own)})
    if env is not None:
        env.close()
    return episodes.select(wanted)


# ------------------------------------------------------------------------------------------------------ summary


def add_training(arguments: argparse.Namespace, agents: dict[str, Any]) -> None:
    """Figures of the training, for the agents that were trained."""
    for agent in (agent for agent in TRAINED if agent in agents):
        lines, saves = (ResultLines(arguments.output / f"{name}.jsonl").lines for name in (agent, f"{agent}_saves"))
        seconds = sum(s["seconds"] for s in saves)
        agents[agent]["training"] = {
            "steps": steps_of(agent, arguments),
            "seconds": seconds,
            "steps_per_second": steps_of(agent, arguments) / seconds,
            "curve": [
                {
                    "step": s["step"],
                    **success_rate([x for x in lines if 0 <= s["step"] - x["step"] < arguments.save_every]),
                }
                for s in saves
            ],
        }


def draw(agents: dict[str, Any]) -> bytes:
    """Success during the training (policies are sampled there), between what random choices and the oracle reach."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for agent, colour in zip(TRAINED, ("#0072B2", "#D55E00", "#CC79A7"), strict=True):
        if agent not in agents:
            continue
        curve = [p for p in agents[agent]["training"]["curve"] if p["episodes"]]
        steps = [p["step"] for p in curve]
        label = f"{agent}, goals of its imagination" if agent == "imagined" else agent
        axes.plot(steps, [p["success_rate"] for p in curve], "o-", color=colour, label=label)
        low, high = ([p["success_rate_ci95"][end] for p in curve] for end in (0, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    for agent, style in (("random", "--"), ("oracle", ":"), ("planner", "-.")):
        if agent in agents:
            axes.axhline(agents[agent]["success_rate"], color="#7f7f7f", linestyle=style, label=agent)
    axes.set(
        xlabel="steps of the model", ylabel="success rate", ylim=(0, 1.02), title="Goals reached during the training"
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write_report(output: Path, summary: dict[str, Any], picture: bytes) -> None:
    rows = ""
    for agent, figures in summary["agents"].items():
        low, high = (100 * end for end in figures["success_rate_ci95"])
        speed = figures["training"]["steps_per_second"] if "training" in figures else None
        rows += (
            f"<tr><th>{agent}</th><td>{100 * figures['success_rate']:.1f} <small>{low:.1f} to {high:.1f}</small></td>"
            f"<td>{figures['episodes']}</td><td>{figures['steps']:.1f}</td><td>{figures['start_degrees']:.1f}</td>"
            f"<td>{figures['final_degrees']:.1f}</td><td>{figures['final_degrees_median']:.1f}</td>"
            f"<td>{'–' if speed is None else f'{speed:.1f}'}</td></tr>"
        )
    heads = (
        "success, %",
        "goals",
        "steps",
        "start, degrees",
        "final, degrees",
        "final, median",
        "training steps a second",
    )
    settings = summary["settings"]
    trained = [f"{agent} {f['training']['steps']:,} steps" for agent, f in summary["agents"].items() if "training" in f]
    about = (
        f"PPO: {', '.join(trained) or 'none'}; {settings['pooling']} of the features of {settings['model']}; a "
        f"success is a view held within {settings['tolerance_degrees']:g} degrees of the goal's, in at most "
        f"{settings['max_steps']} steps"
    )
    used = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Reinforcement learning towards goal views</title><style>{PAGE_STYLE}</style></head><body><main>
<h1>Reinforcement learning towards goal views</h1><p class="facts">{html.escape(about)}</p>
<section><h2>Trained agents, on goals of their own</h2><div class="scroll"><table>
<tr><th></th>{"".join(f"<th>{head}</th>" for head in heads)}</tr>{rows}</table></div>
<p class="facts">The same goals for all, in the game. Wilson's 95 % intervals, over goals: what another seed of the
training would change is not in them.</p>
</section><section><h2>Training</h2>{image_tag(base64.b64encode(picture).decode(), "success rate by step")}</section>
<section><h2>How it was made</h2><p><code>{html.escape(summary["command"])}</code></p>
<p class="facts">{html.escape(used)}. The numbers are in summary.json beside this page.</p></section>
</main></body></html>
"""
    write_file(output / "report.html", page.encode())


def steps_of_data(arguments: argparse.Namespace, recorded: Any) -> int:
    """As many steps in the game as the clips hold, down to a multiple of --save_every."""
    steps = recorded.recorded_steps // arguments.save_every * arguments.save_every
    if steps == 0:
        raise ValueError(
            f"{recorded.name}: holds {recorded.recorded_steps} steps, fewer than --save_every {arguments.save_every}"
        )
    print(f"{recorded.name}: holds {recorded.recorded_steps:,} steps of the game; --steps {steps}")
    return steps


def main() -> None:
    arguments = parse_arguments()
    model = AutoModel.from_pretrained(arguments.model).eval().to(arguments.device)
    processor = AutoProcessor.from_pretrained(arguments.model)
    others = [
        (AutoModel.from_pretrained(name).eval().to(arguments.device), AutoProcessor.from_pretrained(name))
        for name in arguments.ensemble
    ]
    recorded = None
    if arguments.dataset is not None:
        recorded = RecordedGoals.from_dataset(arguments.dataset, model, processor)
        # What does not fit together is refused before there is a folder.
        make_worlds(arguments, recorded, others).close()
    if arguments.steps == "data":
        arguments.steps = steps_of_data(arguments, recorded)
    settings = claim_output(arguments, model, processor, recorded, others)
    trained = {}
    for agent in TRAINED:
        if agent in arguments.agents:
            make = partial(make_env, agent, arguments, model, processor, arguments.num_envs)
            if agent == "imagined":
                make = partial(make_worlds, arguments, recorded, others)
            trained[agent] = train(agent, arguments, make)
    agents = summarize(evaluate(arguments, trained, model, processor), AGENTS)
    add_training(arguments, agents)
    settings |= {"steps": arguments.steps, "imagined_steps": arguments.imagined_steps}
    summary = {"settings": settings, "agents": agents, "command": command_line(), "versions": versions()}
    write_json(arguments.output / "summary.json", summary)
    picture = draw(agents)
    write_file(arguments.output / "success.png", picture)
    write_report(arguments.output, summary, picture)
    print(table(agents))
    print(made("report", arguments.output / "report.html"))


if __name__ == "__main__":
    main()
