"""Loading whole models: dtype, device_map and low_cpu_mem_usage as in transformers, and no second copy in memory."""

import gc
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from test_modeling import random_inputs, tiny_model
from transformers import AutoModel, VJEPA2Config, VJEPA2Model

from vjepa_ac_hf import VJEPA2ACConfig, VJEPA2ACModel


@pytest.mark.parametrize("auto_class", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": "auto"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}, "dtype": torch.bfloat16},
        {"low_cpu_mem_usage": True},
        {"attn_implementation": "eager", "device_map": "auto"},
    ],
    ids=str,
)
def test_options_of_transformers_work(tmp_path, options, auto_class):
    saved = tiny_model().eval()
    saved.save_pretrained(tmp_path)
    model = (AutoModel if auto_class else VJEPA2ACModel).from_pretrained(tmp_path, **options)
    assert type(model) is VJEPA2ACModel and not model.training
    dtype = options["dtype"] if isinstance(options.get("dtype"), torch.dtype) else torch.float32
    expected = saved.state_dict()
    assert expected.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu", name
        assert torch.equal(tensor, expected[name].to(dtype)), name
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert all(p.requires_grad for p in model.predictor.parameters())
    assert not model.train().encoder.training
    if dtype == torch.float32:
        inputs = random_inputs()
        torch.testing.assert_close(model.eval()(**inputs).loss, saved(**inputs).loss, rtol=1e-5, atol=0)


class AnonymousMemory:
    """Growth of this process's anonymous memory at its largest while inside; mapped files do not count."""

    def __enter__(self) -> "AnonymousMemory":
        gc.collect()
        self.before = self.peak = self.now()
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.running = False
        self.thread.join()
        self.growth = self.peak - self.before

    @staticmethod
    def now() -> int:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    def watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.001)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
@pytest.mark.parametrize("what", ["from_pretrained", "from_pretrained in bfloat16", "from_pretrained_encoder"])
def test_no_second_copy_is_in_memory(tmp_path, what):
    encoder = VJEPA2Config(hidden_size=640, num_hidden_layers=12, num_attention_heads=10, crop_size=32, patch_size=16)
    config = VJEPA2ACConfig(
        encoder_config=encoder, pred_hidden_size=640, pred_num_hidden_layers=4, pred_num_attention_heads=10
    )
    with torch.device("meta"):  # whatever its weights are: random ones would take seconds
        saved, plain = VJEPA2ACModel(config), VJEPA2Model(encoder)
    encoder_bytes = 4 * sum(p.numel() for p in saved.encoder.parameters())
    predictor_bytes = 4 * sum(p.numel() for p in saved.predictor.parameters())
    assert encoder_bytes > 200e6
    if what == "from_pretrained_encoder":
        plain.to_empty(device="cpu").save_pretrained(tmp_path)
        load = lambda: VJEPA2ACModel.from_pretrained_encoder(tmp_path, config)  # noqa: E731
    else:
        saved.to_empty(device="cpu").save_pretrained(tmp_path)
        load = lambda: VJEPA2ACModel.from_pretrained(  # noqa: E731
            tmp_path, dtype=torch.bfloat16 if "bfloat16" in what else None
        )
    other_bytes = 4 * sum(p.numel() for p in plain.predictor.parameters())
    del saved, plain
    gc.collect()
    with AnonymousMemory() as memory:
        model = load()
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    allowed = held
    if what == "from_pretrained_encoder":
        # transformers' V-JEPA 2 checkpoints hold a predictor of their own, loaded beside the encoder and let go.
        allowed += other_bytes
    assert memory.growth < allowed + 0.25 * held, (memory.growth, held, predictor_bytes)
