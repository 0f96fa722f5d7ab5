"""`--init_predictor`: a predictor starts from that of a saved model, such as a converted V-JEPA 2-AC robot model."""

from pathlib import Path
from typing import cast

from safetensors import safe_open
from torch import Tensor

from ..configuration_vjepa2_ac import VJEPA2ACConfig
from ..modeling_vjepa2_ac import VJEPA2ACModel

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
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = [n for n in tensors.keys() if n.startswith("predictor.")]  # noqa: SIM118 (not a dict)
            found |= {n.removeprefix("predictor."): tensors.get_tensor(n) for n in names}
    wanted = [n for n in model.predictor.state_dict() if not n.startswith(_NEW)]
    missing = [n for n in wanted if n not in found]
    if missing:
        raise ValueError(
            f"--init_predictor {folder}: {len(missing)} of {len(wanted)} weights are missing, such "
            f"as predictor.{missing[0]}"
        )
    model.predictor.load_state_dict({n: found[n] for n in wanted}, strict=False)
