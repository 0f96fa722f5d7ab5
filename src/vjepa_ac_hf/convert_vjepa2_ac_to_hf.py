"""Convert official checkpoints of V-JEPA 2, 2.1 and 2-AC (github.com/facebookresearch/vjepa2) for this package.

    python -m vjepa_ac_hf.convert_vjepa2_ac_to_hf --checkpoint vjepa2-ac-vitg.pt --output DIR

A file of V-JEPA 2-AC becomes a `VJEPA2ACModel`; one of V-JEPA 2 or 2.1 an encoder's folder, for `--encoder DIR` and
`VJEPA2ACModel.from_pretrained_encoder(DIR)`. Official files are pickles of tensors, `{"encoder": ..., "predictor": ...,
"target_encoder" or "ema_encoder": ...}`; they are read with `weights_only=True`, from the disk as they are needed. The
moving average of the encoder is the one to use where present. docs/model.md has every released file.
"""

import argparse
import logging
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .console import Parser, made

FAMILIES = ("2", "2.1", "2-ac")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="official .pt file")
    parser.add_argument("--output", required=True, help="folder for config.json and model.safetensors")
    parser.add_argument("--family", choices=FAMILIES, help="refuse a file of another (default: any)")
    parser.add_argument("--encoder_only", action="store_true", help="of a V-JEPA 2-AC file: leave out the predictor")
    parser.add_argument("--crop_size", type=int, help="frame size in pixels (default: the released file's)")
    parser.add_argument("--encoder_heads", type=int, help="attention heads of the encoder (default: by its sizes)")
    parser.add_argument("--predictor_heads", type=int, help="those of the predictor (default: by its sizes)")
    parser.add_argument("--frames_per_clip", type=int, default=16)
    parser.add_argument("--loss_type", choices=("l1", "mse"), default="l1")
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import torch
from torch import Tensor
from transformers import PreTrainedModel, VJEPA2Config

from .configuration_vjepa2_ac import VJEPA2ACConfig
from .modeling_encoder_vjepa2_ac import VJEPA21EncoderModel
from .modeling_vjepa2_ac import VJEPA2ACModel

logger = logging.getLogger(__name__)

_PREFIXES = ("module.", "backbone.")

_PREDICTOR_NAMES = [
    (r"^predictor_embed\.", "frame_embed."),
    (r"^action_encoder\.", "action_embed."),
    (r"^state_encoder\.", "state_embed."),
    (r"^predictor_blocks\.(\d+)\.attn\.", r"layers.\1.attention."),
    (r"^predictor_blocks\.(\d+)\.", r"layers.\1."),
    (r"^predictor_norm\.", "norm."),
    (r"^predictor_proj\.", "head."),
]
_ENCODER_NAMES = [
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.proj."),
    (r"^patch_embed_img\.proj\.", "embeddings.patch_embeddings_img.proj."),
    (r"^(img|video)_mod_embed$", r"embeddings.\1_mod_embed"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"layer.\1.attention.proj."),
    (r"^blocks\.(\d+)\.", r"layer.\1."),
    (r"^norm\.", "layernorm."),
    (r"^norms_block\.", "norms_block."),
]
_ENCODER_KEYS = ("ema_encoder", "target_encoder", "encoder")  # the first that a file has


@dataclass(frozen=True)
class Released:
    """An encoder in a released file: its family, sizes, and what no tensor's shape tells (heads, frame size)."""

    family: str  # of `FAMILIES`
    width: int
    depth: int
    heads: int
    crop_size: int
    mlp_ratio: float = 4.0
    hierarchical_layers: tuple[int, ...] | None = None

    def encoder_fields(self) -> dict[str, Any]:
        """Fields of the encoder's `VJEPA2Config`."""
        fields: dict[str, Any] = {"hidden_size": self.width, "num_hidden_layers": self.depth}
        fields |= {"num_attention_heads": self.heads, "mlp_ratio": self.mlp_ratio, "crop_size": self.crop_size}
        return fields | (v21_fields(self.hierarchical_layers) if self.hierarchical_layers else {})


def v21_fields(hierarchical_layers: tuple[int, ...]) -> dict[str, Any]:
    """Fields of `VJEPA2Config` that make an encoder one of V-JEPA 2.1."""
    names = ("use_rope_interleave", "use_modality_embeddings", "interpolate_rope", "use_image_patch_embedder")
    return {**dict.fromkeys(names, True), "hierarchical_layers": list(hierarchical_layers)}


# By file, as README.md and src/hub/backbones.py of facebookresearch/vjepa2 (16de6c8) name them; sizes by the vit_* that
# they are built with (src/models/vision_transformer.py, app/vjepa_2_1/models/vision_transformer.py).
RELEASED = {
    "vitl": Released("2", 1024, 24, 16, 256),
    "vith": Released("2", 1280, 32, 16, 256),
    "vitg": Released("2", 1408, 40, 22, 256, 48 / 11),
    "vitg-384": Released("2", 1408, 40, 22, 384, 48 / 11),
    "vjepa2-ac-vitg": Released("2-ac", 1408, 40, 22, 256, 48 / 11),
    "vjepa2_1_vitb_dist_vitG_384": Released("2.1", 768, 12, 12, 384, 4.0, (2, 5, 8, 11)),
    "vjepa2_1_vitl_dist_vitG_384": Released("2.1", 1024, 24, 16, 384, 4.0, (5, 11, 17, 23)),
    "vjepa2_1_vitg_384": Released("2.1", 1408, 40, 22, 384, 48 / 11, (9, 19, 29, 39)),
    "vjepa2_1_vitG_384": Released("2.1", 1664, 48, 26, 384, 64 / 13, (11, 23, 37, 47)),
}
_RELEASED_PREDICTOR_HEADS = {(1024, 24): 16}  # by width and depth: vjepa2-ac-vitg's


def _strip_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _rename(name: str, patterns: list[tuple[str, str]], kind: str) -> str:
    for pattern, replacement in patterns:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise ValueError(f"{name!r} is not a parameter of an official V-JEPA 2 {kind}")


def convert_predictor_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official action-conditioned predictor -> `VJEPA2ACModel.predictor`.

    Prefixes `module.` and `backbone.` are accepted; `extrinsics_encoder.*`, which V-JEPA 2-AC does not use, is dropped.

    Raises:
        ValueError: a name the official predictor does not have.
    """
    converted = {}
    for full_name, tensor in state_dict.items():
        name = _strip_prefixes(full_name)
        if not name.startswith("extrinsics_encoder."):
            converted[_rename(name, _PREDICTOR_NAMES, "action-conditioned predictor")] = tensor
    return converted


def convert_encoder_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official encoder of V-JEPA 2 or 2.1 -> `VJEPA2ACModel.encoder`: names mapped, fused projections split.

    Raises:
        ValueError: a name the official encoder does not have.
    """
    converted = {}
    for full_name, tensor in state_dict.items():
        name = _strip_prefixes(full_name)
        fused = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if fused:
            layer, kind = fused.groups()
            for part, value in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                converted[f"layer.{layer}.attention.{part}.{kind}"] = value.clone()
        elif name == "pos_embed":
            raise ValueError("'pos_embed' found: an encoder without rotary embedding (V-JEPA 1) cannot be converted")
        else:
            converted[_rename(name, _ENCODER_NAMES, "encoder")] = tensor
    return converted


@dataclass(frozen=True)
class OfficialFile:
    """What a file holds that is used, with our names.

    Args:
        path: of the file.
        family: of `FAMILIES`.
        encoder: of `convert_encoder_state_dict`.
        predictor: of `convert_predictor_state_dict`; None but for V-JEPA 2-AC.
    """

    path: str | Path
    family: str
    encoder: dict[str, Tensor]
    predictor: dict[str, Tensor] | None


def read_checkpoint(path: str | Path, family: str | None = None) -> OfficialFile:
    """Tensors of an official file, mapped from the disk and not read, but for fused projections, which are split.

    Raises:
        ValueError: no encoder, unknown parameters, or a file of another family than is asked for.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    key = next((k for k in _ENCODER_KEYS if k in checkpoint), None)
    if key is None:
        raise ValueError(f"{path}: lacks {_ENCODER_KEYS[-1]!r}, found {sorted(checkpoint)}")
    predictor = checkpoint.get("predictor", {})
    is_conditioned = any(_strip_prefixes(k).startswith("action_encoder.") for k in predictor)
    is_v21 = any(_strip_prefixes(k).startswith("norms_block.") for k in checkpoint[key])
    found = "2-ac" if is_conditioned else "2.1" if is_v21 else "2"
    if family not in (None, found):
        raise ValueError(f"{path}: expected a file of V-JEPA {family}, found one of V-JEPA {found}")
    logger.info("%s: V-JEPA %s, the encoder's weights are those of %r", path, found, key)
    try:
        encoder = convert_encoder_state_dict(checkpoint[key])
        return OfficialFile(path, found, encoder, convert_predictor_state_dict(predictor) if is_conditioned else None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def infer_encoder_config(
    file: OfficialFile, crop_size: int | None = None, encoder_heads: int | None = None
) -> VJEPA2Config:
    """Configuration of a file's encoder; what is None follows from the released encoder of its sizes (`RELEASED`).

    Raises:
        ValueError: sizes that no released file has, or that two have with other frames, and no values given.
    """
    patches = file.encoder["embeddings.patch_embeddings.proj.weight"]
    width, channels, tubelet_size, patch_size = patches.shape[:4]
    depth, levels = _depth(file.encoder, "layer."), sum(k.startswith("norms_block.") for k in file.encoder) // 2
    same = {k: r for k, r in RELEASED.items() if (r.family, r.width, r.depth) == (file.family, width, depth)}
    sizes = f"its encoder's sizes (V-JEPA {file.family}, width {width}, depth {depth})"
    if not same and (encoder_heads is None or crop_size is None):
        raise ValueError(f"{file.path}: no released file has {sizes}: give --encoder_heads and --crop_size")
    known = same.get(Path(file.path).stem)
    if crop_size is None and known is None and len({r.crop_size for r in same.values()}) > 1:
        found = ", ".join(f"{k} ({r.crop_size} pixels)" for k, r in same.items())
        raise ValueError(f"{file.path}: {sizes} are those of {found}: give --crop_size")
    known = known or next(iter(same.values()), None)
    fields: dict[str, Any] = {}
    if levels:
        fields = v21_fields((known and known.hierarchical_layers) or _even_taps(file.path, depth, levels))
    return VJEPA2Config(
        crop_size=crop_size or known.crop_size,
        patch_size=patch_size,
        tubelet_size=tubelet_size,
        in_chans=channels,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=encoder_heads or known.heads,
        mlp_ratio=file.encoder["layer.0.mlp.fc1.weight"].shape[0] / width,
        **fields,
    )


def _depth(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(k.split(".")[1]) for k in state_dict if k.startswith(prefix))


def _even_taps(path: str | Path, depth: int, levels: int) -> tuple[int, ...]:
    """Tapped layers of an encoder that was not released: evenly spaced, as those of the released ViT-B, L and g."""
    if depth % levels:
        raise ValueError(f"{path}: {levels} norms (norms_block) cannot be spread evenly over {depth} layers")
    return tuple(range(depth // levels - 1, depth, depth // levels))


def _build_world_model(file: OfficialFile, encoder: VJEPA2Config, heads: int | None, **fields: Any) -> VJEPA2ACModel:
    predictor = file.predictor
    assert predictor is not None
    (width, feature_size), depth = predictor["frame_embed.weight"].shape, _depth(predictor, "layers.")
    if feature_size != encoder.hidden_size:
        raise ValueError(
            f"{file.path}: the predictor takes width {feature_size}, the encoder gives {encoder.hidden_size}"
        )
    heads = heads or _RELEASED_PREDICTOR_HEADS.get((width, depth))
    if heads is None:
        raise ValueError(
            f"{file.path}: no released predictor has width {width} and depth {depth}: give --predictor_heads"
        )
    config = VJEPA2ACConfig(
        encoder_config=encoder,
        action_dim=predictor["action_embed.weight"].shape[1],
        state_dim=predictor["state_embed.weight"].shape[1],
        pred_hidden_size=width,
        pred_num_hidden_layers=depth,
        pred_num_attention_heads=heads,
        pred_mlp_ratio=predictor["layers.0.mlp.fc1.weight"].shape[0] / width,
        **fields,
    )
    with torch.device("meta"):
        model = VJEPA2ACModel(config)
    model.encoder.load_state_dict(file.encoder, strict=True, assign=True)
    model.predictor.load_state_dict(predictor, strict=True, assign=True)
    model.encoder.freeze()
    return model


def _build_encoder(file: OfficialFile, config: VJEPA2Config) -> VJEPA21EncoderModel:
    patch_size = file.encoder["embeddings.patch_embeddings.proj.weight"].shape[-1]
    if config.crop_size % patch_size:
        raise ValueError(f"{file.path}: crop_size {config.crop_size} is not a multiple of patch_size {patch_size}")
    with torch.device("meta"):
        model = VJEPA21EncoderModel(config)
    model.encoder.load_state_dict(file.encoder, strict=True, assign=True)
    return model


def convert_checkpoint(
    checkpoint_path: str | Path,
    *,
    crop_size: int | None = None,
    encoder_heads: int | None = None,
    predictor_heads: int | None = None,
    frames_per_clip: int = 16,
    loss_type: str = "l1",
) -> VJEPA2ACModel:
    """Model with the weights of an official V-JEPA 2-AC file; what is None follows from the released file (`RELEASED`).

    Raises:
        ValueError: the file lacks an encoder or an action-conditioned predictor, holds unknown parameters, or sizes
            that no released file has.
    """
    file = read_checkpoint(checkpoint_path)
    if file.predictor is None:
        raise ValueError(
            f"{file.path}: lacks an action-conditioned predictor: its encoder alone can be converted "
            "(convert_encoder_checkpoint)"
        )
    encoder = infer_encoder_config(file, crop_size, encoder_heads)
    fields = {"frames_per_clip": frames_per_clip, "loss_type": loss_type}
    return _build_world_model(file, encoder, predictor_heads, **fields)


def convert_encoder_checkpoint(
    checkpoint_path: str | Path, *, crop_size: int | None = None, encoder_heads: int | None = None
) -> VJEPA21EncoderModel:
    """The encoder of an official file; what is None follows from the released file (`RELEASED`).

    Raises:
        ValueError: the file lacks an encoder, holds unknown parameters, or sizes that no released file has.
    """
    file = read_checkpoint(checkpoint_path)
    return _build_encoder(file, infer_encoder_config(file, crop_size, encoder_heads))


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO)
    file = read_checkpoint(arguments.checkpoint, arguments.family)
    encoder = infer_encoder_config(file, arguments.crop_size, arguments.encoder_heads)
    if file.predictor is None or arguments.encoder_only:
        model: PreTrainedModel = _build_encoder(file, encoder)
    else:
        fields = {"frames_per_clip": arguments.frames_per_clip, "loss_type": arguments.loss_type}
        model = _build_world_model(file, encoder, arguments.predictor_heads, **fields)
    model.save_pretrained(arguments.output)
    sizes = {name: f"{sum(p.numel() for p in part.parameters()):,}" for name, part in model.named_children()}
    sys.stdout.write(made("parameters", arguments.output, sizes) + "\n")


if __name__ == "__main__":
    main()
