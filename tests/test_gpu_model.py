"""The model where only a GPU takes a branch: the same test on both devices, against oracles computed on the CPU.

Needs torch, transformers and accelerate alone. Which branch each test covers: docs/training.md, "On a GPU".
"""

import gc
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import SLOW_ON_THE_CPU
from transformers import VJEPA2Config, VJEPA2Model

from vjepa_ac_hf import (
    VJEPA2ACConfig,
    VJEPA2ACForActionAnticipation,
    VJEPA2ACForInverseDynamics,
    VJEPA2ACForVideoClassification,
    VJEPA2ACModel,
)
from vjepa_ac_hf import modeling_vjepa2_ac as modeling
from vjepa_ac_hf.training.checkpoints import get_random_state, set_random_state
from vjepa_ac_hf.training.estimates import step_memory
from vjepa_ac_hf.training.health import Health, peak_memory
from vjepa_ac_hf.training.optimization import build_optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from straightforward import StraightforwardPredictor

STEPS, WIDTH = 8, 64
FLOAT32, BFLOAT16 = 1e-4, 2e-2  # relative tolerances of losses on another device, and in bf16 autocast


def make_model(grid: int = 2, heads: int = 2, **sizes) -> VJEPA2ACModel:
    """On the CPU; every bias and norm counts."""
    torch.manual_seed(0)
    encoder = VJEPA2Config(
        crop_size=16 * grid, patch_size=16, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2
    )
    values = {"pred_hidden_size": WIDTH, "pred_num_hidden_layers": 2, "pred_num_attention_heads": heads, **sizes}
    model = VJEPA2ACModel(
        VJEPA2ACConfig(encoder_config=encoder, action_space="vpt-13", frames_per_clip=2 * STEPS, **values)
    )
    for parameter in model.predictor.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def make_inputs(model: VJEPA2ACModel, batch: int = 2, pixels: bool = False) -> dict[str, torch.Tensor]:
    generator, edge = torch.Generator().manual_seed(1), model.config.encoder_config.crop_size
    inputs = {
        "actions": torch.randn(batch, STEPS - 1, model.config.action_dim, generator=generator),
        "states": torch.randn(batch, STEPS, 2, generator=generator),
    }
    if pixels:
        inputs["pixel_values_videos"] = torch.randn(batch, 2 * STEPS, 3, edge, edge, generator=generator)
    else:
        inputs["features"] = torch.randn(batch, STEPS, model.config.grid_size**2, WIDTH, generator=generator)
    return inputs


def to(inputs: dict, device) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def oracle(model: VJEPA2ACModel, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients by the straightforward implementation, float32 on the CPU."""
    plain = StraightforwardPredictor(model.config)
    plain.load_state_dict(model.predictor.state_dict())
    losses = plain.losses(inputs["features"], inputs["actions"], inputs["states"], model.config.auto_steps)
    sum(losses).backward()
    return sum(losses).detach(), {name: p.grad for name, p in plain.named_parameters()}


def assert_close(found, expected, tolerance: float) -> None:
    """Largest difference over the largest expected value."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def assert_gradients(model: VJEPA2ACModel, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, parameter in model.predictor.named_parameters():
        difference = (parameter.grad.cpu() - expected[name]).norm() / expected[name].norm()
        assert difference <= tolerance, f"{name}: {difference}"


# ---------------------------------------------------------------------------------------------------- kernels


def use_kernel(monkeypatch, kernel: str) -> None:
    """Leave PyTorch on CUDA only this kernel with normalisers, or none."""
    if kernel != "best":
        monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda *_, **__: False)
    if kernel == "none":
        monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", lambda *_, **__: False)


@pytest.mark.parametrize("kernel", ["best", "efficient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (258, 258), (258, 774)])
def test_kernels_give_attention_and_its_normaliser(request, device, monkeypatch, dtype, kernel, queries, keys):
    if dtype == torch.bfloat16:
        request.getfixturevalue("attention_in_bf16")
    use_kernel(monkeypatch, kernel)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, queries, 64, generator=generator).to(dtype)
    k, v = torch.randn(2, 2, 3, keys, 64, generator=generator).to(dtype)
    attention = modeling.attention_with_normaliser(q.to(device))
    assert attention is not None
    out, normaliser = attention(q.to(device), k.to(device), v.to(device))
    scores = q.double() @ k.double().mT / 8
    tolerance = FLOAT32 if dtype == torch.float32 else 1e-2
    assert_close(out, scores.softmax(dim=-1) @ v.double(), tolerance)
    assert_close(normaliser, scores.logsumexp(dim=-1), tolerance)


@pytest.mark.parametrize("kernel", ["best", "efficient", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_shared_context_is_attended_with_every_kernel_and_without(device, monkeypatch, dtype, kernel):
    use_kernel(monkeypatch, kernel)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(6, 2, 18, 32, generator=generator).to(dtype)
    shared = torch.randn(2, 2, 2, 36, 32, generator=generator).to(dtype)
    own = torch.randn(2, 6, 2, 54, 32, generator=generator).to(dtype)
    assert device == "cpu" or (modeling.attention_with_normaliser(q.to(device)) is None) == (kernel == "none")
    found = modeling.shared_context_attention(q.to(device), tuple(shared.to(device)), tuple(own.to(device)))
    keys, values = (torch.cat([s.repeat_interleave(3, dim=0), o], dim=2) for s, o in zip(shared, own, strict=True))
    expected = (q.double() @ keys.double().mT / 32**0.5).softmax(-1) @ values.double()
    assert found.dtype == dtype
    assert_close(found, expected, FLOAT32 if dtype == torch.float32 else 2e-2)


def test_a_head_width_without_a_kernel_expands_the_context(device):
    width = 12  # no multiple of 8: on a GPU no kernel
    model = make_model(heads=2, pred_hidden_size=2 * width)
    q = torch.zeros(1, 2, 6, width, device=device)
    assert (modeling.attention_with_normaliser(q) is None) == (device != "cpu")
    check_candidates(model, device, torch.float32, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidates_are_rollouts_one_by_one(device, dtype):
    check_candidates(make_model(), device, dtype, FLOAT32 if dtype == torch.float32 else 0.1)


@torch.no_grad()
def check_candidates(model, device, dtype, tolerance):
    """Against the straightforward rollout in float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 3, model.config.grid_size**2, WIDTH, generator=generator)
    actions = torch.randn(1, 5, 5, model.config.action_dim, generator=generator)
    states = torch.randn(1, 5, 5, 2, generator=generator)
    actions[:, :, :2], states[:, :, :3] = actions[:, :1, :2], states[:, :1, :3]
    plain = StraightforwardPredictor(model.config)
    plain.load_state_dict(model.predictor.state_dict())
    expected = plain.rollout(features.expand(5, -1, -1, -1), actions[0], states[0])
    inputs = [t.to(device, dtype) for t in (features, actions, states)]
    model = model.to(device, dtype)
    for limit in (None, 2 * (model.config.grid_size**2 + 2)):
        assert_close(model.rollout(*inputs, max_batch_tokens=limit)[0], expected, tolerance)


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("grid", [2, 8])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_gradients_of_every_attention_equal_the_oracles(device, implementation, grid):
    model = make_model(grid)
    inputs = make_inputs(model)
    loss, gradients = oracle(model, inputs)
    model.to(device).set_attn_implementation(implementation)
    if device == "cpu" and implementation == "flex_attention":
        with pytest.raises(ValueError, match="'flex_attention' has no gradients on a CPU"):
            model(**inputs)
        return
    output = model(**to(inputs, device))
    output.loss.backward()
    assert_close(output.loss, loss, FLOAT32)
    assert_gradients(model, gradients, 1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_losses_in_bf16_autocast_are_those_in_float32(device, implementation):
    model = make_model(grid=4)
    inputs = make_inputs(model)
    loss, gradients = oracle(model, inputs)
    model.to(device)
    if device != "cpu":
        model.set_attn_implementation(implementation)
    with torch.autocast(device, torch.bfloat16):
        output = model(**to(inputs, device))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert_close(output.loss, loss, BFLOAT16)
    assert_gradients(model, gradients, 0.1)


def test_encoding_in_bf16_autocast_is_that_in_float32(device):
    model = make_model()
    pixels = make_inputs(model, pixels=True)["pixel_values_videos"]
    expected = model.encode(pixels)
    model.to(device)
    assert_close(model.encode(pixels.to(device)), expected, FLOAT32)
    with torch.autocast(device, torch.bfloat16):
        found = model.encode(pixels.to(device))
    assert (found.float().cpu() - expected).norm() <= BFLOAT16 * expected.norm()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_equal_the_oracles(device, use_reentrant):
    model = make_model().train()
    inputs = make_inputs(model)
    loss, gradients = oracle(model, inputs)
    model.to(device).gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    output = model(**to(inputs, device))
    output.loss.backward()
    assert_close(output.loss, loss, FLOAT32)
    assert_gradients(model, gradients, 1e-3)


@SLOW_ON_THE_CPU
def test_compiled_gradients_equal_the_oracles(device):
    """By inductor on a GPU; on a CPU, where that takes half a minute, without code generation."""
    torch.compiler.reset()
    model = make_model()
    inputs = make_inputs(model)
    loss, gradients = oracle(model, inputs)
    compiled = torch.compile(model.to(device), backend="inductor" if device == "cuda" else "aot_eager")
    output = compiled(**to(inputs, device))
    output.loss.backward()
    assert_close(output.loss, loss, FLOAT32)
    assert_gradients(model, gradients, 1e-3)


@pytest.mark.parametrize(
    "cls", [VJEPA2ACForInverseDynamics, VJEPA2ACForActionAnticipation, VJEPA2ACForVideoClassification]
)
def test_heads_are_the_same_in_float32_and_bf16_autocast(device, cls):
    fields = {"head_hidden_size": 32, "head_num_attention_heads": 2, "head_num_hidden_layers": 1}
    if cls is VJEPA2ACForVideoClassification:
        fields["num_labels"] = 3
    head = cls.from_world_model(make_model(), **fields).eval()
    inputs = {"features": make_inputs(make_model())["features"]}
    if cls is VJEPA2ACForVideoClassification:
        inputs["labels"] = torch.tensor([0, 2])
    else:
        inputs["labels"] = torch.cat([torch.ones(2, STEPS - 1, 4), torch.zeros(2, STEPS - 1, 9)], dim=-1)
    expected = head(**inputs)
    head.to(device)
    found = head(**to(inputs, device))
    assert_close(found.loss, expected.loss, FLOAT32)
    with torch.autocast(device, torch.bfloat16):
        assert_close(head(**to(inputs, device)).loss, expected.loss, BFLOAT16)


# ---------------------------------------------------------------------------------------------------- around it


@pytest.mark.parametrize("how", ["auto", "one device", "two devices"])
def test_a_model_loaded_by_device_map_gives_the_same(device, tmp_path, how):
    model = make_model()
    inputs = make_inputs(model, pixels=True)
    with torch.no_grad():
        expected = model(**inputs)
    model.save_pretrained(tmp_path)
    devices = {"auto": "auto", "one device": device, "two devices": {"encoder": device, "predictor": "cpu"}}
    loaded = VJEPA2ACModel.from_pretrained(tmp_path, device_map=devices[how]).eval()
    if how == "auto" and device == "cpu" and torch.cuda.is_available():
        pytest.skip("'auto' takes the GPU")
    assert next(loaded.encoder.parameters()).device.type == device
    with torch.no_grad():
        found = loaded(**to(inputs, device))
    assert_close(found.loss, expected.loss, FLOAT32)
    assert_close(found.rollout_features, expected.rollout_features, 1e-3)


def test_a_pretrained_encoder_brings_the_predictor_to_its_device(device, tmp_path):
    model = make_model()
    pretrained = VJEPA2Model(model.config.encoder_config)
    pretrained.encoder.load_state_dict(model.encoder.state_dict())
    pretrained.save_pretrained(tmp_path)
    loaded = VJEPA2ACModel.from_pretrained_encoder(tmp_path, model.config, device_map=device)
    assert {p.device.type for p in loaded.parameters()} == {device}
    pixels = make_inputs(model, pixels=True)["pixel_values_videos"]
    assert_close(loaded.encode(pixels.to(device)), model.encode(pixels), FLOAT32)


def test_random_numbers_of_the_device_continue(device):
    where = torch.device(device)
    state = get_random_state(where)
    expected = torch.rand(4, device=where), torch.rand(4)
    set_random_state(state, where)
    assert torch.equal(torch.rand(4, device=where), expected[0]) and torch.equal(torch.rand(4), expected[1])


def test_a_model_on_another_device_than_its_inputs_is_refused_by_name(device):
    model = make_model().to(device)
    other = {"cpu": "meta", "cuda": "cpu"}[device]
    inputs = to(make_inputs(model), device)
    inputs["actions"] = inputs["actions"].to(other)
    with pytest.raises(ValueError, match=f"actions are on {other}, the predictor is on {device}"):
        model(**inputs)


def large_step(device: str):
    """A model whose weights, gradients and activations are many megabytes, and its training step in bf16 autocast."""
    sizes = {"pred_hidden_size": 512, "pred_num_attention_heads": 8, "pred_num_hidden_layers": 4}
    model = make_model(grid=8, **sizes).train().to(device)
    inputs, optimizer = to(make_inputs(model, batch=4, pixels=True), device), build_optimizer(model.predictor, 0.0, 0.0)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def test_the_peak_of_memory_is_counted_and_near_the_estimate(device):
    if device == "cpu":  # the process's largest size, which no tensor makes smaller again
        before = peak_memory(torch.device(device))
        assert peak_memory(torch.device(device)) >= before > 2**20
        return
    gc.collect()
    already = torch.cuda.memory_allocated()  # of other tests
    model, step = large_step(device)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.predictor)]
    estimate = step_memory(model.config, *sizes, 4, bf16=True).total
    found = peak_memory(torch.device(device))
    assert found == torch.cuda.max_memory_allocated()
    # Gradients and activations are not all there at once; cuBLAS has some 30 MiB of its own.
    assert 0.5 * estimate < found - already < 1.25 * estimate


def test_utilisation_is_a_share_of_the_measured_peak(device, monkeypatch):
    """Steps are timed and the peak is measured here: no step uses more than there is."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(device == "cpu").lower())
    AcceleratorState._reset_state(reset_partial_state=True)

    def seconds(call, count: int) -> float:
        call()
        torch.cuda.synchronize() if device != "cpu" else None
        started = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize() if device != "cpu" else None
        return (time.perf_counter() - started) / count

    edge = 8192 if device == "cuda" else 1024
    a = torch.randn(edge, edge, device=device, dtype=torch.bfloat16)
    peak = 2 * edge**3 / min(seconds(lambda: a @ a, 3) for _ in range(3)) / 1e12
    model, step = large_step(device) if device == "cuda" else (make_model(), lambda: None)
    took = seconds(step, 3) if device == "cuda" else 1.0
    names = ("hardware", "cache_features", "log_every", "eval_every")
    arguments = SimpleNamespace(**dict.fromkeys(names), hardware_tflops=peak, mixed_precision="bf16", max_steps=1)
    arguments.per_device_batch_size, arguments.gradient_accumulation_steps = 4, 1
    row = Health(model, arguments, Accelerator()).row(1, took)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert row["mfu"] == pytest.approx(row["model_tflops_per_second"] / peak)
    assert 0 < row["mfu"] < 1
