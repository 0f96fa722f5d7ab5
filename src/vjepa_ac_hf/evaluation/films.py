"""Short films inside a page: what is real beside what is imagined, as an animated WebP."""

import io
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Films of smaller frames are kept as they are; larger ones are made this high at most, and not quite exactly kept.
EXACT_HEIGHT, LARGEST_HEIGHT = 64, 192
GAP = 2  # white pixels between panels, at every `EXACT_HEIGHT` of height
CONTEXT, IMAGINED = (0, 114, 178), (230, 159, 0)  # the strip below: blue while the context is seen, then orange


def film_webp(panels: Mapping[str, Tensor], context_frames: int, fps: float) -> bytes:
    """An animated WebP of panels beside each other, for ever.

    Args:
        panels: of each `(frames, Y, X, 3)`, uint8, in the order from left to right.
        context_frames: how many of the frames were seen, not imagined.
        fps: frames a second.
    """
    from PIL import Image  # Matplotlib's own dependency: where there are figures there are films

    images = [Image.fromarray(image) for image in film_frames(panels, context_frames)]
    is_exact = next(iter(panels.values())).shape[1] <= EXACT_HEIGHT
    buffer = io.BytesIO()
    options = {"lossless": True} if is_exact else {"quality": 80}
    images[0].save(
        buffer, "WEBP", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0, **options
    )
    return buffer.getvalue()


def film_frames(panels: Mapping[str, Tensor], context_frames: int) -> np.ndarray:
    """The film's pictures, `(frames, height, width, 3)`, uint8: panels with gaps, and a strip below."""
    parts = []
    for panel in panels.values():
        if panel.shape[1] > LARGEST_HEIGHT:
            size = (LARGEST_HEIGHT, round(panel.shape[2] * LARGEST_HEIGHT / panel.shape[1]))
            small = F.interpolate(panel.movedim(3, 1).float(), size=size, mode="bilinear", antialias=True)
            panel = small.round().clamp(0, 255).byte().movedim(1, 3)
        frames, height = panel.shape[:2]
        gap = max(GAP * height // EXACT_HEIGHT, 1)
        parts += [torch.full((frames, height, gap, 3), 255, dtype=torch.uint8), panel]
    film = torch.cat(parts[1:], dim=2)
    strip = film.new_tensor([CONTEXT if i < context_frames else IMAGINED for i in range(frames)])
    return torch.cat([film, strip[:, None, None].expand(-1, gap, film.shape[2], -1)], dim=1).numpy()
