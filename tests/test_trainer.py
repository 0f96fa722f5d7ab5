"""transformers' own Trainer, and int8 weights, on the model as it is: what docs/training.md and docs/model.md show."""

import copy
import re
from pathlib import Path

import pytest
import torch
from helpers_clips import write_clips
from helpers_training import TINY
from test_modeling import random_inputs, tiny_model
from test_ways_of_transformers import HEADS, head_inputs, tiny_head
from transformers import AutoModel, Trainer, TrainingArguments, VJEPA2Config, VJEPA2Model

from vjepa_ac_hf import VJEPA2ACForVideoClassification, VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.loading import ClipCollator, load_clips
from vjepa_ac_hf.loading.clips import load_action_statistics

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_documented_lines_train_as_our_own_loss_does(tmp_path):
    """The five lines of docs/training.md, with a tiny encoder: losses of three steps equal a loop written here, and the
    checkpoint loads with what Trainer has written into its configuration."""
    lines = re.search(r"```python\n(processor = .*?)```", (DOCS / "training.md").read_text(), re.DOTALL)[1]
    assert len(lines.splitlines()) == 5
    dataset = str(write_clips(tmp_path / "clips", train=6, validation=0))
    VJEPA2Model(VJEPA2Config(**TINY["encoder_config"], pred_num_hidden_layers=1)).save_pretrained(tmp_path / "encoder")
    sizes = {k: v for k, v in TINY.items() if k != "encoder_config"}
    for shown, here in [
        ('"facebook/vjepa2-vitl-fpc64-256"', "ENCODER, **SIZES"),
        ('action_space="vpt-13", action_statistics', 'action_space="vpt-13", resolution=32, action_statistics'),
        (
            '"runs/trainer", max_steps=1000',
            "RUN, max_steps=3, logging_steps=1, save_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, "
            "per_device_train_batch_size=6, weight_decay=0.0",
        ),
        ("Trainer(model", "trainer = Trainer(model"),
        (".train()", ""),
    ]:
        assert shown in lines, shown
        lines = lines.replace(shown, here)
    names = {
        **{
            thing.__name__: thing
            for thing in (Trainer, TrainingArguments, VJEPA2ACModel, VJEPA2ACProcessor, ClipCollator, load_clips)
        },
        "load_action_statistics": load_action_statistics,
    } | {
        "DATASET": dataset,
        "ENCODER": tmp_path / "encoder",
        "RUN": str(tmp_path / "run"),
        "SIZES": sizes,
    }
    torch.manual_seed(0)
    exec(lines, names)
    trainer, model, processor = names["trainer"], names["model"], names["processor"]

    own = VJEPA2ACModel(model.config)
    own.load_state_dict(model.state_dict())
    batch = ClipCollator(processor)(list(load_clips(dataset, "train")))
    optimizer = torch.optim.AdamW(own.predictor.parameters(), lr=4e-4, weight_decay=0.0)
    expected = []
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 4e-4 * (1 - step / 3)  # Trainer's default: linearly to zero
        output = own.train()(batch["pixel_values_videos"], actions=batch["actions"], states=batch["states"])
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(own.predictor.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(output.loss.item())

    trainer.train()
    found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert found == pytest.approx(expected, rel=2e-4) and found[2] < found[0]
    loaded = AutoModel.from_pretrained(tmp_path / "run" / "checkpoint-3")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("cls", [VJEPA2ACModel, *HEADS])
def test_int8_weights_from_loading_to_loading_again(tmp_path, cls):
    """torchao's int8 weights on the CPU: off from float32 by the rounding to a row's 255 steps and no more; saved, they
    load again."""
    pytest.importorskip("torchao", reason="torchao is not installed (the extra `test` has it)")
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
    name = {VJEPA2ACModel: "predicted_features", VJEPA2ACForVideoClassification: "logits"}.get(cls, "continuous")
    with torch.no_grad():
        expected, found, repeated, by_hand = (m.eval()(**inputs)[name] for m in (model, quantised, again, rounded))
    error = (found - expected).norm()
    assert 1e-4 < error / expected.norm() < 0.05
    assert (found - by_hand).norm() < 0.01 * error
    assert torch.equal(found, repeated)
