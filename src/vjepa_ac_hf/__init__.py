"""Action-conditioned V-JEPA 2 world models from VPT recordings, in the Hugging Face ecosystem.

Importing registers the model with transformers' Auto classes and the builder `vpt_tubelets` with datasets.
"""

from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification, AutoProcessor

from .actions_vjepa2_ac import ACTION_COLUMNS, ACTION_SPACES, ActionStatistics, resolve_action_space
from .building.vpt_tubelets import register as _register_builder
from .configuration_heads_vjepa2_ac import (
    VJEPA2ACActionAnticipationConfig,
    VJEPA2ACInverseDynamicsConfig,
    VJEPA2ACVideoClassificationConfig,
)
from .configuration_vjepa2_ac import VJEPA2ACConfig
from .modeling_heads_vjepa2_ac import (
    VJEPA2ACForActionAnticipation,
    VJEPA2ACForInverseDynamics,
    VJEPA2ACForVideoClassification,
)
from .modeling_vjepa2_ac import VJEPA2ACModel, VJEPA2ACOutput
from .processing_vjepa2_ac import VJEPA2ACProcessor

__version__ = "0.1.0"

AutoConfig.register(VJEPA2ACConfig.model_type, VJEPA2ACConfig, exist_ok=True)
AutoModel.register(VJEPA2ACConfig, VJEPA2ACModel, exist_ok=True)
AutoProcessor.register(VJEPA2ACConfig, VJEPA2ACProcessor, exist_ok=True)
for _head in (VJEPA2ACForInverseDynamics, VJEPA2ACForActionAnticipation, VJEPA2ACForVideoClassification):
    _auto = AutoModelForVideoClassification if _head is VJEPA2ACForVideoClassification else AutoModel
    AutoConfig.register(_head.config_class.model_type, _head.config_class, exist_ok=True)
    _auto.register(_head.config_class, _head, exist_ok=True)
    AutoProcessor.register(_head.config_class, VJEPA2ACProcessor, exist_ok=True)
_register_builder()

__all__ = [
    "ACTION_COLUMNS",
    "ACTION_SPACES",
    "ActionStatistics",
    "VJEPA2ACActionAnticipationConfig",
    "VJEPA2ACConfig",
    "VJEPA2ACForActionAnticipation",
    "VJEPA2ACForInverseDynamics",
    "VJEPA2ACForVideoClassification",
    "VJEPA2ACInverseDynamicsConfig",
    "VJEPA2ACModel",
    "VJEPA2ACOutput",
    "VJEPA2ACProcessor",
    "VJEPA2ACVideoClassificationConfig",
    "resolve_action_space",
]
