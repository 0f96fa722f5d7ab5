"""Synthetic VPT recordings with real videos, and an oracle that shares no code with the package."""

import json
import math
import tarfile
from pathlib import Path

import numpy as np
import torch
from torchcodec.encoders import VideoEncoder

DATA = Path(__file__).parent / "data"
LUANTI = "luanti-tundra-finch-a03d5c81e7f2-20261122-093351"

KEYS = (
    *"123456789",
    *("w", "a", "s", "d", "space", "q", "f", "e", "escape"),
    *("left.shift", "right.shift", "left.control"),
)


def name_of(player: str, segment: int = 0, day: int = 20220101) -> str:
    """A recording of the player `silly-<player>`; its id, which says nothing, is another one in every segment."""
    return f"silly-{player}-{(segment + 1) * 0x1F153AC423:012x}-{day}-{segment:06d}"


def make_lines(num_ticks: int, seed: int = 0) -> list[dict]:
    """Log lines with whole-turn yaw jumps, wheel changes, GUI spans, null inputs, odd buttons and a stuck attack."""
    rng = np.random.default_rng(seed)
    yaw, pitch, hotbar = float(rng.uniform(-400, 400)), 0.0, int(rng.integers(9))
    lines = []
    for tick in range(num_ticks):
        dx, dy = (float(value) for value in rng.integers(-300, 300, size=2))
        buttons = sorted({int(button) for button in rng.integers(0, 5, size=rng.integers(0, 3))})
        if rng.random() < 0.2:
            hotbar = int(rng.integers(9))
        new_buttons = buttons if rng.random() < 0.1 else []
        if tick == 0:
            buttons, new_buttons = [0], [0]
        elif tick < 20:
            buttons, new_buttons = sorted({0, *buttons}), []
        lines.append(
            {
                "mouse": {"x": 640.0, "y": 360.0, "dx": dx, "dy": dy, "buttons": buttons, "newButtons": new_buttons},
                "keyboard": {
                    "keys": [f"key.keyboard.{key}" for key in KEYS if rng.random() < 0.05] + ["key.keyboard.x"]
                },
                "isGuiOpen": tick % 40 >= 28,
                "hotbar": hotbar,
                "yaw": yaw,
                "pitch": pitch,
                "unused": {"nested": [tick]},
            }
        )
        if tick % 17 == 5 and tick:
            lines[-1]["mouse"] = None
        if tick % 19 == 7:
            lines[-1]["keyboard"] = None
        yaw += 0.15 * dx + (360.0 * int(rng.integers(-2, 3)) if rng.random() < 0.1 else 0.0)
        pitch = max(-90.0, min(90.0, pitch + 0.15 * dy))
    return lines


def to_log(lines: list[dict]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def make_video(num_frames: int, *, fps: float = 20, size: tuple[int, int] = (36, 64), seed: int = 0) -> bytes:
    """A tiny mp4 of a drifting colour ramp whose brightness tells frames apart."""
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    shade = (torch.arange(num_frames)[:, None, None] * 3 + rows + 2 * columns + 31 * seed) % 256
    frames = torch.stack([shade, 255 - shade, shade.flip(-1)], dim=1).to(torch.uint8)
    encoder = VideoEncoder(frames, frame_rate=fps)
    # Without the macroblock tree, x264 gives the same bytes every time.
    options = {"threads": "1", "x264-params": "mbtree=0"}
    data = encoder.to_tensor("mp4", codec="libx264", pixel_format="yuv420p", crf=20, extra_options=options)
    return data.numpy().tobytes()


def write_recording(folder: Path, name: str, num_ticks: int, seed: int = 0, **video) -> list[dict]:
    folder.mkdir(parents=True, exist_ok=True)
    lines = make_lines(num_ticks, seed)
    (folder / f"{name}.jsonl").write_bytes(to_log(lines))
    (folder / f"{name}.mp4").write_bytes(make_video(num_ticks, seed=seed, **video))
    return lines


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    import io

    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shard_of(folder: Path, path: Path, names: list[str]) -> Path:
    files = [f"{name}{suffix}" for name in names for suffix in (".mp4", ".jsonl")]
    return write_shard(path, [(file, (folder / file).read_bytes()) for file in files])


# ------------------------------------------------------------------------------------------------------ oracle


def oracle_inputs(lines: list[dict], gui_scale: float = 1.0) -> list[tuple[float, float, set[str]]]:
    """Per tick: mouse dx, dy and the names of what is pressed, after all repairs."""
    ticks = []
    stuck = bool(lines[0]["mouse"]) and lines[0]["mouse"]["newButtons"] == [0]
    for tick, line in enumerate(lines):
        mouse = line["mouse"] or {"dx": 0, "dy": 0, "buttons": [], "newButtons": []}
        if tick and 0 in mouse["newButtons"]:
            stuck = False
        down = {"key." + key[13:] for key in (line["keyboard"] or {"keys": []})["keys"] if key[13:] in KEYS}
        for button, side in ((0, "left"), (1, "right"), (2, "middle")):
            if button in mouse["buttons"] and not (button == 0 and stuck):
                down.add(f"mouse.{side}")
        if tick and line["hotbar"] != lines[tick - 1]["hotbar"]:
            down.add(f"key.{line['hotbar'] + 1}")
        factor = gui_scale if line["isGuiOpen"] else 1.0
        ticks.append((mouse["dx"] * factor, mouse["dy"] * factor, down))
    return ticks


ORACLE_COLUMNS = [f"key.{key}" for key in KEYS] + ["mouse.left", "mouse.right", "mouse.middle"]


def oracle_actions(
    lines: list[dict], start: int, *, tubelets: int = 8, ticks: int = 8, gui_scale: float = 1.0
) -> np.ndarray:
    inputs = oracle_inputs(lines, gui_scale)
    rows = []
    for k in range(tubelets - 1):
        first, last = start + k * ticks, start + (k + 1) * ticks
        turn = math.fmod(lines[last]["yaw"] - lines[first]["yaw"], 360)
        turn = turn - 360 if turn >= 180 else turn + 360 if turn < -180 else turn
        row = [
            sum(inputs[tick][0] for tick in range(first, last)),
            sum(inputs[tick][1] for tick in range(first, last)),
            turn,
            lines[last]["pitch"] - lines[first]["pitch"],
        ]
        row += [float(any(name in inputs[tick][2] for tick in range(first, last))) for name in ORACLE_COLUMNS]
        row += [float(lines[first]["hotbar"] == slot) for slot in range(9)]
        rows.append([*row, float(lines[first]["isGuiOpen"])])
    return np.array(rows, dtype=np.float32)


def oracle_states(lines: list[dict], start: int, *, tubelets: int = 8, ticks: int = 8) -> np.ndarray:
    at = [start + ticks * k for k in range(tubelets)]
    return np.array([[lines[tick]["yaw"], lines[tick]["pitch"]] for tick in at], dtype=np.float32)
