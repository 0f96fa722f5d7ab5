"""Labels that a head told beside what was logged, on one time axis, and the index of a data set's pages.

Labels are logs as `label_videos.py` writes them (docs/data.md, "Labels beside logs").
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..pages import PAGE_STYLE, image_tag, new_figure
from ..recordings.log import PRESSED_COLUMNS, Recording
from ..records import write_file

TICKS_SHOWN = 1200  # a minute: of longer recordings the first one
LOGGED, TOLD, SURE = "#0072B2", "#D55E00", "#009E73"
PAGES = {
    "clips.html": ("Clips", "clips with their actions, chosen for what happens in them"),
    "report.html": ("What the data set holds", "hours, sessions, clips, histograms of every action column"),
    "labels.html": ("Labels beside logs", "what a head told of the videos, next to what was logged"),
}
BACK = '<p class="facts"><a href="index.html">All pages of this data set</a></p>'


@dataclass(frozen=True)
class LabelledRecording:
    """A recording's log and what was told of its video.

    Attributes:
        name: of the recording.
        logged, told: both logs.
        confidence: float64 (n,), of each told tick: the lowest of its action's; NaN where none was told.
        fps: ticks a second.
        step: ticks of an action.
    """

    name: str
    logged: Recording
    told: Recording
    confidence: np.ndarray
    fps: float
    step: int

    @property
    def ticks(self) -> int:
        """Whole steps of both logs, at most `TICKS_SHOWN` ticks of them."""
        shortest = min(self.logged.num_ticks, self.told.num_ticks) - 1
        return min(shortest, TICKS_SHOWN) // self.step * self.step

    def changes(self, recording: Recording, of: str) -> np.ndarray:
        """`(steps,)`, change of `yaw` (circular) or `pitch` over each step, degrees."""
        values = np.diff(getattr(recording, of)[: self.ticks + 1 : self.step])
        return (values + 180) % 360 - 180 if of == "yaw" else values

    def agreement(self) -> dict[str, float]:
        """Share of ticks in which each key is the same in both logs, of keys pressed in either."""
        logged, told = (recording.pressed[: self.ticks] for recording in (self.logged, self.told))
        used = np.flatnonzero((logged | told).any(axis=0))
        return {PRESSED_COLUMNS[at]: float((logged[:, at] == told[:, at]).mean()) for at in used}


def read_confidence(log: bytes, name: str) -> np.ndarray:
    """`(n,)`, the field `confidence` of each line of a told log; NaN where it is null.

    Raises:
        ValueError: lines without the field: the log was not written by `label_videos.py`.
    """
    lines = [json.loads(line) for line in log.splitlines() if line.strip()]
    without = [number for number, line in enumerate(lines, 1) if "confidence" not in line]
    if without:
        raise ValueError(f"{name}, line {without[0]}: no field 'confidence': these are not labels of label_videos.py")
    return np.array([np.nan if line["confidence"] is None else line["confidence"] for line in lines], np.float64)


def labels_png(recording: LabelledRecording) -> bytes:
    """Turns, looks, keys and confidence over time: logged in blue, told in orange."""
    ticks, agreement = recording.ticks, recording.agreement()
    if not ticks:
        raise ValueError(f"{recording.name}: {recording.told.num_ticks} told ticks are less than an action")
    heights = [1.2, 1.2, 0.16 * max(len(agreement), 1) + 0.2, 0.8]
    figure = new_figure(4 + ticks / recording.fps / 4, sum(heights) + 1)
    turn, look, keys, sure = figure.subplots(4, 1, sharex=True, gridspec_kw={"height_ratios": heights})
    edges = np.arange(0, ticks + 1, recording.step) / recording.fps
    for axes, of, label in ((turn, "yaw", "turn, °"), (look, "pitch", "look, °")):
        for log, colour, name in ((recording.logged, LOGGED, "logged"), (recording.told, TOLD, "told")):
            axes.stairs(recording.changes(log, of), edges, color=colour, label=name, baseline=None)
        axes.set_ylabel(label, fontsize=8)
    turn.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    for row, column in enumerate(agreement):
        at = PRESSED_COLUMNS.index(column)
        for log, colour, offset in ((recording.logged, LOGGED, 0.1), (recording.told, TOLD, 0.5)):
            keys.broken_barh(_runs(log.pressed[:ticks, at], recording.fps), (row + offset, 0.35), color=colour)
    keys.set_yticks(np.arange(len(agreement)) + 0.5, [c.removeprefix("key.") for c in agreement], fontsize=7)
    keys.set_ylim(len(agreement) or 1, 0)
    sure.plot(np.arange(ticks) / recording.fps, recording.confidence[:ticks], color=SURE, linewidth=1)
    sure.fill_between(
        *(np.arange(ticks) / recording.fps, 0, 1), where=recording.told.unsure[:ticks], color="#e2e6ea", step="post"
    )
    sure.set(ylim=(0, 1.02), xlim=(0, ticks / recording.fps), xlabel="seconds")
    sure.set_ylabel("confidence", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _runs(pressed: np.ndarray, fps: float) -> list[tuple[float, float]]:
    """Beginning and length in seconds of each stretch of ticks in which a key is pressed."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], pressed.astype(np.int8), [0]])))
    return [(begin / fps, (end - begin) / fps) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def write_labels(directory: Path, dataset: str, recordings: Sequence[LabelledRecording]) -> Path:
    """Write `labels.html` with a picture a recording, and the index anew."""
    figures = ""
    for recording in recordings:
        image = base64.b64encode(labels_png(recording)).decode()
        worst = sorted(recording.agreement().items(), key=lambda item: item[1])
        keys = ", ".join(f"{column.removeprefix('key.')} {100 * share:.1f} %" for column, share in worst)
        turns = [recording.changes(log, "yaw") for log in (recording.told, recording.logged)]
        error = float(np.abs((turns[0] - turns[1] + 180) % 360 - 180).mean())
        shown, whole = (ticks / recording.fps for ticks in (recording.ticks, recording.logged.num_ticks))
        caption = (
            f"{recording.name}: {shown:g} of {whole:g} s; "
            f"turns are off by {error:.1f} degrees an action; ticks whose keys agree: {keys or 'no key is pressed'}"
        )
        figures += f"<figure><div class='scroll'>{image_tag(image, caption)}</div>"
        figures += f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    text = f"""<section><p class="facts">Blue is what was logged, orange what the head told; an action is a step of the
turns. Confidence is the lowest of an action's; ticks marked unsure are grey. Mouse and view have none.</p>{figures}
</section>"""
    write_file(directory / "labels.html", _page(f"Labels of {dataset}", BACK + text).encode())
    write_index(directory, dataset)
    return directory / "labels.html"


def write_index(directory: Path, dataset: str) -> Path:
    """Write `index.html`: the pages that the folder holds."""
    found: Mapping[str, tuple[str, str]] = {name: of for name, of in PAGES.items() if (directory / name).is_file()}
    pages = "".join(f'<dt><a href="{n}">{title}</a></dt><dd>{text}</dd>' for n, (title, text) in found.items())
    path = directory / "index.html"
    write_file(path, _page(f"Data set {dataset}", f"<section><dl>{pages}</dl></section>").encode())
    return path


def _page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{PAGE_STYLE}</style></head><body><main><h1>{html.escape(title)}</h1>
{body}</main></body></html>
"""
