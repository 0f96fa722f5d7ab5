"""transformers' own Trainer on the model as it is: the lines that docs/training.md shows."""

import re
from pathlib import Path

import pytest
import torch
from helpers_clips import write_clips
from helpers_training import TINY
from transformers import AutoModel, Trainer, TrainingArguments, VJEPA2Config, VJEPA2Model

from vjepa_ac_hf import VJEPA2ACModel, VJEPA2ACProcessor
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
