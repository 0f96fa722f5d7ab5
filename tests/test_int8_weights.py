"""int8 weights by torchao, as docs/model.md shows them."""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from test_common_model_tests import install
from test_modeling import random_inputs, tiny_model
from test_ways_of_transformers import HEADS, head_inputs, tiny_head

from vjepa_ac_hf import (
    VJEPA2ACForFrameDecoding,
    VJEPA2ACForTemporalDistance,
    VJEPA2ACForVideoClassification,
    VJEPA2ACModel,
)

OUTPUTS = {
    VJEPA2ACModel: "predicted_features",
    VJEPA2ACForVideoClassification: "logits",
    VJEPA2ACForFrameDecoding: "frames",
    VJEPA2ACForTemporalDistance: "distances",
}


@pytest.mark.parametrize("cls", [VJEPA2ACModel, *HEADS])
def test_int8_weights_from_loading_to_loading_again(tmp_path, cls):
    """torchao's int8 weights on the CPU: off from float32 by the rounding to a row's 255 steps and no more; saved, they
    load again."""
    pytest.importorskip("torchao", reason="torchao is not installed: the slow test below installs it for itself")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = tiny_model() if cls is VJEPA2ACModel else tiny_head(cls)
    inputs = random_inputs() if cls is VJEPA2ACModel else head_inputs(cls)
    inputs["pixel_values_videos"] = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    del inputs["features"]
    model.save_pretrained(tmp_path / "float32")
    quantised = cls.from_pretrained(tmp_path / "float32", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    quantised.save_pretrained(tmp_path / "int8")
    again = cls.from_pretrained(tmp_path / "int8")
    rounded = copy.deepcopy(model)
    exact = []
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear):
            kept = quantised.get_submodule(name).weight.data
            weight = kept.dequantize() if "Int8" in type(kept).__name__ else kept
            step = module.weight.data.abs().amax(dim=1, keepdim=True) / 127
            assert ((weight - module.weight.data).abs() <= 0.51 * step).all(), name
            exact += [name] if torch.equal(weight, module.weight.data) else []
            module.weight.data = weight
    assert len(exact) <= 1, exact  # transformers leaves the last layer of some models as it is
    name = OUTPUTS.get(cls, "continuous")
    with torch.no_grad():
        expected, found, repeated, by_hand = (m.eval()(**inputs)[name] for m in (model, quantised, again, rounded))
    error = (found - expected).norm()
    assert 1e-4 < error / expected.norm() < 0.05
    assert (found - by_hand).norm() < 0.01 * error
    assert torch.equal(found, repeated)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="the tests above have run")
def test_with_torchao(tmp_path):
    """In a folder of its own: beside transformers, torchao is imported by every program, and says so on stderr."""
    install("torchao", tmp_path)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "loading_again"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path[:1]]), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0 and f"{1 + len(HEADS)} passed" in result.stdout, result.stdout[-4000:]
