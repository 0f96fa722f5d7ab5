"""Action-conditioned V-JEPA 2 world models from VPT recordings, in the Hugging Face ecosystem.

Importing registers the model with transformers' Auto classes and the builder `vpt_tubelets` with datasets.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .actions_vjepa2_ac import ACTION_COLUMNS, ACTION_SPACES, ActionStatistics, resolve_action_space
from .configuration_vjepa2_ac import VJEPA2ACConfig
from .data.vpt_tubelets import register as _register_builder
from .modeling_vjepa2_ac import VJEPA2ACModel, VJEPA2ACOutput
from .processing_vjepa2_ac import VJEPA2ACProcessor

__version__ = "0.1.0"

AutoConfig.register(VJEPA2ACConfig.model_type, VJEPA2ACConfig, exist_ok=True)
AutoModel.register(VJEPA2ACConfig, VJEPA2ACModel, exist_ok=True)
AutoProcessor.register(VJEPA2ACConfig, VJEPA2ACProcessor, exist_ok=True)
_register_builder()

__all__ = [
    "ACTION_COLUMNS",
    "ACTION_SPACES",
    "ActionStatistics",
    "VJEPA2ACConfig",
    "VJEPA2ACModel",
    "VJEPA2ACOutput",
    "VJEPA2ACProcessor",
    "resolve_action_space",
]
