"""ViZDoom with the inputs, states and frames of a VPT recording, tick by tick (docs/environments.md, "Ticks")."""

import math
import weakref
from datetime import datetime
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from ..actions_vjepa2_ac import ACTION_COLUMNS, DEGREES_PER_PIXEL, wrap_degrees
from .doom import MOVES, WEAPON_KEYS, begin_life, end_game, start_game

DEGREES_PER_COUNT = DEGREES_PER_PIXEL  # the name of before 0.2
TICS_PER_TICK = 2
FPS = 20
FIRST_START = datetime(2026, 1, 1)
# Running through a doorway makes about 25 units a tick; a respawn or teleport makes hundreds.
LARGEST_STEP = 60.0
MOST_COUNTS = 1200  # half a turn a tick
PRESSED_COLUMNS = ACTION_COLUMNS[ACTION_COLUMNS.index("key.1") : ACTION_COLUMNS.index("mouse.middle") + 1]
_BUTTONS = {column: button for button, column in enumerate(("mouse.left", "mouse.right", "mouse.middle"))}
_LOG_KEYS = [None if column in _BUTTONS else "key.keyboard." + column[len("key.") :] for column in PRESSED_COLUMNS]
_MOVE_INDICES = [PRESSED_COLUMNS.index(f"key.{key}") for key in MOVES]
_WEAPON_INDICES = [PRESSED_COLUMNS.index(f"key.{key}") for key in WEAPON_KEYS]


class VizDoomVPTEnv(gymnasium.Env):
    """Freedoom's deathmatch map, alone; a step is one of VPT's ticks (2 of Doom's 35 tics a second, logged as 20 Hz).

    Actions: `{"mouse": (dx, dy), "pressed": 24 zeros and ones}`. The mouse moves by whole counts of 0.15 degrees, right
    and down positive; `pressed` are the keys and buttons of `PRESSED_COLUMNS` (`key.1` .. `mouse.middle`). Doom knows
    w, a, s, d and the number keys 1 to 4 (weapons); the others are logged as pressed and do nothing.

    Observations: `{"frame": uint8 (Y, X, 3), "state": float32 (yaw, pitch)}`: degrees, yaw unwrapped and growing to the
    right, pitch positive looking down; exactly the log's numbers.

    The reward is always 0. An episode is terminated by a death, respawn or teleport (`info["ended"]`), truncated after
    `max_ticks`. The same seed and actions give the same frames and states, whatever was played before.

    Args:
        resolution: of the frames, one of `doom.RESOLUTIONS`, "WIDTHxHEIGHT".
        max_ticks: ticks of an episode; None: no limit.
        render_mode: None or "rgb_array", the frame now.
        weapon: draw the weapon that is held.
        places: from how many places episodes start, the same for all seeds; None: any.

    Attributes:
        line: the line of a VPT log of the tick that is done: the state before it, and its input.
        walls: `doom.Walls` of the map.
        start_time: of the episode, for the log.
        frame_shape: (Y, X, 3).

    Raises:
        ImportError: the extra "vizdoom" is not installed.
        ValueError: an unknown resolution or render mode, a limit below 1, fewer than 1 place.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(
        self,
        *,
        resolution: str = "640x360",
        max_ticks: int | None = None,
        render_mode: str | None = None,
        weapon: bool = False,
        places: int | None = None,
    ):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', found {render_mode!r}")
        if max_ticks is not None and max_ticks < 1:
            raise ValueError(f"max_ticks must be at least 1, found {max_ticks}")
        if places is not None and not 1 <= places < 2**31 - 1:
            raise ValueError(f"places must be at least 1, found {places}")
        self._engine_seeds = 2**31 if places is None else places + 1
        self.game, self.walls, folder = start_game(resolution, weapon)
        # The engine before its folder, also where nobody closes the environment: it saves its settings there.
        self._end = weakref.finalize(self, end_game, self.game, folder)
        self.render_mode, self.max_ticks = render_mode, max_ticks
        self.start_time = FIRST_START
        self.line: dict[str, Any] = {}
        self._alive = False
        self._frame: Any = None
        self._yaw = self._angle = self._pitch = 0.0
        self.frame_shape = (self.game.get_screen_height(), self.game.get_screen_width(), 3)
        self.observation_space: spaces.Dict = spaces.Dict(
            {
                "frame": spaces.Box(0, 255, self.frame_shape, np.uint8),
                "state": spaces.Box(-np.inf, np.inf, (2,), np.float32),
            }
        )
        self.action_space = spaces.Dict(
            {
                "mouse": spaces.Box(-MOST_COUNTS, MOST_COUNTS, (2,), np.int32),
                "pressed": spaces.MultiBinary(len(PRESSED_COLUMNS)),
            }
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """A new life.

        Args:
            seed: of the environment's random numbers, from which start and heading are drawn; None goes on with them.
            options: `engine_seed` (1 .. 2**31 - 1), which decides the place, and `heading` (degrees), instead of what
                would be drawn: with both (`info` has them), a life begins as an earlier one did. `rehearsal`: the
                episode is no play, and `RecordVPT` leaves it out.

        Raises:
            ValueError: an unknown option.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        unknown = sorted(set(options) - {"engine_seed", "heading", "rehearsal"})
        if unknown:
            raise ValueError(f"reset options {unknown} are unknown: known are ['engine_seed', 'heading', 'rehearsal']")
        engine_seed = (
            options["engine_seed"] if "engine_seed" in options else self.np_random.integers(1, self._engine_seeds)
        )
        heading = options["heading"] if "heading" in options else self.np_random.uniform(-180, 180)
        self._episode = {"engine_seed": int(engine_seed), "heading": float(heading)}
        begin_life(self.game, int(engine_seed), float(heading))
        self.tick, self.line, self._alive = 0, {}, True
        self._held = np.zeros(len(PRESSED_COLUMNS), dtype=bool)
        self._look(begins=True)
        return self._observation(), {**self._info(), **self._episode}

    def step(self, action: dict[str, Any]) -> tuple[dict, float, bool, bool, dict]:
        """One tick.

        Raises:
            ValueError: an action that is not in the action space.
            RuntimeError: the episode has ended, or none was begun.
        """
        mouse, pressed = self._check(action)
        self.line = self._log_line(mouse, pressed)
        turn, look = (counts * DEGREES_PER_PIXEL / TICS_PER_TICK for counts in mouse)
        buttons = [int(pressed[i]) for i in (*_MOVE_INDICES, *_WEAPON_INDICES)]
        self.game.make_action([turn, -look, *buttons], TICS_PER_TICK)
        before = self.position
        self._held = pressed
        self.tick += 1
        self._look()
        moved = math.hypot(*(self.position - before)[:2])
        ended = "death" if self._dead else "teleport" if moved > LARGEST_STEP else ""
        terminated = bool(ended)
        truncated = not terminated and self.max_ticks is not None and self.tick >= self.max_ticks
        self._alive = not (terminated or truncated)
        pushes = (buttons[0] != buttons[1]) or (buttons[2] != buttons[3])
        info = self._info(blocked=bool(pushes and moved < 1.0), ended=ended or ("ticks" if truncated else ""))
        return self._observation(), 0.0, terminated, truncated, info

    def idle_line(self) -> dict[str, Any]:
        """The line of a VPT log with the state now and no input: the last one of a recording."""
        return self._log_line((0, 0), np.zeros(len(PRESSED_COLUMNS), dtype=bool))

    @property
    def view(self) -> tuple[float, float]:
        """Yaw and pitch now, in degrees, unrounded."""
        return self._yaw, self._pitch

    def render(self) -> np.ndarray | None:
        """The frame now.

        Raises:
            RuntimeError: no episode was begun.
        """
        if self._frame is None:
            raise RuntimeError("no episode was begun: call reset()")
        return self._frame.copy() if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self._alive = False
        self._end()

    # --- the engine's numbers as VPT's ------------------------------------------------------------------------

    def _look(self, begins: bool = False) -> None:
        """Read frame and variables."""
        state = self.game.get_state()
        if state is not None:  # None: the engine has ended the episode; the last frame stays
            x, y, z, angle, pitch, weapon, dead = state.game_variables
            # The engine's angle grows to the left, modulo 360.
            self._yaw = -angle if begins else self._yaw + float(wrap_degrees(self._angle - angle))
            self._angle, self.position = angle, np.array([x, y, z])
            self._pitch = float(wrap_degrees(pitch))
            self._slot, self._dead = int(weapon) - 1, bool(dead)
            self._frame = state.screen_buffer
        else:
            self._dead = True

    def _observation(self) -> dict[str, np.ndarray]:
        state = np.array([round(self._yaw, 5), round(self._pitch, 5)], dtype=np.float64)
        return {"frame": self._frame.copy(), "state": state.astype(np.float32)}

    def _info(self, blocked: bool = False, ended: str = "") -> dict[str, Any]:
        return {
            "tick": self.tick,
            "position": self.position.copy(),
            "hotbar": self._slot,
            "blocked": blocked,
            "ended": ended,
        }

    def _check(self, action: dict[str, Any]) -> tuple[tuple[int, int], np.ndarray]:
        if not self._alive:
            raise RuntimeError("the episode has ended, or none was begun: call reset()")
        if not isinstance(action, dict) or set(action) != {"mouse", "pressed"}:
            raise ValueError(f"an action must be a dict of 'mouse' and 'pressed', found {action!r}")
        mouse, pressed = np.asarray(action["mouse"]), np.asarray(action["pressed"])
        if mouse.shape != (2,) or not np.isin(mouse % 1, 0).all() or np.abs(mouse).max() > MOST_COUNTS:
            raise ValueError(f"mouse must be 2 whole counts from -{MOST_COUNTS} to {MOST_COUNTS}, found {mouse}")
        if pressed.shape != (len(PRESSED_COLUMNS),) or not np.isin(pressed, (0, 1)).all():
            raise ValueError(f"pressed must be {len(PRESSED_COLUMNS)} zeros and ones, found {pressed}")
        dx, dy = mouse.tolist()
        return (int(dx), int(dy)), pressed.astype(bool)

    def _log_line(self, mouse: tuple[int, int], pressed: np.ndarray) -> dict[str, Any]:
        # What is down in the first line was not newly pressed: readers take [0] there for the stuck-attack fault.
        new_buttons = pressed & ~self._held if self.tick else np.zeros_like(pressed)
        x, y, height = (round(float(v), 4) for v in self.position)
        return {
            "mouse": {
                "x": 640.0,
                "y": 360.0,
                "dx": float(mouse[0]),
                "dy": float(mouse[1]),
                "scaledX": 0.0,  # cursor relative to the window's centre
                "scaledY": 0.0,
                "dwheel": 0.0,
                "buttons": _buttons(pressed),
                "newButtons": _buttons(new_buttons),
            },
            "keyboard": {"keys": _keys(pressed), "newKeys": _keys(pressed & ~self._held), "chars": ""},
            "isGuiOpen": False,
            "isGuiInventory": False,
            "hotbar": self._slot,
            "yaw": round(self._yaw, 5),
            "pitch": round(self._pitch, 5),
            # Minecraft's axes: yaw 0 looks along zpos, yaw 90 against xpos.
            "xpos": y,
            "ypos": height,
            "zpos": x,
            "tick": self.tick,
            "milli": int(self.start_time.timestamp() * 1000) + self.tick * 1000 // FPS,
            "inventory": [],
            "serverTick": self.tick,
            "serverTickDurationMs": 1000 / FPS,
            "stats": {},
        }


def _keys(pressed: np.ndarray) -> list[str]:
    return sorted(key for key, down in zip(_LOG_KEYS, pressed, strict=True) if down and key)


def _buttons(pressed: np.ndarray) -> list[int]:
    return [button for column, button in _BUTTONS.items() if pressed[PRESSED_COLUMNS.index(column)]]
