"""Configurations of the heads over an action-conditioned V-JEPA 2 model (docs/applications.md).

Shipped to the Hub with the models: imports the standard library and its siblings only.
"""

import math
from typing import Any

from .actions_vjepa2_ac import CONTINUOUS_COLUMNS, ActionStatistics
from .configuration_vjepa2_ac import VJEPA2ACConfig, fits

FEATURE_SOURCES = ("encoder", "predictor")
# What a world model's configuration says of itself.
NOT_THE_HEADS = ("model_type", "architectures", "auto_map", "id2label", "label2id", "problem_type")
HOTBAR_COLUMNS = tuple(f"hotbar.{i}" for i in range(9))


class VJEPA2ACHeadConfig(VJEPA2ACConfig):
    """What all heads share, beside the fields of `VJEPA2ACConfig` (a world model's configuration can be loaded as one).

    Args:
        features_from: "encoder", or "predictor": what the world model expects of the next step, at every step, from the
            steps up to it, without being told actions or states (docs/applications.md).
        freeze_encoder: whether the world model under the head stays as it is; False trains it too.
        head_hidden_size: width W of the head.
        head_num_hidden_layers: transformer layers of the head.
        head_num_attention_heads: heads of its attention and of its token matching; divides `head_hidden_size`.
    """

    features_from: str = "encoder"
    freeze_encoder: bool = True
    head_hidden_size: int = 128
    head_num_hidden_layers: int = 2
    head_num_attention_heads: int = 4

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; a world model's configuration gives a new head's, with default fields."""
        if config_dict.get("model_type") == VJEPA2ACConfig.model_type:
            config_dict = {k: v for k, v in config_dict.items() if k not in NOT_THE_HEADS}
        return super().from_dict(config_dict, **kwargs)

    def check(self) -> None:
        super().check()
        if self.features_from not in FEATURE_SOURCES:
            raise ValueError(f"features_from must be one of {FEATURE_SOURCES}, found {self.features_from!r}")
        for name in ("head_hidden_size", "head_num_hidden_layers", "head_num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, found {getattr(self, name)!r}")
        if self.head_hidden_size % self.head_num_attention_heads:
            raise ValueError(
                f"head_hidden_size {self.head_hidden_size} is not a multiple of head_num_attention_heads "
                f"{self.head_num_attention_heads}"
            )


class VJEPA2ACActionHeadConfig(VJEPA2ACHeadConfig):
    """What the heads that tell actions share. `action_space` must name the columns.

    Args:
        action_statistics: `ActionStatistics.to_dict()` that the labels were normalised with; `decode_actions` needs it.
        pos_weight: for each binary column of the action space, how much more a pressed key counts in the loss than one
            that is not (`binary_pos_weight` of the training split); None: 1 for all.
        key_thresholds: logits above which a key is told to be pressed, a number for each binary column; with
            anticipation a list of such lists, one for each of the actions told. None: 0 for all.
    """

    action_statistics: dict | None = None
    pos_weight: list[float] | None = None
    key_thresholds: list | None = None

    def check(self) -> None:
        super().check()
        if self.action_space is None:
            raise ValueError(
                f"a head that tells actions needs their names: action_space is None, with action_dim {self.action_dim}"
            )
        if self.action_statistics is not None:
            ActionStatistics.from_dict(self.action_statistics)
        if self.pos_weight is not None:
            columns = self.binary_columns
            if len(self.pos_weight) != len(columns):
                raise ValueError(
                    f"pos_weight has {len(self.pos_weight)} numbers, the action space has {len(columns)} binary "
                    f"columns: {columns}"
                )
            if not all(fits(w, float) and math.isfinite(w) and w > 0 for w in self.pos_weight):
                raise ValueError(f"pos_weight must be finite numbers above 0, found {self.pos_weight}")
        if self.key_thresholds is not None:
            self._check_thresholds(self.key_thresholds)

    def _check_thresholds(self, thresholds: list) -> None:
        """A number for each binary column."""
        columns = self.binary_columns
        if len(thresholds) != len(columns) or not all(fits(t, float) and math.isfinite(t) for t in thresholds):
            raise ValueError(
                f"key_thresholds must be {len(columns)} finite numbers, for the binary columns {columns}, found "
                f"{thresholds}"
            )

    @property
    def continuous_columns(self) -> list[str]:
        """Columns told by regression."""
        return [c for c in self.action_space or [] if c in CONTINUOUS_COLUMNS]

    @property
    def slot_columns(self) -> list[str]:
        """The nine hotbar columns, told as one choice, where the action space holds them all; else none."""
        columns = [c for c in self.action_space or [] if c in HOTBAR_COLUMNS]
        return columns if len(columns) == len(HOTBAR_COLUMNS) else []

    @property
    def binary_columns(self) -> list[str]:
        """All others: columns told by a yes or no each."""
        others = {*CONTINUOUS_COLUMNS, *self.slot_columns}
        return [c for c in self.action_space or [] if c not in others]


class VJEPA2ACInverseDynamicsConfig(VJEPA2ACActionHeadConfig):
    """Configuration of `VJEPA2ACForInverseDynamics`; see `VJEPA2ACActionHeadConfig`."""

    model_type = "vjepa2_ac_inverse_dynamics"


class VJEPA2ACActionAnticipationConfig(VJEPA2ACActionHeadConfig):
    """Configuration of `VJEPA2ACForActionAnticipation`; see `VJEPA2ACActionHeadConfig`.

    Args:
        anticipation_steps: how many actions are told at every step, the one under way first.
        use_past_actions: whether the head is given the actions before the step, beside the features.
        use_states: whether it is given the states up to the step.
    """

    model_type = "vjepa2_ac_action_anticipation"

    anticipation_steps: int = 2
    use_past_actions: bool = False
    use_states: bool = False

    def check(self) -> None:
        super().check()
        if not 1 <= self.anticipation_steps < self.num_steps:
            raise ValueError(
                f"anticipation_steps must be between 1 and {self.num_steps - 1}, the actions of a clip of "
                f"{self.num_steps} tubelets, found {self.anticipation_steps!r}"
            )

    def _check_thresholds(self, thresholds: list) -> None:
        """A list for each action told."""
        if len(thresholds) != self.anticipation_steps or not all(isinstance(t, list) for t in thresholds):
            raise ValueError(
                f"key_thresholds must be {self.anticipation_steps} lists, one for each action told, found {thresholds}"
            )
        for one in thresholds:
            super()._check_thresholds(one)


class VJEPA2ACVideoClassificationConfig(VJEPA2ACHeadConfig):
    """Configuration of `VJEPA2ACForVideoClassification`: classes as everywhere in transformers.

    `id2label`, `label2id` name the classes (`num_labels` alone numbers them); `problem_type` is
    "single_label_classification" or "multi_label_classification" (None: told from the first labels' type).
    """

    model_type = "vjepa2_ac_video_classification"

    def check(self) -> None:
        super().check()
        names: dict[Any, Any] = {**(self.id2label or {})}
        ids: dict[Any, Any] = {**(self.label2id or {})}
        if sorted(names) != list(range(len(names))) or not names:
            raise ValueError(f"id2label must map 0, 1, ... without a gap to class names, found the ids {sorted(names)}")
        expected = {name: i for i, name in names.items()}
        if len(expected) != len(names):
            raise ValueError(f"id2label names a class twice: {names}")
        if set(ids) <= {f"LABEL_{i}" for i in range(max(len(ids), 2))}:
            ids = self.label2id = expected  # not given: transformers' own names
        if ids != expected:
            missing = sorted(set(expected) - set(ids))
            raise ValueError(
                f"label2id {ids} is not the inverse of id2label {names}" + (f": it misses {missing}" if missing else "")
            )
        if self.problem_type not in (None, "single_label_classification", "multi_label_classification"):
            raise ValueError(
                "problem_type must be single_label_classification, multi_label_classification or None, found "
                f"{self.problem_type!r}"
            )


class VJEPA2ACFrameDecodingConfig(VJEPA2ACHeadConfig):
    """Configuration of `VJEPA2ACForFrameDecoding`: `features_from` is "encoder" and `freeze_encoder` true, always.

    Args:
        head_hidden_size: all that a token can say of its patch; wider than other heads'.
    """

    model_type = "vjepa2_ac_frame_decoding"

    head_hidden_size: int = 256

    def check(self) -> None:
        super().check()
        for name, expected in (("features_from", "encoder"), ("freeze_encoder", True)):
            if getattr(self, name) != expected:
                raise ValueError(
                    f"{name} of a decoder must be {expected!r}, found {getattr(self, name)!r}: it shows what the world "
                    "model believes, and is not trained through it (imagined features are given to it as `features`)"
                )


class VJEPA2ACTemporalDistanceConfig(VJEPA2ACHeadConfig):
    """Configuration of `VJEPA2ACForTemporalDistance`.

    Args:
        training_clips: how many clips it has learnt from; None: never trained, and no distance is to be asked of it.
    """

    model_type = "vjepa2_ac_temporal_distance"

    training_clips: int | None = None


for _config in (
    VJEPA2ACInverseDynamicsConfig,
    VJEPA2ACActionAnticipationConfig,
    VJEPA2ACVideoClassificationConfig,
    VJEPA2ACFrameDecodingConfig,
    VJEPA2ACTemporalDistanceConfig,
):
    _config.register_for_auto_class()

__all__ = [
    "VJEPA2ACActionAnticipationConfig",
    "VJEPA2ACActionHeadConfig",
    "VJEPA2ACFrameDecodingConfig",
    "VJEPA2ACHeadConfig",
    "VJEPA2ACInverseDynamicsConfig",
    "VJEPA2ACTemporalDistanceConfig",
    "VJEPA2ACVideoClassificationConfig",
]
