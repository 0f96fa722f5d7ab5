"""What V-JEPA 2.1 (arXiv 2603.14482) adds to the encoder's `VJEPA2Config`, and which frames and features follow.

The names are those of transformers' pull request 45497 ("Add V-JEPA 2.1 inference support"), so that its class can take
the place of `modeling_encoder_vjepa2_ac.py` without new checkpoints. A `VJEPA2Config` takes further fields as they are:
those that are not set have the defaults below, which are V-JEPA 2's. Shipped to the Hub with the model: imports the
standard library only, so that programs can read sizes from their command line at once.
"""

from dataclasses import dataclass, fields
from typing import Any

# Fields of the pull request that concern V-JEPA 2.1's own predictor, which is not used here: kept as they are.
OTHER_FIELDS = ("num_distillation_outputs", "teacher_embed_dim", "use_context_projection")
# Names that the pull request had before its review.
EARLIER_FIELDS = ("img_temporal_dim_size", "n_output_distillation", "return_all_tokens")


@dataclass(frozen=True)
class EncoderFields:
    """Fields of an encoder's configuration that V-JEPA 2 does not have.

    Args:
        use_rope_interleave: both members of a rotated pair turn by one angle; V-JEPA 2's turn by different ones.
        use_modality_embeddings: one learnt vector is added to all tokens of a video, another to those of a picture.
        interpolate_rope: rows and columns are scaled to the range 0..15 of a grid of 16 x 16, whatever the grid.
        use_image_patch_embedder: a single frame has patches of its own; without, it is repeated to a tubelet.
        hierarchical_layers: numbers of the tapped layers, the last one being the encoder's last, each with a norm of
            its own; None: one norm at the end.
    """

    use_rope_interleave: bool = False
    use_modality_embeddings: bool = False
    interpolate_rope: bool = False
    use_image_patch_embedder: bool = False
    hierarchical_layers: tuple[int, ...] | None = None

    @classmethod
    def of(cls, config: Any) -> "EncoderFields":
        """Those of a `VJEPA2Config`.

        Raises:
            ValueError: a value of another type, or layers that the encoder does not have; names both.
        """
        values: dict[str, Any] = {f.name: getattr(config, f.name, f.default) for f in fields(cls)}
        earlier = getattr(config, "img_temporal_dim_size", None)
        if earlier not in (None, 1):
            raise ValueError(f"encoder_config.img_temporal_dim_size must be 1 or null, found {earlier!r}")
        values["use_image_patch_embedder"] = values["use_image_patch_embedder"] or earlier == 1
        for name, value in values.items():
            if name != "hierarchical_layers" and not isinstance(value, bool):
                raise ValueError(f"encoder_config.{name} must be true or false, found {value!r}")
        taps, depth = values["hierarchical_layers"], config.num_hidden_layers
        if taps is not None:
            taps = values["hierarchical_layers"] = tuple(taps)
            if not taps or list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] != depth - 1:
                raise ValueError(
                    f"encoder_config.hierarchical_layers must rise to the last of {depth} layers, {depth - 1}, found "
                    f"{list(taps)}"
                )
        return cls(**values)

    @property
    def is_v21(self) -> bool:
        """Whether anything differs from V-JEPA 2."""
        return self != EncoderFields()


Resolution = int | tuple[int, int]  # the side of square frames in pixels, or height and width


def as_resolution(size: object, name: str = "resolution") -> Resolution:
    """A size in pixels, a side or a pair (height, width), in the one form that it is compared and shown in.

    Raises:
        ValueError: anything else.
    """
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(type(s) is int and s > 0 for s in sides):
        raise ValueError(f"{name} must be a side in pixels or a pair (height, width), found {size!r}")
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def frame_shape(resolution: Resolution) -> tuple[int, int]:
    """Height and width."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def parse_resolution(text: str) -> Resolution:
    """A size from a command line: `256`, or height and width as in `256,448`.

    Raises:
        ValueError: anything else.
    """
    sides = text.split(",")
    if not all(side.strip().isdecimal() for side in sides):
        raise ValueError(f"a resolution is a number of pixels or HEIGHT,WIDTH, found {text!r}")
    return as_resolution(int(text) if len(sides) == 1 else [int(side) for side in sides])


def show_resolution(resolution: Resolution) -> str:
    """As `parse_resolution` takes it."""
    return ",".join(map(str, frame_shape(resolution))) if isinstance(resolution, tuple) else str(resolution)
