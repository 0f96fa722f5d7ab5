"""Convert official V-JEPA 2 and V-JEPA 2-AC checkpoints (github.com/facebookresearch/vjepa2) to this package's model.

    python -m vjepa_ac_hf.convert_vjepa2_ac_to_hf --checkpoint vjepa2-ac-vitg.pt --output DIR [--encoder_heads 22]

Official files are `{"encoder": ..., "predictor": ..., "target_encoder": ...}` pickles of tensors; they are read with
`weights_only=True`. The target encoder (moving average of the encoder) is the one to use where present.
"""

import argparse
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="official .pt file")
    parser.add_argument("--output", required=True, help="folder for config.json and model.safetensors")
    parser.add_argument("--crop_size", type=int, default=256, help="frame size in pixels")
    parser.add_argument("--encoder_heads", type=int, default=16, help="attention heads of the encoder (ViT-g: 22)")
    parser.add_argument("--predictor_heads", type=int, default=16, help="attention heads of the predictor")
    parser.add_argument("--frames_per_clip", type=int, default=16)
    parser.add_argument("--loss_type", choices=("l1", "mse"), default="l1")
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import torch
from torch import Tensor
from transformers import VJEPA2Config

from .configuration_vjepa2_ac import VJEPA2ACConfig
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
    (r"^blocks\.(\d+)\.attn\.proj\.", r"layer.\1.attention.proj."),
    (r"^blocks\.(\d+)\.", r"layer.\1."),
    (r"^norm\.", "layernorm."),
]


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
    """Official encoder -> `VJEPA2ACModel.encoder`: names mapped, fused query, key and value projections split.

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


def infer_config(
    encoder: Mapping[str, Tensor],
    predictor: Mapping[str, Tensor],
    *,
    crop_size: int,
    encoder_heads: int,
    predictor_heads: int,
    **config_kwargs: Any,
) -> VJEPA2ACConfig:
    """Configuration whose sizes are read from converted state dicts; what tensors do not show is given."""
    patches = encoder["embeddings.patch_embeddings.proj.weight"]
    width, channels, tubelet_size, patch_size = patches.shape[:4]
    encoder_config = VJEPA2Config(
        crop_size=crop_size,
        patch_size=patch_size,
        tubelet_size=tubelet_size,
        in_chans=channels,
        hidden_size=width,
        num_hidden_layers=1 + max(int(k.split(".")[1]) for k in encoder if k.startswith("layer.")),
        num_attention_heads=encoder_heads,
        mlp_ratio=encoder["layer.0.mlp.fc1.weight"].shape[0] / width,
    )
    pred_width = predictor["frame_embed.weight"].shape[0]
    return VJEPA2ACConfig(
        encoder_config=encoder_config,
        action_dim=predictor["action_embed.weight"].shape[1],
        state_dim=predictor["state_embed.weight"].shape[1],
        pred_hidden_size=pred_width,
        pred_num_hidden_layers=1 + max(int(k.split(".")[1]) for k in predictor if k.startswith("layers.")),
        pred_num_attention_heads=predictor_heads,
        pred_mlp_ratio=predictor["layers.0.mlp.fc1.weight"].shape[0] / pred_width,
        **config_kwargs,
    )


def convert_checkpoint(
    checkpoint_path: str | Path,
    *,
    crop_size: int = 256,
    encoder_heads: int = 16,
    predictor_heads: int = 16,
    frames_per_clip: int = 16,
    loss_type: str = "l1",
) -> VJEPA2ACModel:
    """Model with the weights of an official `.pt` file.

    Raises:
        ValueError: the file lacks an encoder or a predictor, or holds unknown parameters.
    """
    checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    encoder_key = "target_encoder" if "target_encoder" in checkpoint else "encoder"
    missing = [k for k in (encoder_key, "predictor") if k not in checkpoint]
    if missing:
        raise ValueError(f"{checkpoint_path}: lacks {missing}, found {sorted(checkpoint)}")
    encoder = convert_encoder_state_dict(checkpoint[encoder_key])
    predictor = convert_predictor_state_dict(checkpoint["predictor"])
    config = infer_config(
        encoder,
        predictor,
        crop_size=crop_size,
        encoder_heads=encoder_heads,
        predictor_heads=predictor_heads,
        frames_per_clip=frames_per_clip,
        loss_type=loss_type,
    )
    with torch.device("meta"):
        model = VJEPA2ACModel(config)
    model.encoder.load_state_dict(encoder, strict=True, assign=True)
    model.predictor.load_state_dict(predictor, strict=True, assign=True)
    model.encoder.freeze()
    logger.info("converted %s with the %s's weights", checkpoint_path, encoder_key)
    return model


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO)
    model = convert_checkpoint(
        arguments.checkpoint,
        crop_size=arguments.crop_size,
        encoder_heads=arguments.encoder_heads,
        predictor_heads=arguments.predictor_heads,
        frames_per_clip=arguments.frames_per_clip,
        loss_type=arguments.loss_type,
    )
    model.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
