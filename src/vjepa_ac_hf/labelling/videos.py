"""One video, from its frames to its log (docs/applications.md, "Labelling")."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from ..planning.actions import COLUMN, NUMBER_KEYS
from ..planning.environments import VPTLog
from ..recordings.log import GUI_MOUSE_SCALE, MOST_TICKS
from ..recordings.names import recorder_version_of
from ..recordings.video import VideoReader, check_frame_rate
from .actions import Labeller
from .files import HEADER, LabelError, LabelFiles, Part, open_part, write_lines, write_whole
from .windows import count_tubelets, plan_windows, read_windows

ROWS_AT_ONCE = 4096  # of the Parquet file


def label_video(
    labeller: Labeller,
    files: LabelFiles,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write a video's log and confidences; goes on where a run that was killed has stopped.

    Args:
        labeller: the head.
        files: the video, and where its labels go.
        batch_size: windows (clips of the head's length) told at once; changes speed and memory, not the labels.
        progress: called with the actions told so far and their number.

    Returns:
        `status` ("done", or "skipped" where the labels are there already), `ticks`, `unsure_ticks`, `actions`,
        `resumed_actions` (told by an earlier run), and `pitch_range`, in degrees from the first frame's pitch.

    Raises:
        VideoError: a video that cannot be decoded or has another frame rate.
        LabelError: a video too short or too long; a log that is not to be overwritten; labels of other settings.
    """
    header = files.complete(labeller.settings)
    if header is None:
        files.folder.mkdir(parents=True, exist_ok=True)
        with open_part(files) as part:
            header = files.complete(labeller.settings)  # another process may have been faster
            if header is None:
                return _label(labeller, files, part, batch_size, progress)
    files.part.unlink(missing_ok=True)  # killed between the log and this
    return {"status": "skipped", "reason": "its labels are complete", **_summary(header), "resumed_actions": 0}


def _label(
    labeller: Labeller, files: LabelFiles, part: Part, batch_size: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    spec, config = labeller.spec, labeller.model.config
    try:
        reader = open_video(labeller, files)
    except ValueError:
        files.part.unlink()
        raise
    windows = plan_windows(count_tubelets(reader.num_frames, spec), config.num_steps)
    total = windows[-1].actions.stop
    header = {"settings": labeller.settings, "model": labeller.name, "video_bytes": files.video.stat().st_size}
    part.begin(header)
    resumed = part.steps
    progress(part.steps, total)
    missing = [window for window in windows if window.actions.stop > part.steps]
    processor = labeller.processor
    for batch, frames in read_windows(reader, missing, spec, processor.resolution, processor.resize_mode, batch_size):
        new = [slice(window.told, None) for window in batch]
        actions, confidence, slots = (
            [row for values, steps in zip(told, new, strict=True) for row in values[steps].tolist()]
            for told in labeller.tell(frames)
        )
        part.append({"first": part.steps, "actions": actions, "confidence": confidence, "slots": slots})
        progress(part.steps, total)
    header |= _count(labeller, part, reader.num_frames)
    write_whole(files.confidence, lambda path: _write_confidence(labeller, part, path))
    write_lines(files.log, _lines(labeller, part, reader.num_frames, header))
    files.part.unlink()
    return {"status": "done", **_summary(header), "resumed_actions": resumed}


def open_video(labeller: Labeller, files: LabelFiles) -> VideoReader:
    """The video, after all checks that do not need its pictures.

    Raises:
        VideoError, LabelError: see `label_video`.
    """
    spec = labeller.spec
    reader = VideoReader(files.video, str(files.video))
    check_frame_rate(reader, spec.native_fps)
    needed = spec.ticks_per_tubelet + spec.stride * (spec.tubelet_size - 1) + 1
    if reader.num_frames < needed:
        raise LabelError(
            f"{files.video}: too short: two tubelets (one action) need {needed} frames, found {reader.num_frames}"
        )
    reader.check_even(spec.native_fps)
    if reader.num_frames > MOST_TICKS:
        raise LabelError(
            f"{files.video}: too long: the builder reads logs of at most {MOST_TICKS} ticks, found "
            f"{reader.num_frames} frames; cut the video"
        )
    version = recorder_version_of(str(files.log))
    if version in GUI_MOUSE_SCALE and "gui_open" in labeller.settings["action_space"]:
        raise LabelError(
            f"{files.log}: in a folder {version!r} the builder multiplies mouse movement in GUIs by "
            f"{GUI_MOUSE_SCALE[version]}, the head tells it as it was after that; choose an --output without the "
            "version"
        )
    return reader


def _summary(header: dict[str, Any]) -> dict[str, Any]:
    return {k: header[k] for k in ("ticks", "unsure_ticks", "actions", "pitch_range")}


def _steps(labeller: Labeller, part: Part) -> Iterator[tuple[np.ndarray, list[float], float | None, bool]]:
    """Actions in order: `(38,)`, confidences by column, the lowest (None without any), whether it is unsure."""
    slot = None
    for record in part.records():
        for values, told, slots in zip(record["actions"], record["confidence"], record["slots"], strict=True):
            action, confidences = np.array(values), told
            if slots:
                slot = labeller.choose_slot(slots, slot)
                confidences = [*told, slots[slot]]
            if slot is not None:
                action[COLUMN["hotbar.0"] + slot] = 1
            if not slots:  # the head does not tell it: it follows from the number keys, from the first one on
                pressed = np.flatnonzero(action[[COLUMN[key] for key in NUMBER_KEYS]])
                slot = int(pressed[-1]) if len(pressed) else slot
            lowest = min((confidences[i] for i in labeller.counted), default=None)
            yield action, confidences, lowest, lowest is not None and lowest < labeller.min_confidence


def _count(labeller: Labeller, part: Part, num_frames: int) -> dict[str, Any]:
    per_action, actions, unsure, pitch, lowest, highest = labeller.spec.ticks_per_tubelet, 0, 0, 0.0, 0.0, 0.0
    for action, _, _, is_unsure in _steps(labeller, part):
        actions, unsure = actions + 1, unsure + is_unsure
        pitch += action[COLUMN["pitch_delta"]]
        lowest, highest = min(lowest, pitch), max(highest, pitch)
    # Beyond the start of the last tubelet nothing can be told.
    unsure_ticks = per_action * unsure + num_frames - per_action * actions
    pitch_range = [round(lowest, 3), round(highest, 3)]
    return {"ticks": num_frames, "unsure_ticks": unsure_ticks, "actions": actions, "pitch_range": pitch_range}


def _lines(labeller: Labeller, part: Part, num_frames: int, header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The log, a line a frame."""
    ticks = labeller.spec.ticks_per_tubelet
    # The first frame's view is not known: degrees count from it, and the pitch has no limit.
    log = VPTLog((0.0, 0.0), ticks_per_step=ticks, whole_mouse=True, clamp_pitch=False)
    marks: list[dict[str, Any]] = []

    def marked(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for line in lines:
            first = {HEADER: header} if line["tick"] == 0 else {}
            yield first | line | (marks[0] if marks else {"confidence": None, "unsure": True})
        if lines and marks:
            del marks[0]  # a step's lines come together

    for action, _, lowest, unsure in _steps(labeller, part):
        lines = log.add(action)
        yield from marked(lines)
        marks.append({"confidence": None if lowest is None else round(lowest, 4), "unsure": unsure})
    yield from marked(log.finish())
    yield from marked(log.idle(num_frames - log.ticks))


def _write_confidence(labeller: Labeller, part: Part, path: Path) -> None:
    fields = [("tick", pyarrow.int32()), ("confidence", pyarrow.float32()), ("unsure", pyarrow.bool_())]
    schema = pyarrow.schema(fields + [(column, pyarrow.float32()) for column in labeller.columns])
    rows: list[dict[str, Any]] = []
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            rows.clear()

        for step, (_, confidences, lowest, unsure) in enumerate(_steps(labeller, part)):
            row = {"tick": step * labeller.spec.ticks_per_tubelet, "confidence": lowest, "unsure": unsure}
            rows.append(row | dict(zip(labeller.columns, confidences, strict=True)))
            if len(rows) == ROWS_AT_ONCE:
                flush()
        flush()
