"""Record first-person play in ViZDoom as VPT shards: demonstration data that any machine can make.

    python dataset_scripts/record_vizdoom.py --output shards --recordings 40 --ticks 1200

ViZDoom (extra "vizdoom") is a maintained Doom engine with a software renderer and free game data. A scripted player
walks the deathmatch map alone (no monsters, god mode): every recording is one continuous life without deaths or
teleports, and a session of its own. What it logs is what a person's mouse and keyboard would have done:

- 1 tick = 2 of Doom's 35 tics a second (17.5 ticks a second of play, stored as VPT's 20).
- `dx`, `dy`: whole mouse counts of 0.15 degrees; they turn the view by exactly that (to the engine's 0.01 degrees).
- `yaw` = -angle, unwrapped, growing to the right; `pitch` positive looking down; positions in map units, `ypos` is
  the height.
- w, a, s, d move; number keys 1 to 4 choose a weapon, `hotbar` is the chosen one's number less 1.

The player turns and looks at rates that are drawn anew, independently, every few ticks: how the view changes over a
tubelet (8 ticks) cannot be guessed from the past, only read from the actions. Same arguments, same logs.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchcodec.encoders import Encoder
from tqdm.auto import tqdm

from vjepa_ac_hf.data.shards import write_tar
from vjepa_ac_hf.records import write_json

DEGREES_PER_COUNT = 0.15
TICS_PER_TICK = 2
FPS = 20
# Running through a doorway makes about 25 units a tick; a respawn or teleport makes hundreds.
LARGEST_STEP = 60.0
ATTEMPTS = 5
FRAMES_AT_ONCE = 64
# Map units (about 32 to a metre).
STOP_DISTANCE = 90.0  # a walking player coasts about 75 after the key is released
VIEW_DISTANCE = 120.0  # closer than this a wall fills the view
PLAYER_RADIUS, STEP_HEIGHT = 16.0, 24.0
RESOLUTIONS = ("160x120", "256x144", "320x180", "640x360", "640x480", "1280x720")
MOVES = ("w", "s", "a", "d")
WEAPON_KEYS = (1, 2, 3, 4)
_ADJECTIVES = (
    "amber",
    "brisk",
    "calm",
    "dusky",
    "eager",
    "fleet",
    "gentle",
    "humble",
    "ivory",
    "jolly",
    "keen",
    "lucid",
)
_ANIMALS = (
    "badger",
    "crane",
    "dingo",
    "egret",
    "ferret",
    "gecko",
    "heron",
    "ibex",
    "jackal",
    "koala",
    "lynx",
    "marten",
)


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


class Player:
    """Draws the input of every tick: turn and look rates, movement keys, now and then a weapon key.

    Args:
        generator: source of all randomness.
        walls: the map's; the player keeps away from them, since a view full of wall says nothing.
        turn: standard deviation of the turn rate in degrees a tick; over 8 ticks it makes about 16 degrees.
        look: the same for looking up and down, about 4 degrees over 8 ticks.
    """

    def __init__(self, generator: np.random.Generator, walls: Walls, turn: float = 2.8, look: float = 0.7):
        self.generator, self.walls, self.turn, self.look = generator, walls, turn, look
        self.turn_rate = self.look_rate = 0.0
        self.view_left = self.move_left = 0
        self.keys: set[str] = set()

    def act(self, x: float, y: float, yaw: float, pitch: float) -> tuple[int, int, set[str], int | None]:
        """(dx, dy) in counts, movement keys, and a weapon key or None; place in map units, angles in degrees."""
        if self.view_left == 0:
            self.view_left = int(self.generator.integers(3, 9))
            self.turn_rate = self.generator.normal(0, self.turn)
            # Drawn back to the horizon over about 20 ticks; what is left is independent of the past.
            self.look_rate = self.generator.normal(-0.05 * pitch, self.look)
        self.view_left -= 1
        self._walk(self.walls.clearance(x, y, yaw))
        weapon = int(self.generator.choice(WEAPON_KEYS)) if self.generator.random() < 0.01 else None
        return (
            round(self.turn_rate / DEGREES_PER_COUNT),
            round(self.look_rate / DEGREES_PER_COUNT),
            set(self.keys),
            weapon,
        )

    def _walk(self, clear: dict[str, float]) -> None:
        near = any(clear[key] < STOP_DISTANCE for key in self.keys)
        self.move_left -= 1
        if self.move_left <= 0 or near:
            self.move_left = int(self.generator.integers(8, 33))
            draw, side = self.generator.random(2)
            wanted = {"w": draw < 0.4, "s": draw > 0.9, "a": side < 0.1, "d": side > 0.9}
            self.keys = {key for key in MOVES if wanted[key] and clear[key] >= STOP_DISTANCE}
        if clear["w"] < VIEW_DISTANCE and clear["s"] >= STOP_DISTANCE:
            self.keys = {"s"}


def start_game(resolution: str) -> tuple[Any, Walls]:
    """A ViZDoom game without window, HUD, weapon sprite and monsters, and the walls of its map."""
    import vizdoom as vzd

    game = vzd.DoomGame()
    game.set_doom_game_path(str(Path(vzd.__file__).parent / "freedoom2.wad"))
    game.set_doom_scenario_path(str(Path(vzd.scenarios_path) / "deathmatch.wad"))
    game.set_doom_map("map01")
    game.set_window_visible(False)
    game.set_mode(vzd.Mode.PLAYER)
    game.set_screen_resolution(getattr(vzd.ScreenResolution, "RES_" + resolution.upper()))
    game.set_screen_format(vzd.ScreenFormat.RGB24)
    for part in ("hud", "weapon", "crosshair", "decals", "particles", "messages", "effects_sprites", "screen_flashes"):
        getattr(game, f"set_render_{part}")(False)
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
    game.init()
    walls = Walls(game.get_state().sectors)
    game.set_sectors_info_enabled(False)  # the map does not change
    return game, walls


def begin_life(game: Any, seed: int, heading: float) -> None:
    """A new life at a start drawn from the seed, turned by `heading` degrees."""
    game.set_seed(seed)
    game.new_episode()
    game.send_game_command("god")
    game.send_game_command("give weapons")
    nothing = [0] * game.get_available_buttons_size()
    game.make_action(nothing, 10)
    game.make_action([heading, *nothing[1:]], 1)
    game.make_action(nothing, 4)


def play(
    game: Any, walls: Walls, generator: np.random.Generator, ticks: int, video: Path, start: datetime
) -> list[dict] | None:
    """One life: the video at `video`, and the lines of its log; None where the life was not continuous."""
    begin_life(game, int(generator.integers(1, 2**31)), float(generator.uniform(-180, 180)))
    player = Player(generator, walls)
    lines: list[dict] = []
    held: set[str] = set()
    position: np.ndarray | None = None
    yaw = angle = 0.0
    with Encoder() as encoder:
        height, width = game.get_screen_height(), game.get_screen_width()
        # One thread: x264's bytes depend on their number.
        stream = encoder.add_video(
            height=height,
            width=width,
            frame_rate=FPS,
            codec="libx264",
            pixel_format="yuv420p",
            crf=24,
            preset="ultrafast",  # four times as fast as veryfast
            extra_options={"threads": "1"},
        )
        encoder.open_file(video)
        frames: list[np.ndarray] = []
        for tick in range(ticks):
            state = game.get_state()
            x, y, z, new_angle, pitch, weapon, dead = state.game_variables
            moved = 0.0 if position is None else math.hypot(x - position[0], y - position[1])
            if dead or moved > LARGEST_STEP:
                return None
            # The engine's angle grows to the left, modulo 360.
            yaw = -new_angle if tick == 0 else yaw + (angle - new_angle + 180) % 360 - 180
            angle, position = new_angle, np.array([x, y, z])
            pitch = (pitch + 180) % 360 - 180
            frames.append(state.screen_buffer)
            if len(frames) == FRAMES_AT_ONCE or tick == ticks - 1:
                stream.add_frames(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous())
                frames = []
            dx, dy, keys, weapon_key = player.act(x, y, yaw, pitch)
            pressed = keys | ({str(weapon_key)} if weapon_key else set())
            lines.append(log_line(tick, start, yaw, pitch, position, int(weapon), (dx, dy), pressed, pressed - held))
            held = pressed
            turn, look = (counts * DEGREES_PER_COUNT / TICS_PER_TICK for counts in (dx, dy))
            buttons = [key in keys for key in MOVES] + [key == weapon_key for key in WEAPON_KEYS]
            game.make_action([turn, -look, *map(int, buttons)], TICS_PER_TICK)
    return lines


def log_line(
    tick: int,
    start: datetime,
    yaw: float,
    pitch: float,
    position: np.ndarray,
    weapon: int,
    counts: tuple[int, int],
    keys: set[str],
    new_keys: set[str],
) -> dict:
    """A line of a VPT log: the state seen in the frame and the input during the tick after it."""
    dx, dy = counts
    x, y, height = (round(float(v), 4) for v in position)
    return {
        "mouse": {
            "x": 640.0,
            "y": 360.0,
            "dx": float(dx),
            "dy": float(dy),
            "scaledX": 0.0,  # cursor relative to the window's centre
            "scaledY": 0.0,
            "dwheel": 0.0,
            "buttons": [],
            "newButtons": [],
        },
        "keyboard": {
            "keys": sorted(f"key.keyboard.{key}" for key in keys),
            "newKeys": sorted(f"key.keyboard.{key}" for key in new_keys),
            "chars": "",
        },
        "isGuiOpen": False,
        "isGuiInventory": False,
        "hotbar": weapon - 1,
        "yaw": round(yaw, 5),
        "pitch": round(pitch, 5),
        # Minecraft's axes: yaw 0 looks along zpos, yaw 90 against xpos.
        "xpos": y,
        "ypos": height,
        "zpos": x,
        "tick": tick,
        "milli": int(start.timestamp() * 1000) + tick * 1000 // FPS,
        "inventory": [],
        "serverTick": tick,
        "serverTickDurationMs": 1000 / FPS,
        "stats": {},
    }


def recording_name(seed: int, index: int) -> tuple[str, datetime]:
    """VPT's `<alias>-<session>-<date>-<time>`, made up from seed and index."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).hexdigest()
    alias = f"vizdoom-{_ADJECTIVES[int(digest[:4], 16) % 12]}-{_ANIMALS[int(digest[4:8], 16) % 12]}"
    start = datetime(2026, 1, 1) + timedelta(minutes=5 * index)
    return f"{alias}-{digest[8:20]}-{start:%Y%m%d-%H%M%S}", start


def record_shard(path: Path, indices: range, ticks: int, seed: int, resolution: str) -> int:
    """Record some recordings and write them as one shard. Returns how many takes were thrown away."""
    torch.set_num_threads(1)
    discarded = 0
    home = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="vizdoom-") as folder:
        os.chdir(folder)  # the engine leaves its configuration in the working folder
        members = []
        for index in indices:
            name, start = recording_name(seed, index)
            video, log = Path(folder, name + ".mp4"), Path(folder, name + ".jsonl")
            for attempt in range(ATTEMPTS):
                # A game for every take: what happened in it never depends on the takes before.
                game, walls = start_game(resolution)
                lines = play(game, walls, np.random.default_rng([seed, index, attempt]), ticks, video, start)
                game.close()
                if lines is not None:
                    break
                discarded += 1
            else:
                raise RuntimeError(f"{name}: {ATTEMPTS} takes in a row held a death or teleport")
            log.write_text("".join(json.dumps(line) + "\n" for line in lines))
            members += [(video.name, video), (log.name, log)]
        write_tar(path, members)
        os.chdir(home)
    return discarded


def claim_folder(output: Path, arguments: dict[str, Any]) -> None:
    """Note what the folder holds; refuse one that holds something else."""
    output.mkdir(parents=True, exist_ok=True)
    manifest = output / "recording.json"
    if manifest.is_file():
        found = json.loads(manifest.read_text())
        differing = [f"{k}: found {found.get(k)}, expected {v}" for k, v in arguments.items() if found.get(k) != v]
        if differing:
            raise SystemExit(
                f"{manifest}: recorded with other arguments ({'; '.join(differing)}); choose another --output"
            )
        return
    if any(output.glob("*.tar")):
        raise SystemExit(f"{output}: holds shards but no recording.json; choose another --output")
    write_json(manifest, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for shard-000000.tar, ...")
    parser.add_argument("--recordings", type=int, default=40, help="number of recordings, a session each")
    parser.add_argument("--ticks", type=int, default=1200, help="ticks (frames, log lines) a recording")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same recordings")
    parser.add_argument("--resolution", choices=RESOLUTIONS, default="640x360", help="of the video")
    parser.add_argument("--recordings_per_shard", type=int, default=8)
    parser.add_argument("--num_proc", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    for name in ("recordings", "ticks", "recordings_per_shard", "num_proc"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, found {getattr(arguments, name)}")
    output = arguments.output.resolve()
    kept = ("recordings", "ticks", "seed", "resolution", "recordings_per_shard")
    claim_folder(output, {k: getattr(arguments, k) for k in kept})

    per_shard = arguments.recordings_per_shard
    shards = {
        output / f"shard-{i:06d}.tar": range(first, min(first + per_shard, arguments.recordings))
        for i, first in enumerate(range(0, arguments.recordings, per_shard))
    }
    missing = {path: indices for path, indices in shards.items() if not path.is_file()}
    discarded = 0
    with (
        ProcessPoolExecutor(arguments.num_proc, mp_context=multiprocessing.get_context("spawn")) as pool,
        tqdm(total=sum(map(len, missing.values())), unit="recording") as progress,
    ):
        futures = {
            pool.submit(record_shard, path, indices, arguments.ticks, arguments.seed, arguments.resolution): indices
            for path, indices in missing.items()
        }
        for future in as_completed(futures):
            discarded += future.result()
            progress.update(len(futures[future]))
    print(
        f"{arguments.recordings} recordings of {arguments.ticks} ticks in {len(shards)} shards at {output} "
        f"({len(shards) - len(missing)} were there already, {discarded} takes discarded for a death or teleport)"
    )


if __name__ == "__main__":
    main()
