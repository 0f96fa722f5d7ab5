"""What `import vjepa_ac_hf` costs and does: nothing heavy, and yet transformers and datasets find what is here."""

import subprocess
import sys

import pytest

READY = """
from vjepa_ac_hf import VJEPA2ACConfig, VJEPA2ACForVideoClassification, VJEPA2ACModel, VJEPA2ACProcessor
from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification, AutoProcessor
small = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, crop_size=32, patch_size=16)
config = AutoConfig.for_model("vjepa2_ac", encoder_config=small, pred_hidden_size=24, pred_num_attention_heads=2)
assert type(config) is VJEPA2ACConfig
config.pred_num_hidden_layers = 1
assert type(AutoModel.from_config(config)) is VJEPA2ACModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert CONFIG_MAPPING["vjepa2_ac_inverse_dynamics"].__module__ == "vjepa_ac_hf.configuration_heads_vjepa2_ac"
assert AutoModelForVideoClassification._model_mapping[VJEPA2ACForVideoClassification.config_class]
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
assert PROCESSOR_MAPPING[VJEPA2ACConfig] is VJEPA2ACProcessor
import sys, vjepa_ac_hf.registration as r
watch, = (f for f in sys.meta_path if type(f).__name__ == "_Watch")
assert watch.models_known
"""
SLOW = pytest.mark.slow
AUTO = ("AutoConfig", "AutoProcessor", "VJEPA2Model")
MODULES = ("transformers.modeling_layers", "transformers.pipelines", "vjepa_ac_hf.modeling_heads_vjepa2_ac")
MODULES += ("vjepa_ac_hf.training.presets", "vjepa_ac_hf.evaluation")
BUILDER = """
import sys
from datasets import load_dataset_builder
assert "vjepa_ac_hf.building.vpt_tubelets" not in sys.modules
try:
    load_dataset_builder("vpt_tubelets", data_files="/none/*.tar")
except FileNotFoundError as error:
    assert "/none/" in str(error), error
assert "vjepa_ac_hf.building.vpt_tubelets" in sys.modules
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_imports_nothing_heavy():
    said = python("import sys, vjepa_ac_hf; vjepa_ac_hf.__version__, dir(vjepa_ac_hf); print(*sys.modules)").split()
    assert not {"torch", "transformers", "datasets", "numpy", "accelerate", "torchcodec"} & set(said)


@pytest.mark.parametrize(
    "first",
    [
        "import vjepa_ac_hf",
        "from transformers import AutoModel\nimport vjepa_ac_hf",
        *(pytest.param(f"import vjepa_ac_hf\nfrom transformers import {a}", marks=SLOW) for a in AUTO),
        # Its layers import `AutoModel`, when the model's file that ours needs is half imported.
        "import vjepa_ac_hf\nimport transformers.models.vjepa2.modeling_vjepa2",
        *(pytest.param(f"import vjepa_ac_hf\nimport {module}", marks=SLOW) for module in MODULES),
    ],
)
def test_auto_classes_know_ours_whatever_is_imported_first(first):
    python(first + READY)


@pytest.mark.parametrize(
    "first", ["import vjepa_ac_hf", "import datasets\nimport vjepa_ac_hf", "import vjepa_ac_hf\nimport datasets"]
)
def test_datasets_finds_the_builder_and_imports_it_when_asked(first):
    python(first + BUILDER)


def test_who_imports_the_auto_classes_alone_gets_registered_ones():
    """The configuration is not ours to import: `AutoConfig` alone must know the name."""
    said = python(
        "import vjepa_ac_hf\nfrom transformers import AutoConfig\n"
        "print(type(AutoConfig.for_model('vjepa2_ac')).__module__)"
    )
    assert said.strip() == "vjepa_ac_hf.configuration_vjepa2_ac"


def test_names_are_those_that_are_listed():
    import vjepa_ac_hf

    for name in vjepa_ac_hf.__all__:
        assert getattr(vjepa_ac_hf, name).__class__ is not None and name in dir(vjepa_ac_hf)
    with pytest.raises(AttributeError, match="no attribute 'VJEPA2ACModle'"):
        vjepa_ac_hf.VJEPA2ACModle  # noqa: B018


def test_modules_keep_their_own_loaders():
    """Who asks a module for its source gets it, after and without importing it."""
    python(
        "import importlib.machinery as m, importlib.util, inspect, vjepa_ac_hf.modeling_vjepa2_ac as ours\n"
        "import transformers.models.vjepa2.modeling_vjepa2 as theirs\n"
        "for module in (ours, theirs):\n"
        "    assert type(module.__loader__) is type(module.__spec__.loader) is m.SourceFileLoader\n"
        "    assert 'class' in inspect.getsource(module)\n"
        "spec = importlib.util.find_spec('vjepa_ac_hf.convert_vjepa2_ac_to_hf')\n"
        "assert 'argparse' in spec.loader.get_source(spec.name)"
    )


def test_what_goes_wrong_in_registering_is_told():
    """And not swallowed by the import that it happens in."""
    code = (
        "import vjepa_ac_hf, vjepa_ac_hf.registration as r\n"
        "def broken():\n    raise RuntimeError('no such class')\n"
        "original, r.register_models = r.register_models, broken\n"
        "try:\n    import transformers.models.auto.modeling_auto\nexcept RuntimeError as error:\n    print(error)\n"
        "r.register_models = original\n"
    )
    assert python(code + READY).strip() == "no such class"
