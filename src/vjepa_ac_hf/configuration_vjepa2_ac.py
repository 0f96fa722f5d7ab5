"""Configuration of the action-conditioned V-JEPA 2 model (V-JEPA 2-AC, arXiv 2506.09985, section 3).

Shipped to the Hub with the model: imports the standard library, transformers and its siblings only.
"""

import difflib
from dataclasses import fields
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin

from transformers import PreTrainedConfig, VJEPA2Config

from .actions_vjepa2_ac import resolve_action_space
from .configuration_encoder_vjepa2_ac import (
    EARLIER_FIELDS,
    OTHER_FIELDS,
    EncoderFields,
    Resolution,
    as_resolution,
    frame_shape,
)

# What transformers itself passes or writes beside a configuration's own fields, now or in its 4th version.
_FRAMEWORK_KEYS = {
    *("add_cross_attention", "attn_implementation", "auto_map", "bos_token_id", "cross_attention_hidden_size"),
    *("decoder_start_token_id", "distributed_config", "eos_token_id", "experts_implementation", "finetuning_task"),
    *("gradient_checkpointing", "is_decoder", "model_type", "name_or_path", "num_labels", "output_attentions"),
    *("pad_token_id", "per_layer_config", "prefix", "pruned_heads", "quantization_config", "sep_token_id"),
    *("task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tie_last_hidden_states"),
    *("tie_word_embeddings", "tokenizer_class", "torch_dtype", "torchscript", "transformers_weights"),
    *("use_bfloat16", "use_cache"),
}
# Of a file that transformers has saved, keys this like ours are slips; others are what some version of it has added.
_SAVED_CUTOFF = 0.7
# Of an encoder's configuration: official ones carry retired keys, whose names are like those of today.
_ENCODER_CUTOFF = 0.85


def _refuse_unknown_keys(keys: list[str], known: list[str], where: str, cutoff: float | None = None) -> None:
    """Raise a ValueError for the first key that is unknown; with `cutoff` only for one that resembles a known key."""
    for key in keys:
        near = difflib.get_close_matches(key, known, n=1, cutoff=cutoff or 0.6)
        if near or cutoff is None:
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys are {sorted(known)}"
            raise ValueError(f"{where}: unknown key {key!r}{hint}")


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of the type of a field's annotation; whole numbers are floats too, truth values neither."""
    if isinstance(annotation, UnionType):
        return any(fits(value, kind) for kind in get_args(annotation))
    if annotation is Any:
        return True
    kind = get_origin(annotation) or annotation
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


class VJEPA2ACConfig(PreTrainedConfig):
    """Sizes and meanings of a `VJEPA2ACModel`. The defaults give a ViT-L/16 encoder and the V-JEPA 2-AC predictor.

    Args:
        encoder_config: `VJEPA2Config` (or dict) of the frozen encoder; V-JEPA 2.1 has the fields of `EncoderFields`.
        frame_size: side of the model's frames in pixels, or [height, width]; None: the encoder's `crop_size`, a square.
            With the encoder's `patch_size` it fixes the grid.
        hierarchical_features: features are those of all of the encoder's `hierarchical_layers`, joined on the width.
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
    frame_size: int | list[int] | tuple[int, int] | None = None
    hierarchical_features: bool = False
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

    @classmethod
    def own_fields(cls) -> dict[str, Any]:
        """Names and annotations of the fields that are this model's and not every configuration's of transformers."""
        framework = {f.name for f in fields(PreTrainedConfig)}
        return {f.name: f.type for f in fields(cls) if f.name not in framework}

    def __post_init__(self, **kwargs: Any) -> None:
        known = [f.name for f in fields(self)]
        unknown = [k for k in kwargs if k not in _FRAMEWORK_KEYS and not k.startswith("_")]
        cutoff = None if self.transformers_version is None else _SAVED_CUTOFF
        _refuse_unknown_keys(unknown, known, type(self).__name__, cutoff)
        if isinstance(self.encoder_config, dict):
            encoder_keys = [f.name for f in (*fields(VJEPA2Config), *fields(EncoderFields))]
            encoder_keys += [*OTHER_FIELDS, *EARLIER_FIELDS]
            unknown = [k for k in self.encoder_config if k not in encoder_keys and k not in _FRAMEWORK_KEYS]
            _refuse_unknown_keys(unknown, encoder_keys, "encoder_config", _ENCODER_CUTOFF)
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; fields given beside the dictionary are checked together with the rest of it.

        Raises:
            ValueError: the dictionary describes another kind of model, or what the class's constructor raises.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            classes = ", ".join(config_dict.get("architectures") or ["?"])
            ours = str(found).startswith(VJEPA2ACConfig.model_type)
            kind = "a head over features" if ours else "another kind of model"
            raise ValueError(
                f"this is {kind}, model_type {found!r} (saved by {classes}), not {cls.model_type!r}: load it as "
                f"{classes}, or by AutoModel or AutoModelForVideoClassification"
            )
        own = cls.own_fields()
        unknown = [k for k in kwargs if k not in own and k not in _FRAMEWORK_KEYS and not hasattr(cls, k)]
        _refuse_unknown_keys(unknown, list(own), "loading", cutoff=0.8)
        overrides = {k: kwargs.pop(k) for k in list(kwargs) if k in own}
        encoder, saved = overrides.get("encoder_config"), config_dict.get("encoder_config")
        if isinstance(encoder, dict) and isinstance(saved, dict):
            overrides["encoder_config"] = saved | encoder
        return super().from_dict(config_dict | overrides, **kwargs)

    def check(self) -> None:
        """Resolve the action space, and raise a ValueError where fields are no values of theirs or contradict each
        other. Models call it when they are made, since fields may have been set after the configuration was."""
        if self.action_space is not None:
            self.action_space = resolve_action_space(self.action_space)
        if self.action_dim is None:
            self.action_dim = 13 if self.action_space is None else len(self.action_space)
        for name, annotation in self.own_fields().items():
            if not fits(getattr(self, name), annotation):
                kind = f"of type {getattr(annotation, '__name__', annotation)}"
                kind = "a whole number" if annotation is int else kind
                raise ValueError(f"{name} must be {kind}, found {getattr(self, name)!r}")
        choices = {
            "encoding": ("tubelet", "clip"),
            "loss_type": ("mse", "l1"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, found {getattr(self, name)!r}")
        if self.output_hidden_states or self.output_attentions:
            raise ValueError(
                "output_hidden_states and output_attentions are not computed: hook model.encoder.layer[i] or "
                "model.predictor.layers[i] (docs/model.md)"
            )
        if self.action_space is not None and len(self.action_space) != self.action_dim:
            raise ValueError(
                f"action_dim is {self.action_dim}, but action_space lists {len(self.action_space)} columns: "
                f"{self.action_space}"
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        encoder = self.encoder_config
        positive = ("action_dim", "state_dim", "pred_hidden_size", "pred_num_hidden_layers", "auto_steps")
        for name in (*positive, "pred_num_attention_heads", "frames_per_clip"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, found {getattr(self, name)!r}")
        for name in ("pred_mlp_ratio", "layer_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0, found {getattr(self, name)!r}")
        divisions = [
            (
                "pred_hidden_size",
                self.pred_hidden_size,
                "pred_num_attention_heads",
                self.pred_num_attention_heads,
            ),
            (
                "encoder hidden_size",
                encoder.hidden_size,
                "encoder num_attention_heads",
                encoder.num_attention_heads,
            ),
            ("frames_per_clip", self.frames_per_clip, "encoder tubelet_size", encoder.tubelet_size),
            *((name, side, "encoder patch_size", encoder.patch_size) for name, side in self._named_sides()),
        ]
        for name, whole, divisor_name, divisor in divisions:
            if not isinstance(divisor, int) or whole % divisor:
                raise ValueError(f"{name} {whole} is not a multiple of {divisor_name} {divisor}")
        for name, width, _, heads in divisions[:2]:
            if width // heads < 6 or (width // heads) % 2:
                raise ValueError(
                    f"{name} {width} over {heads} heads gives {width // heads} dimensions a head: rotation about three "
                    "axes needs an even number of at least 6"
                )
        encoder_fields = EncoderFields.of(encoder)
        if encoder_fields.interpolate_rope and min(self.grid) < 2:
            raise ValueError(f"interpolate_rope needs at least 2 x 2 patches, found {self.grid[0]} x {self.grid[1]}")
        if self.hierarchical_features and encoder_fields.hierarchical_layers is None:
            raise ValueError(
                "hierarchical_features is true, but the encoder's hierarchical_layers are None (V-JEPA 2 has none)"
            )
        if self.num_steps > 1 and self.auto_steps > self.num_steps - 1:
            raise ValueError(
                f"auto_steps {self.auto_steps} is more than the {self.num_steps - 1} predictable steps of a clip of "
                f"{self.num_steps} tubelets"
            )

    @property
    def num_steps(self) -> int:
        """Tubelet steps T of a clip."""
        return self.frames_per_clip // self.encoder_config.tubelet_size

    def _named_sides(self) -> list[tuple[str, int]]:
        if self.frame_size is None:
            return [("encoder crop_size", self.encoder_config.crop_size)]
        return list(zip(("frame_size height", "frame_size width"), self.frame_shape, strict=True))

    @property
    def resolution(self) -> Resolution:
        """Side of the model's frames in pixels, or (height, width): what its processor's is."""
        return as_resolution(
            self.encoder_config.crop_size if self.frame_size is None else self.frame_size, "frame_size"
        )

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Height and width of the model's frames in pixels."""
        return frame_shape(self.resolution)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a frame."""
        height, width = self.frame_shape
        return height // self.encoder_config.patch_size, width // self.encoder_config.patch_size

    @property
    def num_tokens(self) -> int:
        """Frame tokens N of a step."""
        return self.grid[0] * self.grid[1]

    @property
    def grid_size(self) -> int:
        """Patches along an edge of a square frame; a ValueError where it is none."""
        if self.grid[0] != self.grid[1]:
            raise ValueError(f"a grid of {self.grid[0]} x {self.grid[1]} patches has no single size: use `grid`")
        return self.grid[0]

    @property
    def feature_levels(self) -> int:
        """How many layers of the encoder a feature is made of."""
        layers = EncoderFields.of(self.encoder_config).hierarchical_layers if self.hierarchical_features else None
        return 1 if layers is None else len(layers)

    @property
    def feature_size(self) -> int:
        """Width D of the features."""
        return self.feature_levels * self.encoder_config.hidden_size


VJEPA2ACConfig.register_for_auto_class()

__all__ = ["VJEPA2ACConfig"]
