"""The picture of a clip: frames, actions and log on one time axis (docs/data.md, "Looking at clips")."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..actions_vjepa2_ac import ACTION_COLUMNS, CONTINUOUS_COLUMNS, DEGREES_PER_PIXEL
from ..pages import new_figure
from ..processing_vjepa2_ac import resize_frames
from ..recordings.clips import ClipSpec, aggregate_actions
from ..recordings.log import NUM_SLOTS, PRESSED_COLUMNS, Recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]  # left, top, width, height in pixels of the picture

# Colour-blind safe (Okabe and Ito); darkened where white text lies on them.
_PRESSED, _SELECTED, _GUI, _VIEW = "#0072B2", "#E69F00", "#B0467F", "#C14A00"
_INK, _GREY, _FAINT, _PALE = "#1c2733", "#56636f", "#9aa5af", "#eef1f4"

# One pixel is one point at this resolution: sizes of fonts are in pixels as well.
_DPI = 72
_LEFT, _PITCH, _GAP = 100, 216, 12  # row labels; one tubelet and its action; between tubelets
_INNER = _PITCH - _GAP
_CAP, _CAP_STEP = 19, 22
_VIEW_BOX = 98
_KEYS_TOP, _HOTBAR_TOP, _MOTION_TOP, _PANEL_HEIGHT = 28, 122, 150, 276
_TITLE_HEIGHT, _HEADER_HEIGHT, _TICKS_HEIGHT = 62, 18, 20
_ROLL_ROW, _TICK_LABEL, _PLOT_HEIGHT, _PLOT_GAP = 14, 27, 54, 22
_SMALLEST_SCALE = 40.0  # pixels of mouse movement: below that everything would look large

# Key caps at fixed places: column, text, left and row, width, in pixels from the panel's corner.
KEY_CAPS: tuple[tuple[str, str, float, int, float], ...] = (
    ("key.escape", "esc", 0, 0, 22),
    *((f"key.{i}", str(i), 4 + 20 * i, 0, 18) for i in range(1, 10)),
    ("key.q", "q", 14, 1, _CAP),
    ("key.w", "w", 36, 1, _CAP),
    ("key.e", "e", 58, 1, _CAP),
    ("key.a", "a", 14, 2, _CAP),
    ("key.s", "s", 36, 2, _CAP),
    ("key.d", "d", 58, 2, _CAP),
    ("key.f", "f", 80, 2, _CAP),
    ("key.left.shift", "shift", 0, 3, 34),
    ("key.left.control", "ctrl", 37, 3, 28),
    ("key.space", "space", 68, 3, 68),
    ("key.right.shift", "r.shift", 139, 3, 44),
    ("mouse.left", "L", 126, 1, 22),
    ("mouse.middle", "M", 150, 1, 22),
    ("mouse.right", "R", 174, 1, 22),
)


@dataclass(frozen=True)
class TickLog:
    """The raw log of a clip's actions, tick by tick; n = ticks from the first tubelet's start to the last's.

    Attributes:
        mouse: float64 (n, 2), dx and dy in pixels.
        pressed: bool (n, 24), columns `PRESSED_COLUMNS`.
        gui_open: bool (n,).
        view: float64 (n + 1, 2), yaw and pitch in degrees, the last at the start of the last tubelet.
    """

    mouse: np.ndarray
    pressed: np.ndarray
    gui_open: np.ndarray
    view: np.ndarray


@dataclass(frozen=True)
class PreviewClip:
    """A clip, ready to draw.

    Attributes:
        recording_id, session_id, split, start_tick: where it comes from.
        spec: its arithmetic of ticks.
        frames: uint8 (F, 3, Y, X).
        actions: float32 (K, 38), raw units; states: float32 (K + 1, 2), degrees.
        reasons: why it is shown.
        log: its ticks, where the raw recordings are at hand.
        differences: action columns in which the data set and the raw log differ; empty without a log.
    """

    recording_id: str
    session_id: str
    split: str
    start_tick: int
    spec: ClipSpec
    frames: Tensor
    actions: np.ndarray
    states: np.ndarray
    reasons: list[str] = field(default_factory=list)
    log: TickLog | None = None
    differences: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        steps, expected = self.spec.num_tubelets, len(ACTION_COLUMNS)
        for name, found, shape in (
            ("frames", tuple(self.frames.shape[:1]), (self.spec.frames_per_clip,)),
            ("actions", self.actions.shape, (steps - 1, expected)),
            ("states", self.states.shape, (steps, 2)),
        ):
            if found != shape:
                raise ValueError(
                    f"recording {self.recording_id}, tick {self.start_tick}: {name} has shape {found}, clips of "
                    f"{self.spec.frames_per_clip} frames in tubelets of {self.spec.tubelet_size} need {shape}"
                )

    @property
    def num_actions(self) -> int:
        return len(self.actions)

    def value(self, action: int, column: str) -> float:
        return float(self.actions[action, ACTION_COLUMNS.index(column)])


def cut_log(recording: Recording, start: int, spec: ClipSpec) -> TickLog:
    """The ticks that the actions of the clip at tick `start` cover.

    Raises:
        ValueError: a clip that reaches beyond the recording.
    """
    ticks = spec.ticks_per_tubelet * (spec.num_tubelets - 1)
    if start < 0 or start + spec.span > recording.num_ticks:
        raise ValueError(
            f"{recording.name}: a clip of {spec.span} ticks from tick {start} does not fit into {recording.num_ticks}"
        )
    part = slice(start, start + ticks)
    view = np.stack([recording.yaw, recording.pitch], axis=-1)[start : start + ticks + 1]
    mouse = np.stack([recording.mouse_dx[part], recording.mouse_dy[part]], axis=-1)
    return TickLog(mouse, recording.pressed[part], recording.gui_open[part], view)


def compare_with_log(actions: np.ndarray, recording: Recording, start: int, spec: ClipSpec) -> list[str]:
    """Action columns in which stored actions (K, 38) are not those of the raw log (to a thousandth)."""
    expected = aggregate_actions(recording, np.array([start]), spec)[0]
    return [
        column
        for index, column in enumerate(ACTION_COLUMNS)
        if not np.allclose(actions[:, index], expected[:, index], rtol=1e-5, atol=1e-3)
    ]


# ------------------------------------------------------------------------------------------------------ layout


class ClipLayout:
    """Where everything lies in a clip's picture, in pixels.

    Time runs to the right on one axis for all rows: tubelet k and, below it, action k begin at `left(k)`; the action
    ends where tubelet k + 1 begins.

    ```
    | tubelet 0     | tubelet 1     | ...           | tubelet 7   |
    | frame | frame | frame | frame |               |             |
    | action 0      > action 1      > ...           >  legend     |    keys, hotbar, mouse, view
    | ticks of each key in use, where the raw log is at hand      |
    | yaw, pitch                                                  |
    ```
    """

    def __init__(self, clip: PreviewClip) -> None:
        tubelets, frames = clip.spec.num_tubelets, clip.spec.tubelet_size
        self.frame_size = (_INNER - 2 * (frames - 1)) // frames
        self.width = _LEFT + tubelets * _PITCH
        self.frames_top = _TITLE_HEIGHT + _HEADER_HEIGHT
        self.panel_top = self.frames_top + self.frame_size + _TICKS_HEIGHT
        self.roll_top = self.panel_top + _PANEL_HEIGHT
        self.rows = _roll_rows(clip.log)
        self.yaw_top = self.roll_top + (_ROLL_ROW * len(self.rows) + 30 if clip.log else 0) + 18
        self.pitch_top = self.yaw_top + _PLOT_HEIGHT + _PLOT_GAP
        self.height = self.pitch_top + _PLOT_HEIGHT + 28

    def left(self, tubelet: float) -> float:
        """Where a tubelet begins; fractions are times in between."""
        return _LEFT + _PITCH * tubelet

    def frame(self, tubelet: int, frame: int) -> Box:
        left = self.left(tubelet) + frame * (self.frame_size + 2)
        return left, self.frames_top, self.frame_size, self.frame_size

    def key_cap(self, action: int, column: str) -> Box:
        """The cap of a key or mouse button."""
        _, _, left, row, width = next(cap for cap in KEY_CAPS if cap[0] == column)
        return self.left(action) + left, self.panel_top + _KEYS_TOP + _CAP_STEP * row, width, _CAP

    def slot(self, action: int, slot: int) -> Box:
        """A cell of the hotbar."""
        return self.left(action) + 16 * slot, self.panel_top + _HOTBAR_TOP, 15, 17

    def gui_flag(self, action: int) -> Box:
        return self.left(action) + 148, self.panel_top + _HOTBAR_TOP, 56, 17

    def motion(self, action: int, kind: str) -> Box:
        """The box of the mouse path ("mouse") or of the view's change ("view")."""
        offset = {"mouse": 0, "view": _INNER - _VIEW_BOX}[kind]
        return self.left(action) + offset, self.panel_top + _MOTION_TOP, _VIEW_BOX, 84


def _roll_rows(log: TickLog | None) -> list[str]:
    """Columns that are pressed in some tick, in the data set's order, and `gui_open`."""
    if log is None:
        return []
    rows = [column for index, column in enumerate(PRESSED_COLUMNS) if log.pressed[:, index].any()]
    return rows + ["gui_open"] * bool(log.gui_open.any())


# ----------------------------------------------------------------------------------------------------- drawing


class _Canvas:
    """Shapes on a picture in pixels, from the top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = new_figure(width / _DPI, height / _DPI)
        self.figure.set_layout_engine("none")
        self.figure.set_dpi(_DPI)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.set(xlim=(0, width), ylim=(height, 0))

    def box(self, box: Box, fill: str = "none", edge: str = "none", line_width: float = 1, round: float = 0) -> None:
        from matplotlib.patches import FancyBboxPatch, Rectangle

        left, top, width, height = box
        if round:
            style = f"round,pad=0,rounding_size={round}"
            patch: Any = FancyBboxPatch((left, top), width, height, boxstyle=style)
        else:
            patch = Rectangle((left, top), width, height)
        patch.set(facecolor=fill, edgecolor=edge, linewidth=line_width)
        self.axes.add_artist(patch)

    def polygon(self, points: Sequence[tuple[float, float]], fill: str) -> None:
        from matplotlib.patches import Polygon

        self.axes.add_artist(Polygon(points, facecolor=fill, edgecolor="none", zorder=2))

    def text(
        self, x: float, y: float, text: str, size: float = 11, colour: str = _INK, align: str = "left", **style: Any
    ) -> None:
        # parse_math: a dollar sign in a recording's name is no formula.
        style = {"va": "center", "parse_math": False, **style}
        self.axes.text(x, y, text, fontsize=size, color=colour, ha=align, **style)

    def line(self, xs: Any, ys: Any, colour: str, width: float = 1, marker: str = "", **style: Any) -> None:
        self.axes.plot(xs, ys, color=colour, linewidth=width, marker=marker, **style)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        """A hollow dot where both ends are the same."""
        tail, move = np.array(start), np.subtract(end, start)
        length = float(np.hypot(*move))
        if length == 0:
            self.line([tail[0]], [tail[1]], colour, marker="o", markersize=5, markerfacecolor="white")
            return
        along = move / length
        across, head = np.array([-along[1], along[0]]), min(9.0, max(length, 5.0))
        tip = tail + along * max(length, head)
        base = tip - along * head
        self.line([tail[0], base[0]], [tail[1], base[1]], colour, 2.4)
        self.polygon([tuple(tip), tuple(base + across * head * 0.5), tuple(base - across * head * 0.5)], colour)

    def circle(self, x: float, y: float, radius: float, edge: str) -> None:
        from matplotlib.patches import Circle

        self.axes.add_artist(Circle((x, y), radius, facecolor="none", edgecolor=edge))

    def image(self, box: Box, pixels: np.ndarray) -> None:
        left, top, width, height = box
        # "none": the pixels as they are; limits stay those of the picture.
        self.axes.imshow(
            pixels, extent=(left, left + width, top + height, top), interpolation="none", aspect="auto", zorder=1.5
        )

    def png(self) -> bytes:
        self.axes.set(
            xlim=(0, self.figure.get_figwidth() * _DPI),
            ylim=(self.figure.get_figheight() * _DPI, 0),
            autoscale_on=False,
        )
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=_DPI)
        return buffer.getvalue()


def clip_png(clip: PreviewClip) -> bytes:
    """The picture of a clip as PNG: frames, actions, ticks where there is a log, yaw and pitch on one time axis.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layout = ClipLayout(clip)
    canvas = _Canvas(layout.width, layout.height)
    _draw_title(canvas, clip)
    _draw_frames(canvas, layout, clip)
    _draw_row_labels(canvas, layout)
    scale = motion_scale(clip)
    for action in range(clip.num_actions):
        _draw_keys(canvas, layout, clip, action)
        _draw_motion(canvas, layout, clip, action, scale)
    _draw_legend(canvas, layout, clip, scale)
    if clip.log is not None:
        _draw_roll(canvas, layout, clip)
    _draw_states(canvas, layout, clip)
    return canvas.png()


def motion_scale(clip: PreviewClip) -> float:
    """Mouse movement in pixels that reaches a motion box's edge; the view's box has 0.15 degrees for every pixel.

    So that, with no GUI open, the two arrows of an action are the same arrow.
    """
    columns = [ACTION_COLUMNS.index(column) for column in CONTINUOUS_COLUMNS]
    motion = clip.actions[:, columns].astype(np.float64)
    mouse, view = np.hypot(*motion[:, :2].T), np.hypot(*motion[:, 2:].T)
    largest = max(mouse.max(), view.max() / DEGREES_PER_PIXEL, _SMALLEST_SCALE)
    if clip.log is not None:
        largest = max(largest, *(float(np.hypot(*path.T).max()) for path in _mouse_paths(clip.log, clip.spec)))
    power = 10 ** np.floor(np.log10(largest))
    return float(next(step * power for step in (1, 1.5, 2, 3, 4, 6, 8, 10) if step * power >= largest * (1 - 1e-9)))


def _mouse_paths(log: TickLog, spec: ClipSpec) -> list[np.ndarray]:
    """For every action the mouse's path from its start, pixels `(ticks + 1, 2)`."""
    steps = log.mouse.reshape(-1, spec.ticks_per_tubelet, 2)
    return [np.concatenate([np.zeros((1, 2)), step.cumsum(axis=0)]) for step in steps]


def _draw_title(canvas: _Canvas, clip: PreviewClip) -> None:
    rate, last = clip.spec.native_fps, clip.start_tick + clip.spec.span - 1
    canvas.text(8, 13, clip.recording_id, size=14, weight="bold")
    facts = (
        f"split {clip.split}, session {clip.session_id}, ticks {clip.start_tick} to {last} "
        f"({clip.start_tick / rate:.2f} s to {last / rate:.2f} s of the recording)"
    )
    canvas.text(8, 31, facts, colour=_GREY)
    canvas.text(8, 48, textwrap.shorten("Shown because: " + "; ".join(clip.reasons), 240, placeholder=" ..."))
    if clip.differences:
        canvas.text(canvas.axes.get_xlim()[1] - 8, 13, log_verdict(clip), colour=_VIEW, align="right", weight="bold")
    elif clip.log is not None:
        canvas.text(canvas.axes.get_xlim()[1] - 8, 13, log_verdict(clip), colour=_GREY, align="right")


def log_verdict(clip: PreviewClip) -> str:
    """Whether the stored actions are those of the raw log."""
    if clip.log is None:
        return "not compared with the raw log"
    if clip.differences:
        return "actions DIFFER from the raw log in " + ", ".join(clip.differences)
    return "actions equal those of the raw log"


def _draw_frames(canvas: _Canvas, layout: ClipLayout, clip: PreviewClip) -> None:
    spec = clip.spec
    small = resize_frames(clip.frames, layout.frame_size, "squash").permute(0, 2, 3, 1).numpy()
    for tubelet in range(spec.num_tubelets):
        left, top, size, _ = layout.frame(tubelet, 0)
        group = (left - 2, top - _HEADER_HEIGHT, _INNER + 3, size + _HEADER_HEIGHT + 2)
        canvas.box(group, fill="#dfe5ea", round=3)
        seconds = tubelet * spec.ticks_per_tubelet / spec.native_fps
        canvas.text(left + 4, top - 9, f"tubelet {tubelet}", weight="bold")
        canvas.text(left + _INNER - 3, top - 9, f"{seconds:.1f} s", size=10, colour=_GREY, align="right")
        for frame in range(spec.tubelet_size):
            index = tubelet * spec.tubelet_size + frame
            box = layout.frame(tubelet, frame)
            canvas.image(box, small[index])
            tick = f"tick {clip.start_tick + index * spec.stride}"
            canvas.text(box[0] + 1, box[1] + size + 10, tick, size=9.5, colour=_GREY)


def _draw_row_labels(canvas: _Canvas, layout: ClipLayout) -> None:
    top = layout.panel_top
    for y, text in (
        (layout.frames_top + layout.frame_size / 2, "frames"),
        (top + 11, "action"),
        (top + _KEYS_TOP + 42, "keys and\nbuttons"),
        (top + _HOTBAR_TOP + 8, "hotbar, GUI"),
        (top + _MOTION_TOP + 50, "movement\nof mouse\nand view"),
    ):
        canvas.text(6, y, text, colour=_GREY, linespacing=1.3)


def _draw_keys(canvas: _Canvas, layout: ClipLayout, clip: PreviewClip, action: int) -> None:
    """The arrow that names the action, key caps, hotbar and GUI flag."""
    left, top = layout.left(action), layout.panel_top
    middle, end, bottom = top + 11, layout.left(action + 1) - 2, top + 22
    arrow = [(left, top), (end - 8, top), (end, middle), (end - 8, bottom), (left, bottom)]
    canvas.polygon(arrow, fill="#cfe3f1" if not is_idle(clip, action) else "#e7eaed")
    idle = ": no input" if is_idle(clip, action) else ""
    canvas.text(left + 5, middle, f"action {action}", weight="bold")
    canvas.text(left + 58, middle, f"tubelet {action} → {action + 1}{idle}", size=10, colour=_GREY)
    mouse_left, mouse_top, _, _ = layout.key_cap(action, "mouse.left")
    canvas.box((mouse_left - 4, mouse_top - 3, 78, 2 * _CAP_STEP), edge=_FAINT, round=8)
    canvas.text(mouse_left + 35, mouse_top + _CAP_STEP + 8, "mouse", size=9.5, colour=_FAINT, align="center")
    for column, label, *_ in KEY_CAPS:
        down = clip.value(action, column) > 0
        box = layout.key_cap(action, column)
        canvas.box(box, fill=_PRESSED if down else "#f6f7f9", edge=_PRESSED if down else "#d5dbe0", round=3)
        style = {"colour": "white", "weight": "bold"} if down else {"colour": _FAINT}
        canvas.text(box[0] + box[2] / 2, box[1] + box[3] / 2, label, size=10, align="center", **style)
    for slot in range(NUM_SLOTS):
        selected = clip.value(action, f"hotbar.{slot}") > 0
        box = layout.slot(action, slot)
        canvas.box(box, fill=_SELECTED if selected else "white", edge=_INK if selected else "#c3cbd2")
        style = {"colour": _INK, "weight": "bold"} if selected else {"colour": "#c3cbd2"}
        canvas.text(box[0] + box[2] / 2, box[1] + box[3] / 2, str(slot + 1), size=9.5, align="center", **style)
    opened, box = clip.value(action, "gui_open") > 0, layout.gui_flag(action)
    canvas.box(box, fill=_GUI if opened else "white", edge=_GUI if opened else "#d5dbe0", round=8)
    style = {"colour": "white", "weight": "bold"} if opened else {"colour": _FAINT}
    word = "GUI open" if opened else "no GUI"
    canvas.text(box[0] + box[2] / 2, box[1] + box[3] / 2, word, size=9, align="center", **style)


def is_idle(clip: PreviewClip, action: int) -> bool:
    """No mouse movement, no key, no button."""
    columns = [0, 1, *(ACTION_COLUMNS.index(column) for column in PRESSED_COLUMNS)]
    return not clip.actions[action, columns].any()


def _draw_motion(canvas: _Canvas, layout: ClipLayout, clip: PreviewClip, action: int, scale: float) -> None:
    """Mouse path and change of view as arrows from the centre: right is right, down is down."""
    kinds = (
        ("mouse", ("mouse_dx", "mouse_dy"), ("dx", "dy"), "{:+.0f} px", 1.0, _PRESSED),
        ("view", ("yaw_delta", "pitch_delta"), ("yaw", "pitch"), "{:+.1f}°", DEGREES_PER_PIXEL, _VIEW),
    )
    for kind, columns, names, form, per_pixel, colour in kinds:
        box = left, top, width, height = layout.motion(action, kind)
        x, y, half = left + width / 2, top + height / 2, min(width, height) / 2 - 4
        canvas.box(box, fill="white", edge="#c3cbd2")
        canvas.line([left, left + width], [y, y], _PALE)
        canvas.line([x, x], [top, top + height], _PALE)
        canvas.text(left + 4, top + 8, kind, size=9.5, colour=_GREY)
        canvas.circle(x, y, half / 2, _PALE)
        across, down = (clip.value(action, column) for column in columns)
        if kind == "mouse" and clip.log is not None:
            path = _shorten(_mouse_paths(clip.log, clip.spec)[action] / scale) * half + (x, y)
            canvas.line(path[:, 0], path[:, 1], _FAINT, 1, marker="o", markersize=3, markerfacecolor=_INK, zorder=2.5)
        offset = _shorten(np.array([across, down]) / per_pixel / scale) * half
        canvas.arrow((x, y), (x + offset[0], y + offset[1]), colour)
        for row, (name, value) in enumerate(zip(names, (across, down), strict=True)):
            bottom = top + height + 11 + 14 * row
            canvas.text(left + 2, bottom, name, size=10.5, colour=_GREY)
            canvas.text(left + width - 4, bottom, signed(form, value), size=10.5, align="right")


def _shorten(points: np.ndarray) -> np.ndarray:
    """Points (..., 2) at the square root of their distance from 0: small movements stay visible beside large ones."""
    distance = np.hypot(points[..., 0], points[..., 1])[..., None]
    return points / np.sqrt(np.where(distance == 0, 1, distance))


def signed(form: str, value: float) -> str:
    """With a true minus sign, and no sign where it rounds to zero."""
    text = form.format(value)
    zero = form.format(0.0)
    return zero[1:] if text[1:] == zero[1:] else text.replace("-", "−")


def _draw_legend(canvas: _Canvas, layout: ClipLayout, clip: PreviewClip, scale: float) -> None:
    """Below the last tubelet, which no action follows."""
    dots = " Dots: the path tick by tick." if clip.log is not None else ""
    paragraphs = (
        f"Action k is all that was done from the first frame of tubelet k until the first frame of tubelet k + 1 "
        f"({clip.spec.ticks_per_tubelet} ticks of {1000 / clip.spec.native_fps:.0f} ms).",
        "Blue: key or button down in any of these ticks. Orange: slot selected, and GUI flag, at the first tick.",
        f"Arrows: right is right, down is down. Lengths grow with the square root: the box ends at {scale:g} px or "
        f"{scale * DEGREES_PER_PIXEL:g}°, the ring is a quarter of that. A pixel turns the view by 0.15°: without a "
        f"GUI both arrows are the same.{dots}",
        "A turn to the right moves the picture to the left.",
    )
    left, y = layout.left(clip.num_actions), layout.panel_top + 8
    for paragraph in paragraphs:
        for line in textwrap.wrap(paragraph, 37):
            canvas.text(left + 2, y, line, size=10, colour=_GREY)
            y += 14
        y += 8


def _draw_roll(canvas: _Canvas, layout: ClipLayout, clip: PreviewClip) -> None:
    """In which ticks each key in use was down."""
    assert clip.log is not None
    per_tubelet, top = clip.spec.ticks_per_tubelet, layout.roll_top
    bottom = top + 18 + _ROLL_ROW * max(len(layout.rows), 1)
    canvas.text(6, top + 6, "tick by tick", colour=_GREY)
    num_ticks, labelled = len(clip.log.gui_open), -(-per_tubelet * _TICK_LABEL // _PITCH)
    for tick in range(num_ticks + 1):
        x = layout.left(tick / per_tubelet)
        whole = tick % per_tubelet == 0
        canvas.line([x, x], [top + 14, bottom], _FAINT if whole else _PALE, 1.2 if whole else 0.8)
        if tick < num_ticks and tick % labelled == 0:
            canvas.text(x + 2, top + 6, str(clip.start_tick + tick), size=8.5, colour=_FAINT)
    for row, column in enumerate(layout.rows):
        y = top + 17 + _ROLL_ROW * row
        name = column.removeprefix("key.").replace("mouse.", "mouse ").replace("gui_open", "GUI open")
        canvas.text(_LEFT - 8, y + 6, name, size=10, align="right")
        down = clip.log.gui_open if column == "gui_open" else clip.log.pressed[:, PRESSED_COLUMNS.index(column)]
        colour = _GUI if column == "gui_open" else _PRESSED
        for tick in np.flatnonzero(down).tolist():
            left = layout.left(tick / per_tubelet)
            canvas.box((left, y, _PITCH / per_tubelet - 1, _ROLL_ROW - 3), fill=colour)
    if not layout.rows:
        canvas.text(layout.left(0) + 4, top + 24, "no key, no button, no GUI", size=10, colour=_FAINT)


def _draw_states(canvas: _Canvas, layout: ClipLayout, clip: PreviewClip) -> None:
    """Yaw and pitch at the start of every tubelet, as logged; between them tick by tick where there is a log."""
    per_tubelet = clip.spec.ticks_per_tubelet
    for index, (top, name, colour, marker) in enumerate(
        (
            (layout.yaw_top, "yaw\n(up: to the right)", _PRESSED, "o"),
            (layout.pitch_top, "pitch\n(up: upwards)", _VIEW, "s"),
        )
    ):
        canvas.text(6, top + _PLOT_HEIGHT / 2, name, size=10, colour=_GREY, linespacing=1.3)
        canvas.box((_LEFT, top, _PITCH * clip.num_actions, _PLOT_HEIGHT), fill="#fafbfc", edge="#e2e6ea")
        values = clip.states[:, index].astype(np.float64)
        fine = None if clip.log is None else clip.log.view[:, index]
        height = _heights(values, fine, top, circular=index == 0)
        steps = [layout.left(step) for step in range(len(values))]
        for x in steps:
            canvas.line([x, x], [top, top + _PLOT_HEIGHT], "#e2e6ea")
        if fine is None:
            canvas.line(steps, height[0], colour, 1.4)
        else:
            canvas.line([layout.left(tick / per_tubelet) for tick in range(len(fine))], height[1], colour, 1.4)
        canvas.line(steps, height[0], colour, 0, marker=marker, markersize=6, clip_on=False, zorder=3)
        for x, y, value in zip(steps, height[0], values, strict=True):
            near_top = y < top + _PLOT_HEIGHT / 2
            canvas.text(x + 6, y + (13 if near_top else -10), signed("{:+.1f}°", value).lstrip("+"), size=10)


def _heights(values: np.ndarray, fine: np.ndarray | None, top: float, *, circular: bool) -> tuple[np.ndarray, ...]:
    """Heights in the plot of states and, where given, of ticks; ten degrees or more fill it."""
    series = [values] if fine is None else [values, fine]
    if circular:
        # To the right is up; whole turns in the log are no movement.
        series = [np.unwrap(part - values[0], period=360) for part in series]
    else:
        series = [-part for part in series]  # looking down is down
    every = np.concatenate(series)
    middle, reach = (every.max() + every.min()) / 2, max((every.max() - every.min()) / 2, 5.0)
    return tuple(top + _PLOT_HEIGHT / 2 - (part - middle) / reach * (_PLOT_HEIGHT / 2 - 7) for part in series)
