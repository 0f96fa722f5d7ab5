"""The Doom engine: starting it, its buttons, the walls of its map (docs/environments.md, "The game")."""

import contextlib
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

RESOLUTIONS = ("160x120", "256x144", "320x180", "640x360", "640x480", "1280x720")
MOVES = ("w", "s", "a", "d")
WEAPON_KEYS = (1, 2, 3, 4)
# Map units (about 32 to a metre).
PLAYER_RADIUS, STEP_HEIGHT = 16.0, 24.0


class Walls:
    """Lines of the map that a player cannot cross: is there room to walk, and something to see?

    Args:
        sectors: the map, as ViZDoom tells it.
    """

    def __init__(self, sectors: list[Any]):
        floors: dict[tuple, list[float]] = {}
        blocking = set()
        for sector in sectors:
            for line in sector.lines:
                ends = tuple(sorted([(line.x1, line.y1), (line.x2, line.y2)]))
                floors.setdefault(ends, []).append(sector.floor_height)
                if line.is_blocking:
                    blocking.add(ends)
        blocking |= {ends for ends, heights in floors.items() if max(heights) - min(heights) > STEP_HEIGHT}
        lines = np.array(sorted(blocking), dtype=np.float64)  # (walls, 2, 2)
        self.start, self.along = lines[:, 0], lines[:, 1] - lines[:, 0]

    def clearance(self, x: float, y: float, yaw: float) -> dict[str, float]:
        """Free distance in map units in the direction of each movement key; `yaw` in degrees, growing to the right."""
        forward = np.array([math.cos(math.radians(yaw)), -math.sin(math.radians(yaw))])
        left = np.array([-forward[1], forward[0]])
        # Three parallel rays a direction: the player has a width.
        directions = np.repeat([forward, -forward, left, -left], 3, axis=0)
        sideways = np.stack([-directions[:, 1], directions[:, 0]], axis=1)
        origins = np.array([x, y]) + sideways * np.tile([-PLAYER_RADIUS, 0.0, PLAYER_RADIUS], 4)[:, None]
        to_wall = self.start - origins[:, None]  # (rays, walls, 2)
        cross = directions[:, None, 0] * self.along[:, 1] - directions[:, None, 1] * self.along[:, 0]
        cross[np.abs(cross) < 1e-9] = np.nan  # parallel: comparisons with NaN are false
        distance = (to_wall[..., 0] * self.along[:, 1] - to_wall[..., 1] * self.along[:, 0]) / cross
        where = (to_wall[..., 0] * directions[:, None, 1] - to_wall[..., 1] * directions[:, None, 0]) / cross
        nearest = np.where((distance > 0) & (where >= 0) & (where <= 1), distance, np.inf).min(axis=1)
        return dict(zip(MOVES, nearest.reshape(4, 3).min(axis=1).tolist(), strict=True))


def start_game(resolution: str, weapon: bool = False) -> tuple[Any, Walls, tempfile.TemporaryDirectory]:
    """A ViZDoom game without window, HUD and monsters, the walls of its map, and its working folder.

    Args:
        resolution: one of `RESOLUTIONS`.
        weapon: draw the weapon that is held.

    Raises:
        ImportError: the extra "vizdoom" is not installed.
        ValueError: an unknown resolution.
    """
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution must be one of {RESOLUTIONS}, found {resolution!r}")
    try:
        import vizdoom as vzd
    except ImportError as error:
        raise ImportError("this environment needs ViZDoom: pip install 'vjepa-ac-hf[vizdoom]'") from error

    game = vzd.DoomGame()
    game.set_doom_game_path(str(Path(vzd.__file__).parent / "freedoom2.wad"))
    game.set_doom_scenario_path(str(Path(vzd.scenarios_path) / "deathmatch.wad"))
    game.set_doom_map("map01")
    game.set_window_visible(False)
    game.set_mode(vzd.Mode.PLAYER)
    game.set_screen_resolution(getattr(vzd.ScreenResolution, "RES_" + resolution.upper()))
    game.set_screen_format(vzd.ScreenFormat.RGB24)
    for part in ("hud", "crosshair", "decals", "particles", "messages", "effects_sprites", "screen_flashes"):
        getattr(game, f"set_render_{part}")(False)
    game.set_render_weapon(weapon)
    button, variable = vzd.Button, vzd.GameVariable
    game.set_available_buttons(
        [button.TURN_LEFT_RIGHT_DELTA, button.LOOK_UP_DOWN_DELTA]
        + [button.MOVE_FORWARD, button.MOVE_BACKWARD, button.MOVE_LEFT, button.MOVE_RIGHT]
        + [getattr(button, f"SELECT_WEAPON{i}") for i in WEAPON_KEYS]
    )
    game.set_available_game_variables(
        [
            *(variable.POSITION_X, variable.POSITION_Y, variable.POSITION_Z, variable.ANGLE, variable.PITCH),
            *(variable.SELECTED_WEAPON, variable.DEAD),
        ]
    )
    game.set_episode_timeout(0)
    game.add_game_args("+movebob 0 -nomonsters")
    game.set_sectors_info_enabled(True)
    # The engine's process writes its configuration into the working folder that it inherits, until it ends.
    folder = tempfile.TemporaryDirectory(prefix="vizdoom-", ignore_cleanup_errors=True)
    with contextlib.chdir(folder.name):
        game.init()
    walls = Walls(game.get_state().sectors)
    game.set_sectors_info_enabled(False)  # the map does not change
    return game, walls, folder


def end_game(game: Any, folder: tempfile.TemporaryDirectory) -> None:
    """End the engine's process, then remove its folder."""
    game.close()
    folder.cleanup()


def begin_life(game: Any, seed: int, heading: float) -> None:
    """A new life at a start drawn from the seed, turned to the left by `heading` degrees."""
    game.set_seed(seed)
    game.new_episode()
    game.send_game_command("god")
    game.send_game_command("give weapons")
    nothing = [0] * game.get_available_buttons_size()
    game.make_action(nothing, 10)
    game.make_action([heading, *nothing[1:]], 1)
    game.make_action(nothing, 4)
