"""Agents for goals: who stands still, turns at random, knows the way, or is given from outside (docs/environments.md).

An agent is a function that is called at the beginning of an episode and returns another, which acts:
`agent(seed) -> act(seen, info) -> action (38,)`.
"""

import importlib
import importlib.util
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .episodes import agent_generator
from .goals import GoalViewWrapper
from .steps import raw_action

Act = Callable[[dict, dict], Any]
Agent = Callable[[int], Act]
# What only who judges an agent may know.
JUDGES = ("success", "goal_degrees", "goal_units", "position")


def still(seed: int) -> Act:
    """Does nothing."""
    return lambda seen, info: raw_action()


def make_random(largest_turn: float, keys: Sequence[str] = ()) -> Agent:
    """Turns by up to so many degrees a step, and presses each key with probability 1/2."""

    def random(seed: int) -> Act:
        generator = agent_generator(seed, "random")

        def act(seen: dict, info: dict) -> np.ndarray:
            turn = generator.uniform(-largest_turn, largest_turn)
            return raw_action(turn=turn, pressed=[key for key in keys if generator.random() < 0.5])

        return act

    return random


def make_oracle(env: GoalViewWrapper) -> Agent:
    """Does what led to the goal, then stands."""

    def oracle(seed: int) -> Act:
        assert env.goal is not None
        moves = iter(env.goal.actions)
        return lambda seen, info: next(moves, raw_action())

    return oracle


def load_policy(name: str) -> tuple[Agent, str]:
    """An agent from outside, "module:function" or "FILE.py:function", and the CRC-32 of the file that has it.

    Raises:
        ValueError: another form, no such file, module or function.
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise ValueError(f"a policy is 'module:function' or 'FILE.py:function', found {name!r}")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if not Path(place).is_file() or spec is None or spec.loader is None:
            raise ValueError(f"policy {name!r}: there is no file {place}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        if "" not in sys.path:
            sys.path.append("")  # the folder that one is in
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name and not place.startswith(error.name):
                raise  # the module is there, and lacks another
            raise ValueError(f"policy {name!r}: there is no module {place}") from error
    agent = getattr(module, function, None)
    if not callable(agent):
        raise ValueError(f"policy {name!r}: {place} has no function {function!r}, found {agent!r}")
    assert module.__file__ is not None
    return agent, f"{zlib.crc32(Path(module.__file__).read_bytes()):08x}"


def play(env: GoalViewWrapper, name: str, agent: Agent, seed: int, begun: tuple[dict, dict]) -> dict[str, Any]:
    """One episode, as a line of the results.

    Args:
        env: just reset.
        name: of the agent, for the line.
        agent: sees observations and `info` without what `JUDGES` names.
        seed: of the episode.
        begun: what `env.reset` returned.

    Returns:
        What `episodes.summarize` reads, and `agent`, `seed`, `oracle_steps`, `seconds` (of every action).
    """
    seen, info = begun
    assert env.goal is not None
    start, total, seconds = info["goal_degrees"], 0.0, []
    act = agent(seed)
    for step in range(env.max_steps):  # noqa: B007
        known = {k: v for k, v in info.items() if k not in JUDGES}
        before = time.perf_counter()
        action = np.asarray(act(seen, known))
        seconds.append(round(time.perf_counter() - before, 5))
        seen, reward, terminated, truncated, info = env.step(action)
        total += reward
        if terminated or truncated:
            break
    return {
        "agent": name,
        "seed": seed,
        "success": info["success"],
        "steps": step + 1,
        "oracle_steps": len(env.goal.actions),
        "start_degrees": round(start, 4),
        "final_degrees": round(info["goal_degrees"], 4),
        "final_units": round(info["goal_units"], 2),
        "return": round(total, 4),
        "ended": info["ended"],
        "seconds": seconds,
    }
