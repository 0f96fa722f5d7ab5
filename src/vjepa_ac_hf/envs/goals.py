"""Goals that are views: turn, and walk, until the picture is the goal's (docs/environments.md, "Goals")."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from ..actions_vjepa2_ac import wrap_degrees
from .steps import ModelStepWrapper, raw_action

_ATTEMPTS = 50


@dataclass(frozen=True)
class GoalEpisode:
    """A start and a view that can be reached from there.

    Attributes:
        engine_seed: of the start, with `heading`: options of `VizDoomVPTEnv.reset`.
        heading: degrees.
        actions: float32 `(K, 38)`, raw, that lead there: the oracle's.
        frame: uint8 `(Y, X, 3)`, what is seen there.
        state: float32 `(2,)`, yaw and pitch there, degrees.
        position: float64 `(3,)`, map units.
        start_state: float32 `(2,)`, at the start.
        start_position: float64 `(3,)`.
    """

    engine_seed: int
    heading: float
    actions: np.ndarray
    frame: np.ndarray
    state: np.ndarray
    position: np.ndarray
    start_state: np.ndarray
    start_position: np.ndarray


def view_distance(state: np.ndarray, goal: np.ndarray) -> float:
    """Degrees between two views (yaw, pitch): the root of the squared differences, yaw circular."""
    return math.hypot(wrap_degrees(float(state[0]) - float(goal[0])), float(state[1]) - float(goal[1]))


def rehearse(
    env: gymnasium.Env, seen: dict, begun: dict, moves: Iterable[tuple[float, Sequence[str]]]
) -> GoalEpisode | None:
    """The goal that an oracle's moves lead to; None where they end the episode.

    Args:
        env: model steps, after `reset`.
        seen: what that returned, and
        begun: its `info`.
        moves: degrees to the right and pressed keys of every step, each asked for when the one before is done.
    """
    actions = []
    start_state, start_position = seen["state"], begun["position"]
    for turn, keys in moves:
        actions.append(raw_action(turn=turn, pressed=keys, slot=max(begun["hotbar"], 0)))
        seen, _, terminated, truncated, info = env.step(actions[-1])
        if terminated or truncated:
            return None
    return GoalEpisode(
        engine_seed=begun["engine_seed"],
        heading=begun["heading"],
        actions=np.stack(actions),
        frame=seen["frame"],
        state=seen["state"],
        position=info["position"],
        start_state=start_state,
        start_position=start_position,
    )


class GoalViewWrapper(gymnasium.Wrapper, RecordConstructorArgs):
    """Episodes with a goal: a frame that an oracle has seen some steps from the start.

    `reset` draws start and actions, plays them, keeps the last frame as goal, and begins again at the same start:
    playing `goal.actions` reaches it exactly. Observations are `ModelStepWrapper`'s and `goal`, uint8 `(Y, X, 3)`. With
    `hold` steps in a row that end within both tolerances the goal is reached: a success, which terminates the episode.
    The reward is the decrease of the distance: degrees over `tolerance_degrees`, and map units over `tolerance_units`
    where that is given; and `success_reward` for a success.

    `info` has, beside `ModelStepWrapper`'s: `success`, `goal_degrees` (`view_distance`), `goal_units` (on the map).

    Args:
        env: a `ModelStepWrapper`.
        steps: least and most steps of the oracle.
        turn: least and most degrees that it turns in a step, all steps of an episode to the same side.
        walk: probability that it walks ahead during a step.
        settle: steps at the end in which it stands: who walks comes to rest.
        tolerance_degrees: a view as close as this is a success.
        tolerance_units: and a place as close as this, in map units (32 to a metre); None: any place.
        hold: steps in a row that must end so close: 1, passing by is enough; 2, one must stay.
        success_reward: for a success, beside the decrease of the distance.
        max_steps: then the episode is truncated.

    Attributes:
        goal: the `GoalEpisode`; None before the first `reset`.

    Raises:
        ValueError: another environment, values that contradict each other.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        *,
        steps: tuple[int, int] = (1, 3),
        turn: tuple[float, float] = (10.0, 30.0),
        walk: float = 0.0,
        settle: int = 0,
        tolerance_degrees: float = 5.0,
        tolerance_units: float | None = None,
        hold: int = 1,
        success_reward: float = 0.0,
        max_steps: int = 10,
    ):
        steps_wrapper: Any = env
        while isinstance(steps_wrapper, gymnasium.Wrapper) and not isinstance(steps_wrapper, ModelStepWrapper):
            steps_wrapper = steps_wrapper.env  # Gymnasium's own checks go between
        if not isinstance(steps_wrapper, ModelStepWrapper) or env.observation_space != steps_wrapper.observation_space:
            raise ValueError(f"GoalViewWrapper goes around a ModelStepWrapper, found {env}")
        RecordConstructorArgs.__init__(
            self,
            steps=steps,
            turn=turn,
            walk=walk,
            settle=settle,
            tolerance_degrees=tolerance_degrees,
            tolerance_units=tolerance_units,
            hold=hold,
            success_reward=success_reward,
            max_steps=max_steps,
        )
        gymnasium.Wrapper.__init__(self, env)
        if settle < 0 or not 1 <= steps[0] <= steps[1] <= max_steps - settle:
            raise ValueError(
                f"steps must be 1 <= least <= most <= max_steps {max_steps} less settle, at least 0, found {steps} and "
                f"settle {settle}"
            )
        most = max_steps - settle - steps[1] + 1
        if not 1 <= hold <= most:
            raise ValueError(
                f"hold must be {f'1 to {most}' if most > 1 else '1'}: of max_steps {max_steps} no more are left once a "
                f"goal {steps[1] + settle} steps away is reached; found {hold}"
            )
        if not 0 < turn[0] <= turn[1] < 180 or not 0 <= walk <= 1:
            raise ValueError(f"turn must be 0 < least <= most < 180 and walk in [0, 1], found {turn} and {walk}")
        if not 0 < tolerance_degrees < turn[0]:
            raise ValueError(
                f"tolerance_degrees must be above 0 and below the least turn {turn[0]}, found {tolerance_degrees}"
            )
        if tolerance_units is not None and not tolerance_units > 0:
            raise ValueError(f"tolerance_units must be above 0, found {tolerance_units}")
        if not 0 <= success_reward < math.inf:
            raise ValueError(f"success_reward must be a finite number, at least 0, found {success_reward}")
        self.success_reward = success_reward
        self.steps, self.turn, self.walk, self.settle, self.max_steps = steps, turn, walk, settle, max_steps
        self.tolerance_degrees, self.tolerance_units, self.hold = tolerance_degrees, tolerance_units, hold
        self.goal: GoalEpisode | None = None
        goal = spaces.Box(0, 255, steps_wrapper.game.frame_shape, np.uint8)
        self.observation_space = spaces.Dict({**steps_wrapper.views, "goal": goal})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """A new goal.

        Args:
            seed: of start and oracle.
            options: `{"goal": GoalEpisode}` begins that one again.

        Raises:
            ValueError: another option.
            RuntimeError: no start is found where the oracle's episode does not end early.
        """
        options = dict(options or {})
        unknown = sorted(set(options) - {"goal"})
        if unknown or not isinstance(options.get("goal"), (GoalEpisode, type(None))):
            raise ValueError(f"reset takes the option 'goal', a GoalEpisode, found {options}")
        self.goal = options.get("goal") or self._draw(seed)
        start = {"engine_seed": self.goal.engine_seed, "heading": self.goal.heading}
        seen, info = self.env.reset(seed=seed if "goal" in options else None, options=start)
        self._done, self._held, self._potential = 0, 0, self._distance(seen, info)[2]
        return self._observe(seen), {**info, **self._progress(seen, info)}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        if self.goal is None:
            raise RuntimeError("no episode was begun: call reset()")
        seen, _, terminated, truncated, info = self.env.step(action)
        self._done += 1
        before, self._potential = self._potential, self._distance(seen, info)[2]
        progress = self._progress(seen, info)
        self._held = self._held + 1 if progress["success"] else 0
        # Beyond a teleport no view counts.
        progress["success"] = self._held >= self.hold and not terminated
        truncated = truncated or (self._done >= self.max_steps and not (terminated or progress["success"]))
        reward = float(before - self._potential) if not terminated else 0.0
        reward += self.success_reward * progress["success"]
        return self._observe(seen), reward, terminated or progress["success"], truncated, {**info, **progress}

    def _observe(self, seen: dict) -> dict:
        assert self.goal is not None
        return {**seen, "goal": self.goal.frame.copy()}

    def _distance(self, seen: dict, info: dict) -> tuple[float, float, float]:
        """Degrees, map units, and both in tolerances."""
        assert self.goal is not None
        degrees = view_distance(seen["state"], self.goal.state)
        units = float(np.linalg.norm((info["position"] - self.goal.position)[:2]))
        total = degrees / self.tolerance_degrees
        return degrees, units, total + (units / self.tolerance_units if self.tolerance_units else 0.0)

    def _progress(self, seen: dict, info: dict) -> dict[str, Any]:
        degrees, units, _ = self._distance(seen, info)
        near = self.tolerance_units is None or units <= self.tolerance_units
        return {
            "success": bool(degrees <= self.tolerance_degrees and near),
            "goal_degrees": degrees,
            "goal_units": units,
        }

    def _draw(self, seed: int | None) -> GoalEpisode:
        for attempt in range(_ATTEMPTS):
            begun = self.env.reset(seed=seed if attempt == 0 else None, options={"rehearsal": True})
            goal = rehearse(self.env, *begun, self._moves(self.unwrapped.np_random))
            # All turns of nearly a whole circle would end where they began.
            if goal is not None and view_distance(goal.start_state, goal.state) > self.tolerance_degrees:
                return goal
        raise RuntimeError(f"no goal was found from {_ATTEMPTS} starts: the oracle's episodes end early")

    def _moves(self, generator: np.random.Generator) -> Iterator[tuple[float, list[str]]]:
        side = generator.choice([-1, 1])
        for _ in range(int(generator.integers(self.steps[0], self.steps[1] + 1))):
            turn = side * generator.uniform(*self.turn)
            yield turn, ["key.w"] if generator.random() < self.walk else []
        for _ in range(self.settle):
            yield 0.0, []
