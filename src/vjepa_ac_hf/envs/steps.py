"""Environments where one step is one step of the model (docs/environments.md, "Model steps").

Letters: F frames of a tubelet, Y, X pixels.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from ..actions_vjepa2_ac import ACTION_COLUMNS, DEGREES_PER_PIXEL
from ..evaluation.clips import check_model_and_processor
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from ..recordings.clips import ClipSpec, aggregate_actions
from ..recordings.log import parse_recording
from .vizdoom_env import FPS, MOST_COUNTS, PRESSED_COLUMNS, VizDoomVPTEnv

_PRESSED = slice(ACTION_COLUMNS.index(PRESSED_COLUMNS[0]), ACTION_COLUMNS.index(PRESSED_COLUMNS[-1]) + 1)
_NUMBER_KEYS = [index for index, column in enumerate(PRESSED_COLUMNS) if column[4:].isdigit()]
_GUI = ACTION_COLUMNS.index("gui_open")


def raw_action(*, turn: float = 0.0, look: float = 0.0, pressed: Sequence[str] = (), slot: int = 0) -> np.ndarray:
    """The 38 columns of a model step, raw: a view change in degrees (to a whole mouse count), and what is pressed.

    Args:
        turn: degrees to the right.
        look: degrees down.
        pressed: columns such as `key.w`.
        slot: hotbar slot 0..8 at the start of the step.

    Raises:
        ValueError: a column that is no key or button.
    """
    action = np.zeros(len(ACTION_COLUMNS), dtype=np.float32)
    counts = np.round(np.array([turn, look]) / DEGREES_PER_PIXEL)
    action[:2], action[2:4] = counts, counts * DEGREES_PER_PIXEL
    for column in pressed:
        if column not in PRESSED_COLUMNS:
            raise ValueError(f"pressed must be among {PRESSED_COLUMNS}, found {column!r}")
        action[ACTION_COLUMNS.index(column)] = 1
    action[ACTION_COLUMNS.index("hotbar.0") + slot] = 1
    return action


def step_options(model: VJEPA2ACModel, processor: VJEPA2ACProcessor) -> dict[str, Any]:
    """`fps` and `tubelet_size` of `ModelStepWrapper`, with which a step lasts as long as the model's.

    Raises:
        ValueError: model and processor differ, or have learnt from recordings with other ticks than the game.
    """
    check_model_and_processor(model, processor)
    if processor.native_fps != FPS:
        raise ValueError(
            f"the game has {FPS} ticks a second, the recordings that the model was trained on have "
            f"{processor.native_fps:g} (the processor's native_fps)"
        )
    options = {"fps": processor.fps, "tubelet_size": processor.tubelet_size}
    ClipSpec(native_fps=FPS, frames_per_clip=processor.frames_per_clip, **options)
    return options


def raw_action_space(ticks_per_step: int) -> spaces.Box:
    """Raw actions `(38,)` of a step of so many ticks."""
    high = np.ones(len(ACTION_COLUMNS), dtype=np.float32)
    high[:4] = [MOST_COUNTS * ticks_per_step] * 2 + [180, 180]
    low = np.where(np.arange(len(high)) < 4, -high, 0).astype(np.float32)
    return spaces.Box(low, high, dtype=np.float32)


class ModelStepWrapper(gymnasium.Wrapper, RecordConstructorArgs):
    """One step is one step of the model: `tubelet_size * 20 / fps` ticks (8), as clips divide a recording.

    Actions: float32 `(38,)`, raw, columns `ACTION_COLUMNS`. What a player decides is taken from them: mouse movement,
    rounded to whole counts and spread evenly over the ticks, and keys and buttons, which count as pressed from 0.5 on
    and are held for all ticks (number keys: for the first). View changes, hotbar slot and GUI are what follows: they
    are not inputs, and `info["action"]` has what they really were.

    Observations, at the beginning of the next step k+1:
        `tubelet`: uint8 `(F, Y, X, 3)`, frames of step k, 20 / fps ticks apart, as a clip has them. After `reset`, and
            for what an episode that ended early lacks: the latest frame, repeated.
        `frame`: uint8 `(Y, X, 3)`, the frame now, the first of step k+1.
        `state`: float32 `(2,)`, yaw and pitch now, in degrees.

    `info` has, beside the last tick's: `action`, float32 `(38,)`, what was really done, exactly as the builder would
    read it from a recording; `ticks`, how many were done: fewer than `ticks_per_step` where the episode ended before;
    `blocked`, whether any tick was. Rewards of the ticks are summed.

    Args:
        env: a `VizDoomVPTEnv`, or `RecordVPT` of one.
        fps: frames a second of a clip; 20 must be a multiple.
        tubelet_size: frames of a step.

    Raises:
        ValueError: another environment, frame rates that do not fit.
    """

    def __init__(self, env: gymnasium.Env, fps: float = 5, tubelet_size: int = 2):
        if not isinstance(env.unwrapped, VizDoomVPTEnv):
            raise ValueError(f"ModelStepWrapper is for VizDoomVPTEnv, found {env}")
        RecordConstructorArgs.__init__(self, fps=fps, tubelet_size=tubelet_size)
        gymnasium.Wrapper.__init__(self, env)
        self._frame: np.ndarray | None = None
        self.game: VizDoomVPTEnv = env.unwrapped
        self._lines: list[dict[str, Any]] = []
        spec = ClipSpec(native_fps=FPS, fps=fps, frames_per_clip=2 * tubelet_size, tubelet_size=tubelet_size)
        self.stride, self.ticks_per_step, self.tubelet_size = spec.stride, spec.ticks_per_tubelet, tubelet_size
        tubelet = spaces.Box(0, 255, (tubelet_size, *self.game.frame_shape), np.uint8)
        self.views = {"tubelet": tubelet, **self.game.observation_space.spaces}
        self.observation_space = spaces.Dict(self.views)
        self.action_space = raw_action_space(self.ticks_per_step)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        seen, info = self.env.reset(seed=seed, options=options)
        self._frame, self._lines = seen["frame"].copy(), []  # what users do to theirs must not change ours
        tubelet = np.stack([self._frame] * self.tubelet_size)
        info = {**info, "action": np.zeros(len(ACTION_COLUMNS), np.float32), "ticks": 0}
        return {"tubelet": tubelet, **seen}, info

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        """One step of the model.

        Raises:
            ValueError: another shape, values that are not finite or too large.
            RuntimeError: the episode has ended, or none was begun.
        """
        if self._frame is None:
            raise RuntimeError("no episode was begun: call reset()")
        # The tick before goes first: attack newly pressed in a log's first line is read as the stuck-attack fault.
        lines, frames = self._lines[-1:], []
        reward, blocked = 0.0, False
        known = len(lines)
        for tick, tick_action in enumerate(self._divide(action)):
            if tick % self.stride == 0:
                frames.append(self._frame)
            seen, more, terminated, truncated, info = self.env.step(tick_action)
            lines.append(self.game.line)
            reward, blocked, self._frame = reward + float(more), blocked or info["blocked"], seen["frame"]
            if terminated or truncated:
                break
        self._lines, self._frame = lines, self._frame.copy()
        frames += [self._frame] * (self.tubelet_size - len(frames))
        done = _read_action([*lines, self.game.idle_line()], first=known)
        info = {**info, "action": done, "ticks": len(lines) - known, "blocked": blocked}
        return {"tubelet": np.stack(frames), **seen}, reward, terminated, truncated, info

    def _divide(self, action: Any) -> list[dict[str, np.ndarray]]:
        values = np.asarray(action, dtype=np.float64)
        if values.shape != (len(ACTION_COLUMNS),) or not np.isfinite(values).all():
            raise ValueError(
                f"an action must be raw, {len(ACTION_COLUMNS)} finite numbers, found shape {values.shape}: {values}"
            )
        counts = np.round(values[:2])
        if np.abs(counts).max() > MOST_COUNTS * self.ticks_per_step:
            raise ValueError(
                f"mouse_dx and mouse_dy must be within +-{MOST_COUNTS * self.ticks_per_step} a step, found {counts}"
            )
        ends = np.round(counts * np.arange(self.ticks_per_step + 1)[:, None] / self.ticks_per_step)
        held = values[_PRESSED] >= 0.5
        later = held.copy()
        later[_NUMBER_KEYS] = False
        return [
            {"mouse": mouse.astype(np.int32), "pressed": (later if tick else held).astype(np.int8)}
            for tick, mouse in enumerate(np.diff(ends, axis=0))
        ]


def _read_action(lines: list[dict], first: int) -> np.ndarray:
    """The builder's action from line `first` to the last one, float32 `(38,)`."""
    ticks = len(lines) - 1 - first
    recording = parse_recording("\n".join(map(json.dumps, lines)).encode(), "loop")
    # A clip of two frames, `ticks` apart, each a tubelet.
    spec = ClipSpec(native_fps=FPS, fps=FPS / ticks, frames_per_clip=2, tubelet_size=1)
    return aggregate_actions(recording, np.array([first]), spec)[0, 0]


class DiscreteActions(gymnasium.ActionWrapper, RecordConstructorArgs):
    """A numbered choice of whole actions, for agents that choose among few.

    Args:
        env: an environment of model steps.
        actions: `(38,)` raw actions by name, see `raw_action`. None: turns by 20 and 5 degrees to both sides, ahead.

    Raises:
        ValueError: an action that the environment does not take.
    """

    def __init__(self, env: gymnasium.Env, actions: Mapping[str, np.ndarray] | None = None):
        RecordConstructorArgs.__init__(self, actions=actions)
        gymnasium.ActionWrapper.__init__(self, env)
        if actions is None:
            turns = {f"turn {degrees}": raw_action(turn=degrees) for degrees in (-20, -5, 5, 20)}
            actions = {**turns, "ahead": raw_action(pressed=["key.w"])}
        wrong = [name for name, action in actions.items() if action not in env.action_space]
        if wrong or not actions:
            raise ValueError(f"actions must be in {env.action_space}, found others: {wrong or 'no actions at all'}")
        self.names, self._table = list(actions), np.stack(list(actions.values()))
        self.action_space = spaces.Discrete(len(self.names))

    def action(self, action: Any) -> np.ndarray:
        return self._table[int(action)]
