"""Record first-person play in ViZDoom as VPT shards: demonstration data that any machine can make.

    python dataset_scripts/record_vizdoom.py --output shards --recordings 40 --ticks 1200

ViZDoom (extra "vizdoom") is a maintained Doom engine with a software renderer and free game data. A scripted player
walks the deathmatch map alone (no monsters, god mode): every recording is one continuous life without deaths or
teleports, and a player of its own. What it logs is what a person's mouse and keyboard would have done:

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
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timedelta
from pathlib import Path

from vjepa_ac_hf.console import Parser

# What the package offers, without importing it (tests/test_programs.py holds both equal).
RESOLUTIONS = ("160x120", "256x144", "320x180", "640x360", "640x480", "1280x720")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for shard-000000.tar, ...")
    parser.add_argument("--recordings", type=int, default=40, help="number of recordings, a player each")
    parser.add_argument("--ticks", type=int, default=1200, help="ticks (frames, log lines) a recording")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same recordings")
    parser.add_argument("--resolution", choices=RESOLUTIONS, default="640x360", help="of the video")
    parser.add_argument("--recordings_per_shard", type=int, default=8)
    parser.add_argument("--pauses", type=float, default=0.0, help="how often the view rests, 0 to below 1 (default 0)")
    parser.add_argument("--weapon", action="store_true", help="draw the weapon that is held")
    parser.add_argument("--num_proc", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    for name in ("recordings", "ticks", "recordings_per_shard", "num_proc"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, found {getattr(arguments, name)}")
    if not 0 <= arguments.pauses < 1:
        parser.error(f"--pauses must be at least 0 and below 1, found {arguments.pauses}")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np
import torch
from tqdm.auto import tqdm

from vjepa_ac_hf.actions_vjepa2_ac import DEGREES_PER_PIXEL
from vjepa_ac_hf.envs.doom import MOVES, WEAPON_KEYS, Walls
from vjepa_ac_hf.envs.recording import VPTWriter
from vjepa_ac_hf.envs.vizdoom_env import PRESSED_COLUMNS, VizDoomVPTEnv
from vjepa_ac_hf.recordings.shards import write_tar
from vjepa_ac_hf.records import claim_folder

ATTEMPTS = 5
# Map units (about 32 to a metre).
STOP_DISTANCE = 90.0  # a walking player coasts about 75 after the key is released
VIEW_DISTANCE = 120.0  # closer than this a wall fills the view
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


class Player:
    """Draws the input of every tick: turn and look rates, movement keys, now and then a weapon key.

    Args:
        generator: source of all randomness.
        walls: the map's; the player keeps away from them, since a view full of wall says nothing.
        turn: standard deviation of the turn rate in degrees a tick; over 8 ticks it makes about 16 degrees.
        look: the same for looking up and down, about 4 degrees over 8 ticks.
        pauses: share of the draws that hold the view still, for 8 to 16 ticks. People look so: a turn, then a rest.
    """

    def __init__(
        self, generator: np.random.Generator, walls: Walls, turn: float = 2.8, look: float = 0.7, pauses: float = 0.0
    ):
        self.generator, self.walls, self.turn, self.look, self.pauses = generator, walls, turn, look, pauses
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
            # Without pauses nothing is drawn for them: recordings of a seed stay what they were.
            if self.pauses and self.generator.random() < self.pauses:
                self.view_left = int(self.generator.integers(8, 17))
                self.turn_rate = self.look_rate = 0.0
        self.view_left -= 1
        self._walk(self.walls.clearance(x, y, yaw))
        weapon = int(self.generator.choice(WEAPON_KEYS)) if self.generator.random() < 0.01 else None
        return (
            round(self.turn_rate / DEGREES_PER_PIXEL),
            round(self.look_rate / DEGREES_PER_PIXEL),
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


def play(env: VizDoomVPTEnv, generator: np.random.Generator, ticks: int, pauses: float, writer: VPTWriter) -> bool:
    """One life, written; False where it was not continuous."""
    start = {"engine_seed": int(generator.integers(1, 2**31)), "heading": float(generator.uniform(-180, 180))}
    seen, info = env.reset(options=start)
    player = Player(generator, env.walls, pauses=pauses)
    for _ in range(ticks):
        if info["ended"]:
            return False
        (x, y, _), (yaw, pitch) = info["position"], env.view
        dx, dy, keys, weapon_key = player.act(x, y, yaw, pitch)
        pressed = np.isin(PRESSED_COLUMNS, [f"key.{key}" for key in (*keys, weapon_key)])
        frame = seen["frame"]
        seen, _, _, _, info = env.step({"mouse": np.array([dx, dy]), "pressed": pressed})
        writer.add(frame, env.line)
    return True


def recording_name(seed: int, index: int) -> tuple[str, datetime]:
    """VPT's `<alias>-<id>-<date>-<time>`, made up from seed and index: a player of its own, to split by."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).hexdigest()
    animal = f"{_ADJECTIVES[int(digest[:4], 16) % 12]}-{_ANIMALS[int(digest[4:8], 16) % 12]}"
    alias = f"vizdoom-{animal}-{digest[8:20]}"
    start = datetime(2026, 1, 1) + timedelta(minutes=5 * index)
    return f"{alias}-{digest[20:32]}-{start:%Y%m%d-%H%M%S}", start


def record_shard(
    path: Path, indices: range, ticks: int, seed: int, resolution: str, pauses: float, weapon: bool
) -> int:
    """Record some recordings and write them as one shard. Returns how many takes were thrown away."""
    torch.set_num_threads(1)
    discarded = 0
    with tempfile.TemporaryDirectory(prefix="vizdoom-") as folder:
        members = []
        for index in indices:
            name, start = recording_name(seed, index)
            for attempt in range(ATTEMPTS):
                # A game for every take: what happened in it never depends on the takes before.
                env = VizDoomVPTEnv(resolution=resolution, weapon=weapon)
                env.start_time = start
                writer = VPTWriter(folder, name, *env.frame_shape[:2])
                continuous = play(env, np.random.default_rng([seed, index, attempt]), ticks, pauses, writer)
                env.close()
                if continuous:
                    break
                writer.discard()
                discarded += 1
            else:
                raise RuntimeError(f"{name}: {ATTEMPTS} takes in a row held a death or teleport")
            writer.finish()
            members += [(file.name, file) for file in (writer.video, writer.log)]
        write_tar(path, members)
    return discarded


def main() -> None:
    arguments = parse_arguments()
    output = arguments.output.resolve()
    kept = ("recordings", "ticks", "seed", "resolution", "recordings_per_shard", "pauses", "weapon")
    if any(output.glob("*.tar")) and not (output / "recording.json").is_file():
        raise ValueError(f"{output}: holds shards but no recording.json; choose another --output")
    settings = {k: getattr(arguments, k) for k in kept}
    claim_folder(output, settings, file="recording.json", defaults={"pauses": 0.0, "weapon": False})

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
            pool.submit(
                *(record_shard, path, indices, arguments.ticks),
                *(arguments.seed, arguments.resolution, arguments.pauses, arguments.weapon),
            ): indices
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
