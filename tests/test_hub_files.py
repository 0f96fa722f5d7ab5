"""Files that travel to the Hub: their imports, and loading them where this package cannot be imported."""

import ast
import sys
from pathlib import Path

import pytest
import python_forks
import torch
from helpers_models import WITHOUT_PACKAGE
from test_modeling import random_inputs, tiny_model

import vjepa_ac_hf
from vjepa_ac_hf import VJEPA2ACProcessor

PACKAGE = Path(vjepa_ac_hf.__file__).parent
SHIPPED = sorted(PACKAGE.glob("*_vjepa2_ac.py"))
# Of the world model and its processor; heads take files of their own along (tests/test_heads.py).
WORLD_MODEL = {p.name for p in SHIPPED if "_heads_" not in p.name}
ALLOWED = {"numpy", "torch", "transformers"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_files_import_only_what_is_there_too(path):
    siblings = {p.stem for p in SHIPPED}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name.split(".")[0] for a in node.names]
            assert all(n in ALLOWED or n in sys.stdlib_module_names for n in names), names
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert node.level == 1 and node.module in siblings, ast.unparse(node)
            else:
                root = node.module.split(".")[0]
                assert root in ALLOWED or root in sys.stdlib_module_names, ast.unparse(node)
    # transformers finds imports with a regular expression, in docstrings too
    assert not [line for line in path.read_text().splitlines() if line.strip().startswith("from . import")]


LOAD_ELSEWHERE = (
    WITHOUT_PACKAGE
    + """
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor

folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
case = load_file(sys.argv[2])
with torch.no_grad():
    output = model(features=case["features"], actions=case["actions"], states=case["states"])
assert torch.equal(output.loss, case["loss"]), (output.loss, case["loss"])
assert torch.equal(output.rollout_features, case["rollout"])
assert torch.equal(processor(states=case["raw_states"])["states"], case["prepared_states"])
assert processor.action_statistics["mean"] == [1.0, 2.0, 3.0, 4.0]
assert not any(p.requires_grad for p in model.encoder.parameters())
model.save_pretrained(sys.argv[3])
print("loaded", type(model).__module__.split(".")[0])
"""
)


def test_model_and_processor_load_without_the_package(tmp_path):
    from safetensors.torch import save_file

    model, inputs = tiny_model(), random_inputs()
    statistics = {"columns": ["mouse_dx", "mouse_dy", "yaw_delta", "pitch_delta"], "count": 9}
    processor = VJEPA2ACProcessor(
        resolution=32, action_statistics=statistics | {"mean": [1.0, 2.0, 3.0, 4.0], "std": [1.0] * 4}
    )
    folder = tmp_path / "repository"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert {p.name for p in folder.iterdir()} >= WORLD_MODEL
    raw_states = torch.tensor([[[200.0, 10.0]]])
    with torch.no_grad():
        output = model(**inputs)
    case = {
        **inputs,
        "loss": output.loss,
        "rollout": output.rollout_features,
        "raw_states": raw_states,
        "prepared_states": processor(states=raw_states)["states"],
    }
    save_file({k: v.contiguous() for k, v in case.items()}, tmp_path / "case.safetensors")
    # Equal bits need the same number of threads and the same instructions.
    case = [folder, tmp_path / "case.safetensors", tmp_path / "again"]
    result = python_forks.run(["-c", LOAD_ELSEWHERE, *case], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "loaded transformers_modules" in result.stdout
    # What was loaded as remote code can be saved again, code included.
    assert {p.name for p in (tmp_path / "again").iterdir()} | {"processing_vjepa2_ac.py"} >= WORLD_MODEL
