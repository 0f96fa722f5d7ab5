"""Frozen sets of goals, so that two success rates mean the same thing (docs/environments.md, "Manifests").

A manifest is a JSON file: starts, goals, what counts as reached, how they were drawn, and the SHA-256 of all that,
which every result carries. Those of the package lie in `goal_manifests/`.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..actions_vjepa2_ac import ACTION_COLUMNS
from .goals import GoalEpisode, GoalViewWrapper, rehearse, view_distance
from .steps import ModelStepWrapper, raw_action
from .vizdoom_env import VizDoomVPTEnv

FORMAT = 1
FOLDER = Path(__file__).parent / "goal_manifests"
PARTS = ("format", "name", "version", "sha256", "task", "drawn", "episodes")
TASK = ("resolution", "fps", "tubelet_size", "tolerance_degrees", "tolerance_units", "hold", "max_steps", "keys")
_TOO_MANY = 20  # seeds tried for a goal that counts
_POSE_DIGITS = 4
_WALK = ACTION_COLUMNS.index("key.w")

# How the goals of each name are drawn: `GoalViewWrapper`'s goals of consecutive seeds, less what is left out; what
# counts as reached; how far away they are at the start (degrees; map units at least, for those that need walking).
_VIEW = {"resolution": "256x144", "fps": 5, "tubelet_size": 2, "tolerance_degrees": 5.0, "tolerance_units": None}
_VIEW |= {"hold": 2, "keys": [], "largest_turn": 45.0}
RECIPES: dict[str, dict[str, Any]] = {
    "view-easy-v1": {
        "first_seed": 0,
        "goals": {"steps": [1, 3], "turn": [10.0, 30.0], "walk": 0.0, "settle": 0},
        "degrees": [5.0, 90.0],
        "least_units": 0.0,
        "task": _VIEW | {"max_steps": 8},
    },
    "view-hard-v1": {
        "first_seed": 200_000,
        "goals": {"steps": [3, 4], "turn": [20.0, 30.0], "walk": 0.0, "settle": 0},
        "degrees": [60.0, 120.0],
        "least_units": 0.0,
        "task": _VIEW | {"max_steps": 12},
    },
    "walk-v1": {
        "first_seed": 300_000,
        "goals": {"steps": [2, 4], "turn": [10.0, 20.0], "walk": 1.0, "settle": 1},
        "degrees": [5.0, 90.0],
        "least_units": 128.0,
        "task": _VIEW | {"max_steps": 12, "tolerance_units": 64.0, "keys": ["key.w"]},
    },
}


def content_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of all but `sha256`, as JSON with sorted keys and no spaces."""
    rest = {k: v for k, v in content.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """Goals that are always the same.

    Args:
        name: ends with `-v` and the version.
        version: of the goals; other goals are another version.
        sha256: `content_digest` of the file's content.
        task: what an agent is asked: `resolution`, `fps` and `tubelet_size` (the steps), `tolerance_degrees`,
            `tolerance_units` (None: any place), `hold`, `max_steps`, `keys` (that the oracle, planner and random agent
            may press), `largest_turn` (degrees a step of planner and random agent).
        drawn: how: `goals` (options of `GoalViewWrapper`), `degrees` and `least_units` (of the distance at the start),
            `first_seed`, `left_out` (seeds by reason), `environment` (versions).
        episodes: of each `seed`, `engine_seed`, `heading`, `start` and `goal` (x, y, z in map units, yaw, pitch in
            degrees), `oracle` (moves: degrees to the right, then keys), `degrees`, `units`, `goal_sha256` (of the
            goal's pixels).
    """

    name: str
    version: int
    sha256: str
    task: dict[str, Any]
    drawn: dict[str, Any]
    episodes: list[dict[str, Any]]

    @property
    def identity(self) -> dict[str, Any]:
        """What every result carries."""
        return {"manifest": self.name, "manifest_version": self.version, "manifest_sha256": self.sha256}

    @property
    def seeds(self) -> list[int]:
        return [episode["seed"] for episode in self.episodes]

    def check_settings(self, settings: Mapping[str, Any], where: str = "settings") -> None:
        """Raise a ValueError where settings of the task (None: not given) are others than the manifest's."""
        own = {**self.task, "seed": self.seeds[0], "episodes": len(self.episodes)}
        differing = [
            f"{k} {v} (the manifest's is {own[k]})" for k, v in settings.items() if v is not None and own[k] != v
        ]
        if differing:
            raise ValueError(f"{where} contradict the manifest {self.name}: {', '.join(differing)}")

    def make_environment(self) -> GoalViewWrapper:
        """The game with this task: goals are given by `begin`."""
        task = self.task
        steps = ModelStepWrapper(
            VizDoomVPTEnv(resolution=task["resolution"]), fps=task["fps"], tubelet_size=task["tubelet_size"]
        )
        goals: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.drawn["goals"].items()}
        names = ("tolerance_degrees", "tolerance_units", "hold", "max_steps")
        return GoalViewWrapper(steps, **goals, **{name: task[name] for name in names})

    def begin(self, env: GoalViewWrapper, seed: int) -> tuple[dict, dict]:
        """Begin the episode of a seed: what `env.reset` returns.

        Raises:
            ValueError: no such episode; the game's start, goal or picture is another than the manifest's.
        """
        episode = next((e for e in self.episodes if e["seed"] == seed), None)
        if episode is None:
            raise ValueError(f"{self.name} has no episode of seed {seed}: it has {self.seeds[0]} to {self.seeds[-1]}")
        start = {name: episode[name] for name in ("engine_seed", "heading")}
        begun = env.env.reset(seed=seed, options={**start, "rehearsal": True})
        goal = rehearse(env.env, *begun, [(move[0], move[1:]) for move in episode["oracle"]])
        found = {} if goal is None else describe(goal)
        names = ("start", "goal", "goal_sha256")
        differing = [f"{n}: found {found.get(n)}, expected {episode[n]}" for n in names if found.get(n) != episode[n]]
        if not differing:
            seen, info = env.reset(seed=seed, options={"goal": goal})
            pose = _pose(info["position"], seen["state"])
            if pose == episode["start"]:
                return seen, info
            differing = [f"start: found {pose}, expected {episode['start']}"]
        made_with = self.drawn["environment"]
        raise ValueError(
            f"{self.name}, seed {seed}: the game is not the manifest's ({'; '.join(differing)}); it was made with "
            f"{made_with}, this is {environment_versions()}"
        )


def _pose(position: np.ndarray, state: np.ndarray) -> list[float]:
    return [round(float(value), _POSE_DIGITS) + 0.0 for value in (*position, *state)]


def describe(goal: GoalEpisode) -> dict[str, Any]:
    """An episode of a manifest, but for its seed."""
    moves = [[round(float(a[2]), 2), *(["key.w"] if a[_WALK] else [])] for a in goal.actions]
    return {
        "engine_seed": goal.engine_seed,
        "heading": goal.heading,
        "start": _pose(goal.start_position, goal.start_state),
        "goal": _pose(goal.position, goal.state),
        "oracle": moves,
        "degrees": round(view_distance(goal.start_state, goal.state), 2),
        "units": round(float(np.linalg.norm((goal.position - goal.start_position)[:2])), 2),
        "goal_sha256": hashlib.sha256(np.ascontiguousarray(goal.frame).tobytes()).hexdigest()[:16],
    }


def environment_versions() -> dict[str, str]:
    """Versions of the engine, and the first digits of the SHA-256 of its game data."""
    import vizdoom

    files = (Path(vizdoom.__file__).parent / "freedoom2.wad", Path(vizdoom.scenarios_path) / "deathmatch.wad")
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}
    return {"vizdoom": version("vizdoom"), **digests}


def load_manifest(name: str | Path) -> Manifest:
    """A manifest of the package by its name, or another by its path.

    Raises:
        ValueError: no such name or file, no manifest, another format, a content that its hash does not fit.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.json"))
    path = FOLDER / f"{name}.json" if name in known else Path(name)
    if not path.is_file():
        raise ValueError(f"no manifest {str(name)!r}: neither one of {known} nor a file")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: a manifest of format {found!r}, this version reads format {FORMAT}")
    missing = sorted(set(PARTS) - set(content)) or sorted(set(TASK) - set(content["task"]))
    if missing or not content["episodes"]:
        raise ValueError(f"{path}: the manifest lacks {missing or 'episodes'}")
    digest = content_digest(content)
    if digest != content["sha256"]:
        raise ValueError(f"{path}: sha256 is {content['sha256']}, that of its content is {digest}")
    if not str(content["name"]).endswith(f"-v{content['version']}"):
        raise ValueError(f"{path}: name {content['name']!r} is not of version {content['version']}")
    return Manifest(**{k: content[k] for k in PARTS if k != "format"})


def draw_manifest(name: str, *, episodes: int = 100, first_seed: int | None = None) -> dict[str, Any]:
    """The content of a manifest of one of `RECIPES`, played and found right.

    Left out are goals at another distance than the recipe's, goals that whoever stands still meets, and goals that the
    oracle does not meet. With other seeds or another number the name says so.

    Raises:
        ValueError: another name.
        RuntimeError: too few seeds have a goal that counts.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}, known are {sorted(RECIPES)}")
    recipe = RECIPES[name]
    first = recipe["first_seed"] if first_seed is None else first_seed
    if (first, episodes) != (recipe["first_seed"], 100):
        stem, version_ = name.rsplit("-v", 1)
        name = f"{stem}-{first}-{episodes}-v{version_}"
    drawn: dict[str, Any] = {"first_seed": first, **{k: recipe[k] for k in ("goals", "degrees", "least_units")}}
    drawn |= {"left_out": {"distance": 0, "standing_still": 0, "oracle": 0}, "environment": environment_versions()}
    manifest = Manifest(name, int(name.rsplit("-v", 1)[1]), "", recipe["task"], drawn, [])
    env = manifest.make_environment()
    for seed in itertools.count(first):
        if len(manifest.episodes) == episodes:
            break
        if seed - first > _TOO_MANY * episodes:
            raise RuntimeError(f"{seed - first} seeds had {len(manifest.episodes)} goals, {episodes} are wanted")
        env.reset(seed=seed)
        assert env.goal is not None
        episode = {"seed": seed, **describe(env.goal)}
        reason = _left_out(env, seed, episode, recipe)
        if reason:
            drawn["left_out"][reason] += 1
        else:
            manifest.episodes.append(episode)
    env.close()
    content = {"format": FORMAT, **{k: getattr(manifest, k) for k in PARTS if k != "format"}}
    content = json.loads(json.dumps(content))  # as it will be read
    return {**content, "sha256": content_digest(content)}


def _left_out(env: GoalViewWrapper, seed: int, episode: dict[str, Any], recipe: Mapping[str, Any]) -> str:
    """Why the goal of an episode does not count; "" where it does."""
    least, most = recipe["degrees"]
    if not least < episode["degrees"] <= most or episode["units"] < recipe["least_units"]:
        return "distance"
    goal = env.goal
    assert goal is not None
    near, _ = _play(env, seed, goal, [])
    if near:
        return "standing_still"
    return "" if _play(env, seed, goal, list(goal.actions))[1] else "oracle"


def _play(env: GoalViewWrapper, seed: int, goal: GoalEpisode, actions: Sequence[np.ndarray]) -> tuple[bool, bool]:
    """Whether these actions, then standing still, are ever near the goal, and whether they reach it."""
    _, info = env.reset(seed=seed, options={"goal": goal})
    near, units = False, env.tolerance_units or math.inf
    for action in itertools.chain(actions, itertools.repeat(raw_action())):
        near |= info["goal_degrees"] <= env.tolerance_degrees and info["goal_units"] <= units
        _, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            return near or info["success"], info["success"]
    raise AssertionError("an episode ends after max_steps")


def manifest_text(content: Mapping[str, Any]) -> str:
    """A manifest as its file has it: an episode a line."""
    head = {k: v for k, v in content.items() if k != "episodes"}
    lines = ",\n".join(f"    {json.dumps(episode)}" for episode in content["episodes"])
    return json.dumps(head, indent=2)[:-2] + f',\n  "episodes": [\n{lines}\n  ]\n}}\n'
