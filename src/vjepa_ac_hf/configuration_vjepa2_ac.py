"""Configuration of the action-conditioned V-JEPA 2 model (V-JEPA 2-AC, arXiv 2506.09985, section 3).

Shipped to the Hub with the model: imports the standard library, transformers and its siblings only.
"""

import difflib
from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig, VJEPA2Config

from .actions_vjepa2_ac import resolve_action_space

# What transformers itself passes beside a configuration's own fields.
_FRAMEWORK_KEYS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "torch_dtype",
    "transformers_version",
}


def _refuse_unknown_keys(keys: list[str], known: list[str], where: str, only_near_misses: bool = False) -> None:
    for key in keys:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85 if only_near_misses else 0.6)
        if near or not only_near_misses:
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys are {sorted(known)}"
            raise ValueError(f"{where}: unknown key {key!r}{hint}")


class VJEPA2ACConfig(PreTrainedConfig):
    """Sizes and meanings of a `VJEPA2ACModel`. The defaults give a ViT-L/16 encoder and the V-JEPA 2-AC predictor.

    Args:
        encoder_config: `VJEPA2Config` (or dict) of the frozen encoder; its `crop_size` and `patch_size` fix the grid.
        action_dim: columns A of an action.
        state_dim: columns S of a state (2: yaw and pitch, normalised).
        action_space: names of the action columns in order (docs/data.md), or None where the actions are not VPT's.
        pred_hidden_size: width E of the predictor.
        pred_num_hidden_layers: depth of the predictor.
        pred_num_attention_heads: heads of the predictor; divides `pred_hidden_size`.
        pred_mlp_ratio: width of the predictor's MLPs over `pred_hidden_size`.
        frames_per_clip: frames of a clip; over the encoder's `tubelet_size` it gives the steps T.
        encoding: "tubelet" (each tubelet alone: no feature has seen the future) or "clip" (all frames at once).
        normalize_features: layer norm without parameters over features and predictions (eps 1e-5).
        loss_type: "mse", or "l1" (the V-JEPA 2-AC recipe).
        auto_steps: steps of the rollout loss.
        layer_norm_eps: epsilon of the predictor's LayerNorms.
        initializer_range: standard deviation of the truncated normal initialisation.

    Raises:
        ValueError: an unknown key (the nearest known one is named), or values that contradict each other.
    """

    model_type = "vjepa2_ac"
    sub_configs_defaults: ClassVar[dict] = {"encoder_config": VJEPA2Config}

    encoder_config: Any = None
    action_dim: int | None = None
    state_dim: int = 2
    action_space: list[str] | None = None
    pred_hidden_size: int = 1024
    pred_num_hidden_layers: int = 24
    pred_num_attention_heads: int = 16
    pred_mlp_ratio: float | int = 4.0
    frames_per_clip: int = 16
    encoding: str = "tubelet"
    normalize_features: bool = True
    loss_type: str = "mse"
    auto_steps: int = 2
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        known = [f.name for f in fields(self)]
        unknown = [k for k in kwargs if k not in _FRAMEWORK_KEYS and not k.startswith("_")]
        _refuse_unknown_keys(unknown, known, type(self).__name__)
        if isinstance(self.encoder_config, dict):
            # Official encoder configurations carry retired keys, so only what looks like a slip is refused here.
            encoder_keys = [f.name for f in fields(VJEPA2Config)]
            unknown = [k for k in self.encoder_config if k not in encoder_keys and k not in _FRAMEWORK_KEYS]
            _refuse_unknown_keys(unknown, encoder_keys, "encoder_config", only_near_misses=True)
        super().__post_init__(**kwargs)
        if self.action_space is not None:
            self.action_space = resolve_action_space(self.action_space)
        if self.action_dim is None:
            self.action_dim = 13 if self.action_space is None else len(self.action_space)
        self.check()

    def check(self) -> None:
        """Raise a ValueError where fields contradict each other."""
        encoder = self.encoder_config
        choices = {
            "encoding": ("tubelet", "clip"),
            "loss_type": ("mse", "l1"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, found {getattr(self, name)!r}")
        if self.action_space is not None and len(self.action_space) != self.action_dim:
            raise ValueError(
                f"action_dim is {self.action_dim}, but action_space lists {len(self.action_space)} columns: "
                f"{self.action_space}"
            )
        positive = ("action_dim", "state_dim", "pred_hidden_size", "pred_num_hidden_layers", "auto_steps")
        for name in (*positive, "pred_num_attention_heads", "frames_per_clip"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, found {getattr(self, name)!r}")
        divisions = [
            (
                "pred_hidden_size",
                self.pred_hidden_size,
                "pred_num_attention_heads",
                self.pred_num_attention_heads,
            ),
            ("frames_per_clip", self.frames_per_clip, "encoder tubelet_size", encoder.tubelet_size),
            ("encoder crop_size", encoder.crop_size, "encoder patch_size", encoder.patch_size),
        ]
        for name, whole, divisor_name, divisor in divisions:
            if not isinstance(divisor, int) or whole % divisor:
                raise ValueError(f"{name} {whole} is not a multiple of {divisor_name} {divisor}")
        if self.num_steps > 1 and self.auto_steps > self.num_steps - 1:
            raise ValueError(
                f"auto_steps {self.auto_steps} is more than the {self.num_steps - 1} predictable steps of a clip of "
                f"{self.num_steps} tubelets"
            )

    @property
    def num_steps(self) -> int:
        """Tubelet steps T of a clip."""
        return self.frames_per_clip // self.encoder_config.tubelet_size

    @property
    def grid_size(self) -> int:
        """Patches along an edge of a frame; N = grid_size ** 2 frame tokens a step."""
        return self.encoder_config.crop_size // self.encoder_config.patch_size


VJEPA2ACConfig.register_for_auto_class()

__all__ = ["VJEPA2ACConfig"]
