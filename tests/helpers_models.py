"""Small models of tests, their configurations, and how a process is kept from seeing this package."""

from pathlib import Path

import numpy as np
import torch
from test_modeling import tiny_model
from transformers import VJEPA2Config

from vjepa_ac_hf import ACTION_COLUMNS, ActionStatistics, VJEPA2ACConfig, VJEPA2ACModel, VJEPA2ACProcessor

# The beginning of a program that cannot import this package: what is saved must load by itself.
WITHOUT_PACKAGE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vjepa_ac_hf":
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocked())
"""


def responsive_model(action_space: list[str], steps: int, width: int, **kwargs) -> VJEPA2ACModel:
    """4 tokens a step, and weights larger than the usual 0.02: actions move features by more than rounding does."""
    torch.manual_seed(0)
    encoder = VJEPA2Config(
        crop_size=32,
        patch_size=16,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    sizes = dict(
        encoder_config=encoder,
        action_space=action_space,
        pred_hidden_size=24,
        pred_num_hidden_layers=2,
        pred_num_attention_heads=2,
        frames_per_clip=2 * steps,
        initializer_range=0.3,
    )
    return VJEPA2ACModel(VJEPA2ACConfig(**{**sizes, **kwargs})).eval()


def golden_config(sizes: dict) -> VJEPA2ACConfig:
    """Configuration of a predictor in tests/golden, from the sizes in the file's metadata."""
    return VJEPA2ACConfig(
        encoder_config=VJEPA2Config(
            crop_size=sizes["crop_size"],
            patch_size=sizes["patch_size"],
            hidden_size=sizes["hidden_size"],
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
        action_dim=sizes["action_dim"],
        state_dim=sizes["state_dim"],
        pred_hidden_size=sizes["pred_hidden_size"],
        pred_num_hidden_layers=sizes["pred_num_hidden_layers"],
        pred_num_attention_heads=sizes["pred_num_attention_heads"],
        pred_mlp_ratio=sizes["mlp_ratio"],
        frames_per_clip=2 * sizes["num_tubelets"],
        auto_steps=sizes["auto_steps"],
        loss_type={1: "l1", 2: "mse"}[sizes["loss_exponent"]],
        layer_norm_eps=sizes["layer_norm_eps"],
        normalize_features=sizes["normalize"],
    )


def save_world(folder: Path) -> Path:
    """A tiny model over vpt-13 with its processor, as programs load them."""
    tiny_model(action_space="vpt-13", action_dim=None).save_pretrained(folder)
    actions = np.random.default_rng(0).normal(size=(50, len(ACTION_COLUMNS)))
    statistics = ActionStatistics().update(actions)
    VJEPA2ACProcessor(resolution=32, action_statistics=statistics.to_dict()).save_pretrained(folder)
    return folder
