"""Play in an environment, written as a VPT recording (docs/environments.md, "Recording")."""

import json
import os
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.utils import RecordConstructorArgs

from ..records import write_file
from .vizdoom_env import FIRST_START, FPS, VizDoomVPTEnv

FRAMES_AT_ONCE = 64


class VPTWriter:
    """Writes `<name>.mp4` and `<name>.jsonl`; both appear when `finish` is called, none before.

    Args:
        folder: where.
        name: `<alias>-<id>-<date>-<time>`.
        height: of the frames, in pixels.
        width: likewise.
    """

    def __init__(self, folder: str | Path, name: str, height: int, width: int):
        from torchcodec.encoders import Encoder

        self.video, self.log = Path(folder, name + ".mp4"), Path(folder, name + ".jsonl")
        self._part = self.video.with_name(f".{name}.{os.getpid()}.tmp.mp4")
        self.lines: list[dict] = []
        self._frames: list[np.ndarray] = []
        self._stack = ExitStack()
        encoder = self._stack.enter_context(Encoder())
        # One thread: x264's bytes depend on their number.
        self._stream = encoder.add_video(
            height=height,
            width=width,
            frame_rate=FPS,
            codec="libx264",
            pixel_format="yuv420p",
            crf=24,
            preset="ultrafast",  # four times as fast as veryfast
            extra_options={"threads": "1"},
        )
        encoder.open_file(self._part)

    def add(self, frame: np.ndarray, line: dict[str, Any]) -> None:
        """A frame, uint8 `(Y, X, 3)`, and the line that belongs to it."""
        self.lines.append(line)
        self._frames.append(frame)
        if len(self._frames) == FRAMES_AT_ONCE:
            self._flush()

    def finish(self) -> None:
        """Complete both files."""
        self._flush()
        self._stack.close()
        write_file(self.log, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        os.replace(self._part, self.video)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._frames = []
        self._stack.close()
        self._part.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._frames:
            self._stream.add_frames(torch.from_numpy(np.stack(self._frames)).permute(0, 3, 1, 2).contiguous())
            self._frames = []


class RecordVPT(gymnasium.Wrapper, RecordConstructorArgs):
    """Records every episode of a `VizDoomVPTEnv` as a VPT recording, a player each: episodes go into
    splits one by one.

    Goes directly around the environment, under wrappers that change its observations. The last frame gets a line
    without input, unless it is beyond a death or teleport. Rehearsals (`reset(options={"rehearsal": True})`: an oracle
    that looks for a goal) are left out. Files are complete when the episode has ended, or after the
    next `reset` or `close`.

    Args:
        env: a `VizDoomVPTEnv`.
        folder: where the recordings go; it is made where it is missing.
        alias: the recordings are `<alias>-<number>-<id>-<date>-<time>`, player `<alias>-<number>`.

    Raises:
        ValueError: another environment; a recording that is there already.
    """

    def __init__(self, env: gymnasium.Env, folder: str | Path, alias: str = "vizdoom-loop"):
        game = env.unwrapped
        if not isinstance(game, VizDoomVPTEnv) or env.observation_space != game.observation_space:
            raise ValueError(f"RecordVPT goes directly around a VizDoomVPTEnv, found {env}")
        RecordConstructorArgs.__init__(self, folder=folder, alias=alias)
        gymnasium.Wrapper.__init__(self, env)
        self.game = game
        self.folder, self.alias, self.episodes = Path(folder), alias, 0
        self._writer: VPTWriter | None = None
        self.folder.mkdir(parents=True, exist_ok=True)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        self._finish()
        if (options or {}).get("rehearsal"):
            return self.env.reset(seed=seed, options=options)
        start = FIRST_START + timedelta(minutes=5 * self.episodes)
        name = f"{self.alias}-{self.episodes:06d}-{0:012x}-{start:%Y%m%d-%H%M%S}"
        if Path(self.folder, name + ".mp4").exists():
            raise ValueError(f"{self.folder / name}.mp4 is there already: choose another folder or alias")
        self.game.start_time = start
        observation, info = self.env.reset(seed=seed, options=options)
        self._frame = observation["frame"].copy()
        self._writer = VPTWriter(self.folder, name, *self._frame.shape[:2])
        self.episodes += 1
        return observation, info

    def step(self, action: Any) -> tuple[dict, Any, bool, bool, dict]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self._writer is None:
            return observation, reward, terminated, truncated, info
        self._writer.add(self._frame, self.game.line)
        self._frame = observation["frame"].copy()
        if terminated or truncated:
            self._finish(continuous=not terminated)
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        self._finish()
        super().close()

    def _finish(self, continuous: bool = True) -> None:
        if self._writer is None:
            return
        if continuous:
            self._writer.add(self._frame, self.game.idle_line())
        self._writer.finish()
        self._writer = None
