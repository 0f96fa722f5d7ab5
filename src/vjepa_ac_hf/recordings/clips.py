"""Which ticks a clip's frames, actions and states come from (docs/data.md, "Clips" and "Actions")."""

from dataclasses import dataclass

import numpy as np

from ..actions_vjepa2_ac import ACTION_COLUMNS, wrap_degrees
from .log import FIRST_PRESSED, PRESSED_COLUMNS, Recording
from .slots import NUM_SLOTS

_FIRST_HOTBAR = ACTION_COLUMNS.index("hotbar.0")


@dataclass(frozen=True)
class ClipSpec:
    """Tick arithmetic of clips.

    Args:
        native_fps: frames (and log lines) per second of a recording.
        fps: frames per second of a clip; `native_fps / fps` must be whole.
        frames_per_clip: frames in a clip, a multiple of `tubelet_size`, at least two tubelets.
        tubelet_size: frames in a tubelet.
        clip_stride: ticks between clip starts; None: `frames_per_clip * native_fps / fps`, so that no frame is
            in two clips.

    Raises:
        ValueError: values that do not fit together; the message has them.
    """

    native_fps: float = 20
    fps: float = 5
    frames_per_clip: int = 16
    tubelet_size: int = 2
    clip_stride: int | None = None

    def __post_init__(self) -> None:
        if not self.native_fps > 0 or not self.fps > 0:
            raise ValueError(f"native_fps and fps must be positive, found {self.native_fps} and {self.fps}")
        ratio = self.native_fps / self.fps
        if ratio < 1 or abs(ratio - round(ratio)) > 1e-9:
            raise ValueError(
                f"native_fps / fps must be a whole number, found {self.native_fps} / {self.fps} = {ratio:g}"
            )
        if self.tubelet_size < 1 or self.frames_per_clip % self.tubelet_size:
            raise ValueError(
                f"frames_per_clip must be a multiple of tubelet_size, found {self.frames_per_clip} and "
                f"{self.tubelet_size}"
            )
        if self.num_tubelets < 2:
            raise ValueError(
                f"a clip needs at least 2 tubelets (one action), found {self.frames_per_clip} frames of "
                f"{self.tubelet_size} per tubelet"
            )
        if self.clip_stride is not None and self.clip_stride < 1:
            raise ValueError(f"clip_stride must be at least 1 tick, found {self.clip_stride}")

    @property
    def stride(self) -> int:
        """Ticks between two frames of a clip."""
        return round(self.native_fps / self.fps)

    @property
    def ticks_per_tubelet(self) -> int:
        return self.stride * self.tubelet_size

    @property
    def num_tubelets(self) -> int:
        return self.frames_per_clip // self.tubelet_size

    @property
    def span(self) -> int:
        """Ticks from a clip's first frame to its last, both included."""
        return self.stride * (self.frames_per_clip - 1) + 1

    @property
    def ticks_between_clips(self) -> int:
        return self.frames_per_clip * self.stride if self.clip_stride is None else self.clip_stride


def clip_starts(num_ticks: int, spec: ClipSpec) -> np.ndarray:
    """First ticks of all clips that fit into `num_ticks` ticks, int64 (n,); empty if none fits."""
    return np.arange(0, max(num_ticks - spec.span + 1, 0), spec.ticks_between_clips, dtype=np.int64)


def frame_ticks(start: int, spec: ClipSpec) -> list[int]:
    """Ticks of the frames of the clip that starts at tick `start`."""
    return [int(start) + spec.stride * frame for frame in range(spec.frames_per_clip)]


def aggregate_actions(recording: Recording, starts: np.ndarray, spec: ClipSpec) -> np.ndarray:
    """Raw actions of clips: action k covers every tick from the start of tubelet k to that of tubelet k + 1.

    Args:
        recording: a parsed recording.
        starts: (n,) first ticks of the clips.
        spec: the clips' arithmetic.

    Returns:
        float32 (n, num_tubelets - 1, 38), columns `ACTION_COLUMNS`: mouse movement summed in pixels, yaw
        change circular in [-180, 180) and pitch change in degrees, keys and buttons down in any tick, hotbar slot
        (one-hot, all 0 where it is not known) and GUI at the first tick.

    Raises:
        ValueError: a clip that reaches beyond the recording.

    Source: docs/data.md, "Actions"; repairs and buttons as in VPT (arXiv 2206.11795).
    """
    tubelets = _tubelet_ticks(recording, starts, spec)
    first, last = tubelets[:, :-1], tubelets[:, 1:]
    ticks = first[..., None] + np.arange(spec.ticks_per_tubelet)
    actions = np.zeros((*first.shape, len(ACTION_COLUMNS)), dtype=np.float32)
    actions[..., 0] = recording.mouse_dx[ticks].sum(axis=-1)
    actions[..., 1] = recording.mouse_dy[ticks].sum(axis=-1)
    actions[..., 2] = wrap_degrees(recording.yaw[last] - recording.yaw[first])
    # Just under 180 in float64 may round to 180 in float32: the interval stays half open.
    actions[..., 2][actions[..., 2] >= 180] = -180
    actions[..., 3] = recording.pitch[last] - recording.pitch[first]
    actions[..., FIRST_PRESSED : FIRST_PRESSED + len(PRESSED_COLUMNS)] = recording.pressed[ticks].any(axis=-2)
    actions[..., _FIRST_HOTBAR : _FIRST_HOTBAR + NUM_SLOTS] = recording.hotbar[first][..., None] == np.arange(NUM_SLOTS)
    actions[..., ACTION_COLUMNS.index("gui_open")] = recording.gui_open[first]
    return actions


def clip_states(recording: Recording, starts: np.ndarray, spec: ClipSpec) -> np.ndarray:
    """(yaw, pitch) at the first tick of every tubelet, degrees as logged: float32 (n, num_tubelets, 2)."""
    ticks = _tubelet_ticks(recording, starts, spec)
    return np.stack([recording.yaw[ticks], recording.pitch[ticks]], axis=-1).astype(np.float32)


def _tubelet_ticks(recording: Recording, starts: np.ndarray, spec: ClipSpec) -> np.ndarray:
    starts = np.asarray(starts, dtype=np.int64)
    if len(starts) and (starts.min() < 0 or starts.max() + spec.span > recording.num_ticks):
        raise ValueError(
            f"{recording.name}: clips of {spec.span} ticks that start at {starts.min()} to {starts.max()} do not "
            f"fit into {recording.num_ticks} ticks"
        )
    return starts[:, None] + spec.ticks_per_tubelet * np.arange(spec.num_tubelets)
