"""Pictures of a validation: errors by horizon, and frames and features of a few clips, predicted against true.

They are the report's (docs/evaluation.md). Matplotlib is optional: without it a run has no pictures, and says so.
"""

import importlib.util
import io
import logging
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from ..evaluation.clips import spread
from ..evaluation.pictures import ClipPictures, picture_clips
from ..evaluation.plots import clip_figure, curves_figure
from ..loading.clips import decode_clip
from ..modeling_heads_decoding_vjepa2_ac import VJEPA2ACForFrameDecoding
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..records import write_file
from .trackers import log_images
from .validation import ValidationSet, evaluating

logger = logging.getLogger(__name__)

PICTURED_CLIPS = 2


def check_pictures(wanted: bool | None, report_to: str) -> bool:
    """Whether a run makes pictures: as `wanted`; None: with a tracker, and if matplotlib is there.

    Raises:
        ImportError: they were asked for, but matplotlib is not installed.
    """
    if not (report_to if wanted is None else wanted):
        return False
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    message = "validation pictures need matplotlib: pip install 'vjepa-ac-hf[report]'"
    if wanted:
        raise ImportError(f"--log_pictures: {message}")
    logger.warning("%s; this run makes none (--no-log_pictures leaves out this warning)", message)
    return False


def log_pictures(
    model: VJEPA2ACModel,
    clips: ValidationSet,
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    decoder: VJEPA2ACForFrameDecoding | None = None,
) -> None:
    """Write `pictures/step-XXXXXXXX.png` of the last validation (`clips.horizons`), and log its parts as images.

    Frames are drawn by the decoder (`load_decoder`), or the nearest real ones stand in. The main process does all; a
    sharded model must be whole meanwhile (`whole_parameters`).
    """
    if not accelerator.is_main_process:
        return
    shown = _picture_clips(model, clips, accelerator, decoder)
    seconds_per_step = clips.processor.tubelet_size / clips.processor.fps
    images = {"pictures/errors_by_horizon": _render(curves_figure(clips.horizons, seconds_per_step))}
    for number, pictures in enumerate(shown):
        for name, colours in (("", False), ("_colours", True)):
            figure = clip_figure(pictures, colours)
            figure.suptitle(pictures.title, fontsize=8)
            images[f"pictures/clip_{number}{name}"] = _render(figure)
    folder = output_dir / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"step-{step:08d}.png", _png(list(images.values())))
    log_images(accelerator, images, step)


def _picture_clips(
    model: VJEPA2ACModel, clips: ValidationSet, accelerator: Accelerator, decoder: VJEPA2ACForFrameDecoding | None
) -> list[ClipPictures]:
    """The first and the last clip, and evenly spaced ones between them."""
    shown = spread(len(clips), PICTURED_CLIPS)
    processor, names = clips.processor, clips.records.names
    rows = clips.source.select(shown)
    videos = [decode_clip(r["video"], names[i], processor.frames_per_clip) for r, i in zip(rows, shown, strict=True)]
    frames = processor.prepare_frames(videos)
    with torch.no_grad(), evaluating(model), accelerator.autocast():
        features = model.encode(processor.normalize_pixels(frames).to(accelerator.device))
        return picture_clips(
            model,
            features.float(),
            frames,
            shown=shown,
            others=clips.partners[0, shown].tolist(),
            names=names,
            actions=clips.actions,
            raw_actions=clips.records.actions,
            states=clips.states,
            context_steps=clips.context_steps,
            horizon=clips.horizon,
            integrate_states=clips.integrate_states,
            decoder=decoder,
        )


def _render(figure) -> np.ndarray:
    """A matplotlib figure as `(Y, X, 3)` uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _png(images: list[np.ndarray]) -> bytes:
    """A file of images below each other, filled up with white to the right."""
    from matplotlib.image import imsave

    width = max(image.shape[1] for image in images)
    padded = [np.pad(i, ((0, 0), (0, width - i.shape[1]), (0, 0)), constant_values=255) for i in images]
    buffer = io.BytesIO()
    imsave(buffer, np.concatenate(padded), format="png")
    return buffer.getvalue()
