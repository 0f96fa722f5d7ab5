"""Action-conditioned V-JEPA 2 world models from VPT recordings, in the Hugging Face ecosystem.

Importing registers the model with transformers' Auto classes and the builder `vpt_tubelets` with datasets, without
importing either (registration.py); the names below are imported when they are asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register as _register

if TYPE_CHECKING:
    from .actions_vjepa2_ac import ACTION_COLUMNS, ACTION_SPACES, ActionStatistics, resolve_action_space
    from .configuration_heads_vjepa2_ac import (
        VJEPA2ACActionAnticipationConfig,
        VJEPA2ACFrameDecodingConfig,
        VJEPA2ACInverseDynamicsConfig,
        VJEPA2ACTemporalDistanceConfig,
        VJEPA2ACVideoClassificationConfig,
    )
    from .configuration_vjepa2_ac import VJEPA2ACConfig
    from .modeling_heads_decoding_vjepa2_ac import VJEPA2ACForFrameDecoding
    from .modeling_heads_distance_vjepa2_ac import VJEPA2ACForTemporalDistance
    from .modeling_heads_vjepa2_ac import (
        VJEPA2ACForActionAnticipation,
        VJEPA2ACForInverseDynamics,
        VJEPA2ACForVideoClassification,
    )
    from .modeling_vjepa2_ac import VJEPA2ACModel, VJEPA2ACOutput
    from .processing_vjepa2_ac import VJEPA2ACProcessor

__version__ = "0.2.0"
__all__ = [
    "ACTION_COLUMNS",
    "ACTION_SPACES",
    "ActionStatistics",
    "VJEPA2ACActionAnticipationConfig",
    "VJEPA2ACConfig",
    "VJEPA2ACForActionAnticipation",
    "VJEPA2ACForFrameDecoding",
    "VJEPA2ACForInverseDynamics",
    "VJEPA2ACForTemporalDistance",
    "VJEPA2ACForVideoClassification",
    "VJEPA2ACFrameDecodingConfig",
    "VJEPA2ACInverseDynamicsConfig",
    "VJEPA2ACModel",
    "VJEPA2ACOutput",
    "VJEPA2ACProcessor",
    "VJEPA2ACTemporalDistanceConfig",
    "VJEPA2ACVideoClassificationConfig",
    "resolve_action_space",
]
# Files that travel to the Hub, each after those that it imports: a name is the first one's that has it.
_FILES = (
    *("actions", "configuration", "configuration_heads", "processing"),
    *("modeling", "modeling_heads", "modeling_heads_decoding", "modeling_heads_distance"),
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = next(
        getattr(module, name)
        for file in _FILES
        if hasattr(module := import_module(f".{file}_vjepa2_ac", __name__), name)
    )
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register()
