"""Action-conditioned V-JEPA 2 world models from VPT recordings, in the Hugging Face ecosystem."""

from .actions_vjepa2_ac import ACTION_COLUMNS, ACTION_SPACES, ActionStatistics, resolve_action_space

__version__ = "0.1.0"
__all__ = ["ACTION_COLUMNS", "ACTION_SPACES", "ActionStatistics", "resolve_action_space"]
