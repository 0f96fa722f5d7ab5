"""Sizes of models by name, for `--model_config`."""

import json
from pathlib import Path
from typing import Any

from ..configuration_vjepa2_ac import VJEPA2ACConfig

# "vitl16": V-JEPA 2's ViT-L/16 at 256 pixels with the V-JEPA 2-AC predictor (24 layers, width 1024, 16 heads).
# "tiny": trains in minutes on two CPU cores; chosen by the experiments in docs/LOG.md.
PRESETS: dict[str, dict[str, Any]] = {
    "vitl16": {},
    "tiny": {
        "encoder_config": {
            "crop_size": 64,
            "patch_size": 16,
            "hidden_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "frames_per_clip": 16,
        },
        "pred_hidden_size": 128,
        "pred_num_hidden_layers": 3,
        "pred_num_attention_heads": 4,
    },
}

DEFAULT_ENCODERS = {"vitl16": "facebook/vjepa2-vitl-fpc64-256"}


def build_config(name_or_file: str, **overrides: Any) -> VJEPA2ACConfig:
    """Configuration of a preset or of a JSON file with fields of `VJEPA2ACConfig`; overrides of None are ignored.

    Raises:
        ValueError: neither a preset nor a file, or fields that are unknown or contradict each other.
    """
    if name_or_file in PRESETS:
        values = dict(PRESETS[name_or_file])
    else:
        path = Path(name_or_file)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"--model_config {name_or_file}: neither one of {sorted(PRESETS)} nor a file")
        values = json.loads(path.read_text())
    values.update({k: v for k, v in overrides.items() if v is not None})
    if values.get("action_space") is not None:
        values.pop("action_dim", None)
    return VJEPA2ACConfig(**values)
