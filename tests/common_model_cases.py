"""The models for transformers' common model tests; run by tests/test_common_model_tests.py beside a copy of them."""

import unittest
import unittest.mock

import torch
from transformers import PreTrainedConfig, VJEPA2Config

from vjepa_ac_hf import (
    VJEPA2ACActionAnticipationConfig,
    VJEPA2ACConfig,
    VJEPA2ACForActionAnticipation,
    VJEPA2ACForInverseDynamics,
    VJEPA2ACForVideoClassification,
    VJEPA2ACInverseDynamicsConfig,
    VJEPA2ACModel,
    VJEPA2ACVideoClassificationConfig,
)

from .test_modeling_common import ModelTesterMixin

B, T, N, D, A, S = 3, 4, 4, 32, 13, 2


class Tester:
    """What the common tests ask for: a tiny configuration and inputs, sizes, and whether to train."""

    batch_size, seq_length, is_training = B, T * N, True
    hidden_size, num_hidden_layers, num_attention_heads = D, 2, 2

    def __init__(self, parent: unittest.TestCase, config_class: type[PreTrainedConfig]):
        self.parent, self.config_class = parent, config_class

    def prepare_config_and_inputs_for_common(self) -> tuple:
        encoder = VJEPA2Config(
            crop_size=32,
            patch_size=16,
            frames_per_clip=2 * T,
            hidden_size=D,
            num_hidden_layers=2,
            num_attention_heads=2,
            pred_hidden_size=32,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
            mlp_ratio=2,
        )
        fields = {"pred_hidden_size": 32, "pred_num_hidden_layers": 2, "pred_num_attention_heads": 2}
        fields |= {"frames_per_clip": 2 * T, "action_space": "vpt-13", "pred_mlp_ratio": 2}
        if self.config_class is not VJEPA2ACConfig:
            fields |= {"head_hidden_size": 32, "head_num_hidden_layers": 2, "head_num_attention_heads": 2}
            fields |= {"freeze_encoder": False}
        config = self.config_class(encoder_config=encoder, **fields)
        inputs = {"pixel_values_videos": torch.randn(B, 2 * T, 3, 32, 32)}
        if self.config_class is VJEPA2ACConfig:
            inputs |= {"actions": torch.randn(B, T - 1, A), "states": torch.randn(B, T, S)}
        return config, inputs


class Common(ModelTesterMixin):
    config_class: type[PreTrainedConfig]
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True
    has_attentions = False  # attentions and hidden states are refused (docs/model.md)
    test_torch_exportable = False  # tests/test_ways_of_transformers.py exports, with a dynamic batch

    def setUp(self) -> None:
        self.model_tester = Tester(self, self.config_class)

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = dict(inputs_dict)
        torch.manual_seed(0)
        if return_labels and model_class is VJEPA2ACForVideoClassification:
            inputs["labels"] = torch.arange(B) % 2
        elif return_labels and model_class is not VJEPA2ACModel:
            inputs["labels"] = torch.cat([torch.randn(B, T - 1, 4), (torch.rand(B, T - 1, 9) < 0.5).float()], dim=-1)
        return inputs

    def test_batching_equivalence(self) -> None:
        """As there, but for the hidden states, which it asks for."""
        setter = VJEPA2ACConfig.__setattr__
        with unittest.mock.patch.object(
            VJEPA2ACConfig,
            "__setattr__",
            lambda config, name, value: None if name == "output_hidden_states" else setter(config, name, value),
        ):
            super().test_batching_equivalence()

    def test_model_get_set_embeddings(self) -> None:
        """As transformers' V-JEPA 2 has it: pixels enter through a convolution, which is no table of embeddings."""
        model = self.all_model_classes[0](self.model_tester.prepare_config_and_inputs_for_common()[0])
        self.assertIsInstance(model.get_input_embeddings().proj, torch.nn.Conv3d)
        self.assertIsNone(model.get_output_embeddings())


def leave_out(cases: type, names: list[str], reason: str) -> None:
    for name in names:
        setattr(cases, name, unittest.skip("LEFT OUT: " + reason)(lambda self: None))


# Each of these would fail, by a choice of ours.
leave_out(
    Common,
    ["test_hidden_states_output", "test_retain_grad_hidden_states_attentions", "test_model_outputs_equivalence"],
    "hidden states are refused by name; tests/test_ways_of_transformers.py compares tuples and dictionaries",
)


class ModelTest(Common, unittest.TestCase):
    config_class, all_model_classes = VJEPA2ACConfig, (VJEPA2ACModel,)


class InverseDynamicsTest(Common, unittest.TestCase):
    config_class, all_model_classes = VJEPA2ACInverseDynamicsConfig, (VJEPA2ACForInverseDynamics,)


class ActionAnticipationTest(Common, unittest.TestCase):
    config_class, all_model_classes = VJEPA2ACActionAnticipationConfig, (VJEPA2ACForActionAnticipation,)


class VideoClassificationTest(Common, unittest.TestCase):
    config_class, all_model_classes = VJEPA2ACVideoClassificationConfig, (VJEPA2ACForVideoClassification,)


leave_out(
    ModelTest,
    [f"test_training_gradient_checkpointing{n}" for n in ("", "_use_reentrant_false", "_use_reentrant_true")],
    "the first layer, which they count the runs of, is the encoder's: frozen, so it has nothing to recompute; "
    "tests/test_ways_of_transformers.py compares gradients and counts",
)
