"""A small built data set, made without the builder: pictures that shift with the yaw, as a turning view does."""

import json
from pathlib import Path

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, Value, Video
from torchcodec.encoders import VideoEncoder

from vjepa_ac_hf import ACTION_COLUMNS, ActionStatistics

FEATURES = Features(
    {
        "video": Video(),
        "actions": Array2D((7, 38), "float32"),
        "states": Array2D((8, 2), "float32"),
        "recording_id": Value("string"),
        "session_id": Value("string"),
        "player_id": Value("string"),
        "start_tick": Value("int32"),
    }
)


def clip_row(rng: np.random.Generator, session: int, index: int, size: int = 32, fps: float = 5) -> dict:
    """One clip: a random panorama seen through a window that the yaw moves, 2 pixels a degree."""
    yaw_delta = rng.normal(0, 8, 7)
    yaw = np.concatenate([[rng.uniform(-180, 180)], yaw_delta]).cumsum()
    panorama = torch.rand(3, size, 64, generator=torch.Generator().manual_seed(int(rng.integers(1 << 30))))
    panorama = torch.nn.functional.interpolate(panorama[None], scale_factor=(1, 8), mode="bilinear")[0]
    frames = []
    for step in range(8):
        left = round((yaw[step] - yaw[0]) * 2) % (panorama.shape[-1] - size)
        frames += [panorama[..., left : left + size]] * 2
    video = VideoEncoder((torch.stack(frames) * 255).to(torch.uint8), frame_rate=fps).to_tensor("mp4", crf=18)
    actions = np.zeros((7, len(ACTION_COLUMNS)), np.float32)
    actions[:, 0], actions[:, 2] = yaw_delta / 0.15, yaw_delta
    actions[:, ACTION_COLUMNS.index("key.w")] = rng.random(7) < 0.5
    return {
        "video": {"bytes": video.numpy().tobytes(), "path": None},
        "actions": actions,
        "states": np.stack([yaw, np.zeros(8)], axis=1).astype(np.float32),
        "recording_id": f"toy-{session:04d}-00000000beef-20260101-000000",
        "session_id": f"toy-{session:04d}-20260101",
        "player_id": f"toy-{session:04d}",
        "start_tick": 64 * index,
    }


def write_clips(
    folder: Path, train: int = 24, validation: int = 6, size: int = 32, seed: int = 0, fps: float = 5
) -> Path:
    """`folder` as build_vpt_tubelets.py leaves it: data/*.parquet and action_stats.json; three clips a player."""
    rng = np.random.default_rng(seed)
    (folder / "data").mkdir(parents=True)
    statistics = ActionStatistics()
    first = 0
    for split, count in (("train", train), ("validation", validation)):
        if not count:
            continue
        rows = [clip_row(rng, (first + i) // 3, i % 3, size, fps) for i in range(count)]
        first += 3 * ((count + 2) // 3)
        if split == "train":
            statistics.update(np.stack([r["actions"] for r in rows]))
        Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "action_stats.json").write_text(json.dumps(statistics.to_dict()))
    return folder
