"""Episodes on disk, and what they amount to: lines that survive a kill, success rates, a summary by agent.

An episode is a JSON object with `agent`, `success`, `steps`, `start_degrees`, `final_degrees`, `return` and `ended`;
where it is of a manifest (manifests.py), `manifest` too.
"""

import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.figures import wilson
from ..records import write_file

logger = logging.getLogger(__name__)

ENDED_EARLY = ("death", "teleport")


def agent_generator(seed: int, agent: str) -> np.random.Generator:
    """Random numbers of an agent's own: those of the environment with this seed, which draws the goal, are others.

    Args:
        seed: of the episode.
        agent: a name: each has its own stream.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=tuple(agent.encode())))


class ResultLines:
    """A file of results, a JSON object a line, to which a second run adds what is missing.

    A last line that is not complete (the run was killed) is taken off the file, and so are lines that do not count.

    Args:
        path: need not be there.
        key: fields that say which result a line is.
        counts: of a line, whether it counts; None: all do.

    Attributes:
        lines: those that count.
    """

    def __init__(self, path: Path, key: Sequence[str] = (), counts: Callable[[dict], bool] | None = None):
        self.path, self.key = path, key
        whole = path.read_text().splitlines(keepends=True) if path.is_file() else []
        lines = [json.loads(line) for line in whole if line.endswith("\n")]
        self.lines = [line for line in lines if counts is None or counts(line)]
        if len(self.lines) < len(whole):
            dropped = len(whole) - len(self.lines)
            logger.warning("%s: %d lines of what was not saved are dropped, and played again", path, dropped)
            write_file(path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self._known = {self._key_of(line) for line in self.lines}

    def __enter__(self) -> "ResultLines":
        self._file = open(self.path, "a")
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __contains__(self, result: tuple) -> bool:
        return result in self._known

    def _key_of(self, line: dict) -> tuple:
        return tuple(line[name] for name in self.key)

    def add(self, line: dict, *, sync: bool = True) -> None:
        """Write a line, through to the disk unless `sync` is False: then `sync()` does it for all."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if sync:
            self.sync()
        self.lines.append(line)
        self._known.add(self._key_of(line))

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def select(self, results: Collection[tuple]) -> list[dict]:
        """The lines whose key is among these."""
        wanted = set(results)
        return [line for line in self.lines if self._key_of(line) in wanted]


def success_rate(episodes: Sequence[dict]) -> dict[str, Any]:
    """`episodes`, `success_rate` and `success_rate_ci95`, Wilson's interval; None of what has no episode."""
    if not episodes:
        return {"episodes": 0, "success_rate": None, "success_rate_ci95": None}
    successes, count = sum(e["success"] for e in episodes), len(episodes)
    return {"episodes": count, "success_rate": successes / count, "success_rate_ci95": wilson(successes, count)}


def summarize(episodes: Iterable[dict], agents: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Figures of every agent that has episodes, in the order of `agents`.

    `success_rate`'s; means of `steps`, `start_degrees`, `final_degrees` (and its median) and `return`; `ended_early`,
    how many episodes a death or a teleport ended; where episodes have `seconds` (of every action), their `actions`,
    `seconds_per_action_median`, `seconds_per_action_mean` and `successes_per_second`.

    Raises:
        ValueError: episodes of two manifests.
    """
    episodes = list(episodes)
    manifests = sorted({str(e.get("manifest")) for e in episodes})
    if len(manifests) > 1:
        raise ValueError(
            f"episodes of two manifests do not belong into one table: found {manifests[0]}, {manifests[1]}"
        )
    found = {}
    for agent in agents:
        own = [e for e in episodes if e["agent"] == agent]
        if own:
            means = {
                name: float(np.mean([e[name] for e in own]))
                for name in ("steps", "start_degrees", "final_degrees", "return")
            }
            found[agent] = {
                **success_rate(own),
                **means,
                "final_degrees_median": float(np.median([e["final_degrees"] for e in own])),
                "ended_early": sum(e["ended"] in ENDED_EARLY for e in own),
                **_times(own),
            }
    return found


def _times(episodes: Sequence[dict]) -> dict[str, Any]:
    seconds = [second for e in episodes for second in e.get("seconds", ())]
    if not seconds:
        return {}
    return {
        "actions": len(seconds),
        "seconds_per_action_median": float(np.median(seconds)),
        "seconds_per_action_mean": float(np.mean(seconds)),
        "successes_per_second": sum(e["success"] for e in episodes) / max(sum(seconds), 1e-9),
    }


def table(agents: Mapping[str, Mapping[str, Any]]) -> str:
    """A line an agent of what `summarize` gave."""
    rows = []
    for agent, figures in agents.items():
        low, high = figures["success_rate_ci95"]
        seconds = figures.get("seconds_per_action_median")
        time = "" if seconds is None else f", {seconds:.4f} s an action"
        rows.append(
            f"{agent:8} {100 * figures['success_rate']:5.1f} % ({100 * low:.1f} to {100 * high:.1f}) of "
            f"{figures['episodes']}, {figures['start_degrees']:.1f} -> {figures['final_degrees']:.1f} degrees{time}"
        )
    return "\n".join(rows)
