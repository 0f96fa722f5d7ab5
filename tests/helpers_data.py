"""Synthetic VPT recordings with real videos, and an oracle that shares no code with the package."""

import itertools
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
# Column by column as docs/data.md defines them ("Actions", "Hotbar slots", "Repairs"), each from the log's own lines:
# slow, and without a thought for how the package does it.

KEY_COLUMNS = [f"key.{key}" for key in KEYS]
BUTTON_COLUMNS = ["mouse.left", "mouse.right", "mouse.middle"]
ORACLE_COLUMNS = KEY_COLUMNS + BUTTON_COLUMNS


def keys_in(line: dict) -> set[str]:
    keyboard = line.get("keyboard")
    return set() if keyboard is None else {key.replace("key.keyboard.", "key.", 1) for key in keyboard["keys"]}


def oracle_slots(lines: list[dict]) -> list[int | None]:
    """The slot that each line shows: as logged, else what the input of all lines before it has led to."""
    if all("hotbar" in line for line in lines):
        return [line["hotbar"] for line in lines]
    shown: list[int | None] = [None]
    turned = 0.0
    for line, before in zip(lines, [None, *lines], strict=False):
        slot = shown[-1]
        if not line["isGuiOpen"]:
            notches = (line.get("mouse") or {}).get("dwheel", 0.0)
            turned = notches if turned * notches < 0 else turned + notches
            while abs(turned) >= 1:
                step = 1 if turned > 0 else -1
                turned -= step
                slot = None if slot is None else [8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0][slot + 1 - step]
            fresh = [n for n in range(9) if f"key.{n + 1}" in keys_in(line) - keys_in(before or {})]
            slot = max(fresh) if fresh else slot
        shown.append(slot)
    return shown[:-1]


def oracle_number_keys(lines: list[dict], injection: str) -> set[tuple[int, str]]:
    """(tick, number key) for every change of the slot between two lines that both show one."""
    slots = oracle_slots(lines)
    found = set()
    for j in range(1, len(lines)):
        if slots[j] != slots[j - 1] and slots[j] is not None and slots[j - 1] is not None:
            found.add(({"cause": j - 1, "vpt": j}[injection], f"key.{slots[j] + 1}"))
    return found


def attack_is_real(lines: list[dict], tick: int) -> bool:
    """Not the press that recorders report from line 0 on until attack is pressed anew."""
    if (lines[0].get("mouse") or {}).get("newButtons") != [0]:
        return True
    return any(0 in line["mouse"]["newButtons"] for line in lines[1 : tick + 1] if line.get("mouse"))


def oracle_inputs(
    lines: list[dict], gui_scale: float = 1.0, injection: str = "cause"
) -> list[tuple[float, float, set[str]]]:
    """Per tick: mouse dx, dy and the names of what is pressed, after all repairs."""
    injected = oracle_number_keys(lines, injection)
    found = []
    for tick, line in enumerate(lines):
        down = {column for column in KEY_COLUMNS if column in keys_in(line) or (tick, column) in injected}
        mouse = line.get("mouse")
        if mouse is None:
            found.append((0.0, 0.0, down))
            continue
        down |= {column for button, column in enumerate(BUTTON_COLUMNS) if button in mouse["buttons"]}
        if not attack_is_real(lines, tick):
            down -= {"mouse.left"}
        scale = gui_scale if line["isGuiOpen"] else 1.0
        found.append((mouse["dx"] * scale, mouse["dy"] * scale, down))
    return found


def oracle_actions(
    lines: list[dict],
    start: int,
    *,
    tubelets: int = 8,
    ticks: int = 8,
    gui_scale: float = 1.0,
    injection: str = "cause",
) -> np.ndarray:
    """float32 (tubelets - 1, 38) of the clip that starts at a tick."""
    inputs, slots = oracle_inputs(lines, gui_scale, injection), oracle_slots(lines)
    starts = [start + ticks * k for k in range(tubelets)]
    actions = []
    for here, following in itertools.pairwise(starts):
        covered = inputs[here:following]
        turn = lines[following]["yaw"] - lines[here]["yaw"]
        action = {
            "mouse_dx": sum(dx for dx, _, _ in covered),
            "mouse_dy": sum(dy for _, dy, _ in covered),
            "yaw_delta": turn - 360 * math.floor((turn + 180) / 360),
            "pitch_delta": lines[following]["pitch"] - lines[here]["pitch"],
        }
        action |= {column: any(column in down for _, _, down in covered) for column in ORACLE_COLUMNS}
        action |= {f"hotbar.{slot}": slots[here] == slot for slot in range(9)}
        actions.append([float(value) for value in (action | {"gui_open": lines[here]["isGuiOpen"]}).values()])
    return np.array(actions, dtype=np.float32)


def oracle_states(lines: list[dict], start: int, *, tubelets: int = 8, ticks: int = 8) -> np.ndarray:
    shown = lines[start::ticks][:tubelets]
    return np.array([(line["yaw"], line["pitch"]) for line in shown], dtype=np.float32)
