"""Decoding recordings, drawing the cursor, encoding clips (docs/data.md, "Geometry").

torchcodec is imported where it is used: it loads FFmpeg's shared libraries, and the package must import without.
"""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .mp4 import check_mp4, sample_times
from .observed import CURSOR_HEIGHT, CURSOR_WIDTH
from .timing import GRID_TOLERANCE, RATE_TOLERANCE, even_ticks, frame_rate, frames_of_ticks

# How clips are stored, chosen by measurement (docs/LOG.md, "How clips are stored"): at 256x256, 40.0 dB PSNR in 126 kB
# per 16-frame clip on first-person play. Without arithmetic coding and deblocking (`fastdecode`) a clip decodes in half
# the time, which every epoch pays; `superfast` takes 0.6 of the time of `veryfast` at the same size and quality once
# adaptive quantisation is off.
CLIP_CRF = 20
CLIP_PRESET = "superfast"
CLIP_TUNE = "fastdecode"
# The same frames must give the same bytes anywhere: x264's result depends on the number of threads, and its macroblock
# tree on memory it has not written (seen on small frames; costs 0.2 dB at the same size).
CLIP_X264_PARAMS = "mbtree=0:aq-mode=0"

_CURSOR_SIZE = 28


LARGEST_PICTURE = 3840 * 2160  # pixels of a recording's frame: a clip's frames lie in memory together


class VideoError(ValueError):
    """A video that cannot be used; the message names the file and what is wrong."""


class VideoReader:
    """Frame-exact access to a video, a few frames at a time.

    Args:
        source: a path, or the file's bytes.
        name: what messages call the video.

    Attributes:
        num_frames: how many there are.
        frame_rate: frames a second where none is missing.

    Raises:
        VideoError: an empty, truncated or corrupt file, one of another format than mp4 or beyond the limits of
            `mp4` and `LARGEST_PICTURE`; a file without frames or frame rate, or whose time stamps go backwards.
    """

    def __init__(self, source: bytes | str | Path, name: str) -> None:
        from torchcodec.decoders import VideoDecoder

        self.name = name
        try:
            size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
            if size == 0:
                raise VideoError(f"{name}: empty video file: expected an mp4 video, found 0 bytes")
            with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
                times = sample_times(check_mp4(file))
            # Absolute: FFmpeg takes what comes before a colon in a relative path for a protocol.
            self._decoder = VideoDecoder(
                source if isinstance(source, bytes) else os.path.abspath(source), seek_mode="exact"
            )
        except VideoError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise VideoError(f"{name}: cannot open the video: {_cause(error)}") from error
        width, height = self._decoder.metadata.width or 0, self._decoder.metadata.height or 0
        if width * height > LARGEST_PICTURE:
            raise VideoError(
                f"{name}: picture too large: expected at most {LARGEST_PICTURE} pixels, found {width}x{height}"
            )
        metadata = self._decoder.metadata
        self.num_frames = metadata.num_frames or 0
        self._start = metadata.begin_stream_seconds_from_content or 0.0
        # Where an edit list leaves pictures out, tables do not say which.
        self._times = times if times is not None and len(times) == self.num_frames else None
        known = None if self._times is None else frame_rate(self._times)
        self.frame_rate = known or metadata.average_fps or 0.0
        if self.num_frames == 0 or self.frame_rate <= 0:
            raise VideoError(
                f"{name}: expected frames at a known rate, found {self.num_frames} frames at {self.frame_rate} FPS"
            )

    def frames(self, indices: Sequence[int]) -> torch.Tensor:
        """Frames as uint8 (len(indices), 3, H, W), RGB.

        Where indices increase from call to call, every frame of the video is decoded once: going back means decoding
        again from the last key frame.

        Raises:
            VideoError: a frame that does not exist, cannot be decoded, or is shown at another time than the file's
                tables say.
        """
        try:
            found = self._decoder.get_frames_at(list(indices))
        except (RuntimeError, ValueError, IndexError) as error:
            raise VideoError(
                f"{self.name}: cannot decode: frames {indices[0]} to {indices[-1]} of {self.num_frames}: "
                f"{_cause(error)}"
            ) from error
        if self._times is not None:
            shown, expected = found.pts_seconds.numpy(), self._start + self._times[list(indices)]
            late = np.abs(shown - expected) * self.frame_rate > GRID_TOLERANCE
            if late.any():
                wrong = int(late.argmax())
                raise VideoError(
                    f"{self.name}: time stamps: frame {indices[wrong]} is shown at {shown[wrong]:.3f} s, expected "
                    f"{expected[wrong]:.3f} s"
                )
        return found.data

    def frames_of_ticks(self, num_ticks: int, fps: float) -> np.ndarray:
        """The frame of each tick of a log, int64 (num_ticks,), -1 for ticks without one: see `timing.frames_of_ticks`.

        Nothing is decoded. Where the file's tables do not tell the time stamps, frames are taken to be evenly spaced,
        and `frames` compares with that.

        Raises:
            VideoError: frames cannot be told to belong to the log's ticks.
        """
        if self._times is None:
            self._times = np.arange(self.num_frames) / fps
        try:
            return frames_of_ticks(self._start + self._times, num_ticks, fps)
        except ValueError as error:
            raise VideoError(f"{self.name}: {error}") from error

    def check_even(self, fps: float) -> None:
        """Refuse a video without a log whose frames are not one a tick, as a build would with its log.

        Raises:
            VideoError: frames are unevenly spaced, or begin one tick late.
        """
        if self._times is None:
            self._times = np.arange(self.num_frames) / fps
        if even_ticks(self._times, fps) is None:
            raise VideoError(
                f"{self.name}: time stamps: expected evenly spaced frames, found {self.num_frames} frames in "
                f"{self._times[-1] * fps + 1:.0f} ticks; encode the video again at a constant {fps:g} FPS"
            )
        if round(self._start * fps) == 1:
            raise VideoError(
                f"{self.name}: time stamps: the first frame is shown at {self._start:g} s, one tick late: it may be "
                "the second; encode the video again, beginning at 0"
            )


def _cause(error: Exception) -> str:
    # torchcodec prefixes its messages with source files of its own build.
    return str(error).splitlines()[0].rsplit(".cpp:", 1)[-1] if str(error) else type(error).__name__


def draw_cursor(frame: torch.Tensor, x: float, y: float) -> None:
    """Paint an arrow (white, black edge) into a frame, in place.

    Args:
        frame: uint8 (3, H, W).
        x, y: its tip in 1280x720 pixels, whatever the size of the frame; outside of it nothing is painted.
    """
    height, width = frame.shape[-2:]
    size = max(round(_CURSOR_SIZE * height / CURSOR_HEIGHT), 6)
    left, top = math.floor(x * width / CURSOR_WIDTH), math.floor(y * height / CURSOR_HEIGHT)
    if not (0 <= left < width and 0 <= top < height):
        return
    rows, columns = torch.arange(size)[:, None], torch.arange(size)[None]
    slant = (rows * 0.7).floor()
    inside = columns <= slant
    edge = inside & ((columns == 0) | (columns >= slant) | (rows == size - 1))
    colour = torch.where(edge, 0, 255).to(torch.uint8)
    area = frame[:, top : top + size, left : left + size]
    inside, colour = (mask[: area.shape[1], : area.shape[2]] for mask in (inside, colour))
    area[:] = torch.where(inside, colour, area)


def encode_clip(frames: torch.Tensor, fps: float) -> bytes:
    """Encode frames uint8 (N, 3, H, W), H and W even, as an H.264 mp4 of `fps` frames per second."""
    from torchcodec.encoders import VideoEncoder

    encoded = VideoEncoder(frames, frame_rate=fps).to_tensor(
        "mp4",
        codec="libx264",
        pixel_format="yuv420p",
        crf=CLIP_CRF,
        preset=CLIP_PRESET,
        extra_options={"threads": "1", "tune": CLIP_TUNE, "x264-params": CLIP_X264_PARAMS},
    )
    return encoded.numpy().tobytes()


def check_frame_rate(reader: VideoReader, native_fps: float) -> None:
    """Refuse a video whose frame rate (missing frames left aside) differs by more than 5 % from that of recordings."""
    if abs(reader.frame_rate - native_fps) > RATE_TOLERANCE * native_fps:
        raise VideoError(
            f"{reader.name}: frame rate: expected {native_fps:g} FPS, found {reader.frame_rate:g}: where all "
            f"recordings are so, and a log line belongs to each frame, give --native_fps {reader.frame_rate:.0f}; else "
            f"encode the video again: ffmpeg -i FILE -vf fps={native_fps:g} OUT.mp4"
        )
