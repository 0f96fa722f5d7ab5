"""What a new model starts from: sizes by name (`--model_config`), encoder, predictor (`--init_predictor`)."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedConfig, VJEPA2Config

from ..actions_vjepa2_ac import resolve_action_space
from ..configuration_encoder_vjepa2_ac import EncoderFields
from ..configuration_vjepa2_ac import VJEPA2ACConfig
from ..convert_vjepa2_ac_to_hf import RELEASED
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..records import tensors_of

# "vitl16": V-JEPA 2's ViT-L/16 at 256 pixels with the V-JEPA 2-AC predictor (24 layers, width 1024, 16 heads).
# "vitg16": V-JEPA 2's ViT-g/16 with the same predictor, as V-JEPA 2-AC has it (arXiv 2506.09985, section 3);
# sizes as in transformers' conversion of the official weights (facebook/vjepa2-vitg-fpc64-256).
# "tiny": trains in minutes on two CPU cores; chosen by the experiments in docs/LOG.md. "tiny-32px" has the same 4 x 4
# tokens over fewer pixels, "tiny-fine" 8 x 8 tokens.
# "vitb16-v21" to "vitG16-v21": the encoders of V-JEPA 2.1 (384 pixels), with the same predictor.
_V21_FILES = {
    "vitb16-v21": "vjepa2_1_vitb_dist_vitG_384",
    "vitl16-v21": "vjepa2_1_vitl_dist_vitG_384",
    "vitg16-v21": "vjepa2_1_vitg_384",
    "vitG16-v21": "vjepa2_1_vitG_384",
}
_TINY_ENCODER = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "frames_per_clip": 16}
_TINY_PREDICTOR = {"pred_hidden_size": 128, "pred_num_hidden_layers": 3, "pred_num_attention_heads": 4}
PRESETS: dict[str, dict[str, Any]] = {
    "vitl16": {},
    "vitg16": {"encoder_config": RELEASED["vitg"].encoder_fields()},
    **{name: {"encoder_config": RELEASED[file].encoder_fields()} for name, file in _V21_FILES.items()},
    "tiny": {"encoder_config": {"crop_size": 64, "patch_size": 16, **_TINY_ENCODER}, **_TINY_PREDICTOR},
    "tiny-32px": {"encoder_config": {"crop_size": 32, "patch_size": 8, **_TINY_ENCODER}, **_TINY_PREDICTOR},
    "tiny-fine": {"encoder_config": {"crop_size": 64, "patch_size": 8, **_TINY_ENCODER}, **_TINY_PREDICTOR},
}

# Those of V-JEPA 2.1 are in no repository that transformers reads: folders that the converter has left.
DEFAULT_ENCODERS = {
    "vitl16": "facebook/vjepa2-vitl-fpc64-256",
    "vitg16": "facebook/vjepa2-vitg-fpc64-256",
    **{name: f"encoders/{file}" for name, file in _V21_FILES.items()},
}


def check_encoder(encoder: str) -> None:
    """Raise a ValueError where an encoder is a folder by default and that folder is not there, with how to make it."""
    file = Path(encoder).name
    if encoder.startswith("encoders/") and file in _V21_FILES.values() and not Path(encoder).is_dir():
        raise ValueError(
            f"--encoder {encoder}: no such folder. Get https://dl.fbaipublicfiles.com/vjepa2/{file}.pt and convert it: "
            f"python -m vjepa_ac_hf.convert_vjepa2_ac_to_hf --checkpoint {file}.pt --output {encoder}; or name "
            "another folder, or 'random' for random weights"
        )


def build_config(name_or_file: str, **overrides: Any) -> VJEPA2ACConfig:
    """Configuration of a preset, of a saved model, or of a file of `VJEPA2ACConfig`'s fields
    (docs/model-config.md).

    Overrides of None are ignored. Without an `action_space` here or in the file it is vpt-13. Sizes of the predictor
    that a file leaves out follow its encoder's, up to those of V-JEPA 2-AC (`_fill_in_predictor`).

    Raises:
        ValueError: neither a preset nor a file, no JSON, fields that are unknown, on the wrong level or contradict each
            other, or another action space than the file's.
    """
    values, is_written_by_hand = dict(PRESETS.get(name_or_file, {})), False
    if name_or_file not in PRESETS:
        path = Path(name_or_file)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"--model_config {name_or_file}: neither one of {sorted(PRESETS)} nor a file")
        values = _read(path)
        is_written_by_hand = "transformers_version" not in values
        if is_written_by_hand:
            _check_levels(path, values)
        _check_action_space(path, values, overrides.get("action_space"))
    values.update({k: v for k, v in overrides.items() if v is not None})
    if values.get("action_space") is None:
        values["action_space"] = "vpt-13"
    values.pop("action_dim", None)
    if is_written_by_hand:
        encoder = values.get("encoder_config") or {}
        _fill_in_predictor(values, VJEPA2Config(**encoder) if isinstance(encoder, dict) else encoder)
    return VJEPA2ACConfig(**values)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("encoder_config", {}), dict):
        raise ValueError(f"{path}: expected an object with fields of the model, and with one in encoder_config")
    return values


def _check_levels(path: Path, values: dict[str, Any]) -> None:
    """Refuse fields of the encoder beside those of the model, and the other way round, saying where they belong."""
    models = VJEPA2ACConfig.own_fields()
    encoders = {field.name for kind in (VJEPA2Config, EncoderFields) for field in fields(kind)}
    for key in values:
        if key in encoders and key not in models and not hasattr(PreTrainedConfig, key):
            raise ValueError(f'{path}: {key!r} is the encoder\'s: write it as {{"encoder_config": {{"{key}": ...}}}}')
    for key in values.get("encoder_config", {}):
        # VJEPA2Config has fields for a predictor too, that of pretraining, which is not used.
        if key in models and (key.startswith("pred_") or key not in encoders):
            raise ValueError(f"{path}: encoder_config: {key!r} is the model's: write it beside encoder_config")


def _fill_in_predictor(values: dict[str, Any], encoder: VJEPA2Config) -> None:
    """Width and depth that are not given: the encoder's, at most 1024 and 24.

    Those are V-JEPA 2-AC's (arXiv 2506.09985, section 3). Heads that are not given are the encoder's where both are as
    wide, else of 64 dimensions or more.
    """
    width = values.setdefault("pred_hidden_size", min(encoder.hidden_size, 1024))
    values.setdefault("pred_num_hidden_layers", min(encoder.num_hidden_layers, 24))
    if isinstance(width, int):
        heads = next(n for n in range(max(width // 64, 1), 0, -1) if width % n == 0)
        heads = encoder.num_attention_heads if width == encoder.hidden_size else heads
        values.setdefault("pred_num_attention_heads", heads)


def _check_action_space(path: Path, values: dict[str, Any], wanted: str | list[str] | None) -> None:
    found = values.get("action_space")
    if found is None or wanted is None:
        return
    found, wanted = resolve_action_space(found), resolve_action_space(wanted)
    if found != wanted:
        differing = [c for c in found + wanted if (c in found) != (c in wanted)] or ["their order"]
        raise ValueError(
            f"--action_space has {len(wanted)} columns, the model of {path} has {len(found)} (differing: "
            f"{', '.join(differing)}): leave out --action_space, or take another --model_config"
        )


# What a robot's actions and states are embedded by says nothing about other actions and states.
_NEW = ("action_embed.", "state_embed.")
_SAME = (
    *("pred_hidden_size", "pred_num_hidden_layers", "pred_num_attention_heads", "pred_mlp_ratio", "layer_norm_eps"),
    *("feature_size", "grid", "normalize_features"),
)


def check_initial_predictor(config: VJEPA2ACConfig, folder: Path) -> None:
    """Raise a ValueError where a saved model's predictor does not fit a configuration, before any weights are read."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"--init_predictor {folder}: lacks config.json; expected a folder with a saved VJEPA2ACModel")
    saved = VJEPA2ACConfig.from_pretrained(folder)
    for name in _SAME:
        found, wanted = getattr(saved, name), getattr(config, name)
        if found != wanted:
            raise ValueError(f"--init_predictor {folder}: its {name} is {found}, the model's is {wanted}")


def init_predictor(model: VJEPA2ACModel, folder: Path) -> None:
    """Give a new model the blocks, norms and frame projections of a saved one; its action and state layers stay new.

    Raises:
        ValueError: another geometry (`check_initial_predictor`), or weights that are missing.
    """
    check_initial_predictor(cast(VJEPA2ACConfig, model.config), folder)
    tensors = (named for file in sorted(folder.glob("*.safetensors")) for named in tensors_of(file))
    found = {n.removeprefix("predictor."): t for n, t in tensors if n.startswith("predictor.")}
    wanted = [n for n in model.predictor.state_dict() if not n.startswith(_NEW)]
    missing = [n for n in wanted if n not in found]
    if missing:
        told = f"{len(missing)} of {len(wanted)} weights are missing, such as predictor.{missing[0]}"
        raise ValueError(f"--init_predictor {folder}: {told}")
    model.predictor.load_state_dict({n: found[n] for n in wanted}, strict=False)
