"""The model against oracles and properties: causality, cached rollouts, freezing, configuration, the Auto classes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, VJEPA2Config, VJEPA2Model

from vjepa_ac_hf import VJEPA2ACConfig, VJEPA2ACModel
from vjepa_ac_hf.modeling_vjepa2_ac import sdpa_frame_causal_attention

B, T, N, D, A, S = 2, 8, 4, 48, 13, 2


def tiny_config(**kwargs) -> VJEPA2ACConfig:
    encoder = VJEPA2Config(
        crop_size=32, patch_size=16, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, frames_per_clip=16
    )
    values = {"pred_hidden_size": 48, "pred_num_hidden_layers": 2, "pred_num_attention_heads": 2, **kwargs}
    return VJEPA2ACConfig(encoder_config=encoder, **values)


def tiny_model(**kwargs) -> VJEPA2ACModel:
    torch.manual_seed(0)
    model = VJEPA2ACModel(tiny_config(**kwargs)).eval()
    # Untrained biases are zero and norms are one: make every parameter count.
    for parameter in model.predictor.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def random_inputs(seed: int = 0, steps: int = T) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "features": torch.randn(B, steps, N, D, generator=generator),
        "actions": torch.randn(B, steps - 1, A, generator=generator),
        "states": torch.randn(B, steps, S, generator=generator),
    }


def naive_rollout(model, features, actions, states, horizon):
    """Runs the whole prefix again at every step: the definition, without a cache."""
    for _ in range(horizon):
        steps = features.shape[1]
        predicted = model.predict(features, actions[:, :steps], states[:, :steps])
        features = torch.cat([features, predicted[:, -1:]], dim=1)
    return features[:, -horizon:]


@given(context=st.integers(1, 4), horizon=st.integers(1, 4))
@settings(max_examples=12, deadline=None)
def test_cached_rollout_equals_uncached(context, horizon):
    model, inputs = tiny_model(), random_inputs()
    with torch.no_grad():
        actions = inputs["actions"][:, : context - 1 + horizon]
        cached = model.rollout(inputs["features"][:, :context], actions, inputs["states"])
        naive = naive_rollout(model, inputs["features"][:, :context], actions, inputs["states"], horizon)
    assert cached.shape == (B, horizon, N, D)
    torch.testing.assert_close(cached, naive, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("auto_steps", [1, 2, 4, 7])
@pytest.mark.parametrize("loss_type", ["mse", "l1"])
def test_losses_and_gradients_equal_the_uncached_definition(auto_steps, loss_type):
    """The training rollout starts from teacher forcing's keys and values; its gradients must be those of running
    everything from scratch."""
    model, inputs = tiny_model(loss_type=loss_type), random_inputs()
    distance = torch.nn.functional.mse_loss if loss_type == "mse" else torch.nn.functional.l1_loss

    output = model(**inputs, auto_steps=auto_steps)
    output.loss.backward()
    ours = {n: p.grad.clone() for n, p in model.predictor.named_parameters()}

    model.zero_grad()
    h = inputs["features"]
    predicted = model.predict(h[:, :-1], inputs["actions"], inputs["states"])
    rollout = naive_rollout(model, h[:, :1], inputs["actions"], inputs["states"], auto_steps)
    loss = distance(predicted, h[:, 1:]) + distance(rollout, h[:, 1 : auto_steps + 1])
    loss.backward()
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-6)
    assert output.rollout_features.shape == (B, auto_steps, N, D)
    for name, parameter in model.predictor.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changed", ["features", "actions", "states"])
@pytest.mark.parametrize("step", [0, 3, 6])
def test_predictions_do_not_see_the_future(changed, step):
    model, inputs = tiny_model(), random_inputs()
    arguments = {
        "features": inputs["features"][:, :-1],
        "actions": inputs["actions"],
        "states": inputs["states"][:, :-1],
    }
    with torch.no_grad():
        before = model.predict(**arguments)
        arguments[changed] = arguments[changed].clone()
        arguments[changed][:, step] += 1.0
        after = model.predict(**arguments)
    torch.testing.assert_close(before[:, :step], after[:, :step], rtol=0, atol=0)
    assert ((before - after)[:, step:].abs().amax(dim=(0, 2, 3)) > 1e-6).all()


@pytest.mark.parametrize("encoding", ["tubelet", "clip"])
def test_only_clip_encoding_leaks_the_future(encoding):
    model = tiny_model(encoding=encoding)
    pixels = torch.randn(1, 16, 3, 32, 32)
    before = model.encode(pixels)
    assert before.shape == (1, T, N, D)
    pixels[:, 10:] += 1.0
    changed = (model.encode(pixels) - before).abs().amax(dim=(0, 2, 3)) > 1e-6
    assert changed.tolist() == ([True] * 8 if encoding == "clip" else [False] * 5 + [True] * 3)


@given(past=st.integers(0, 3), new=st.integers(1, 4), per_step=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_frame_causal_attention_equals_a_dense_mask(past, new, per_step):
    generator = torch.Generator().manual_seed(past * 100 + new * 10 + per_step)
    length, total = new * per_step, (past + new) * per_step
    q = torch.randn(1, 2, length, 8, generator=generator)
    k, v = torch.randn(2, 1, 2, total, 8, generator=generator)
    step_of = torch.arange(total) // per_step
    allowed = step_of[total - length :, None] >= step_of[None, :]
    scores = (q @ k.transpose(-1, -2)) * 8**-0.5
    expected = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(sdpa_frame_causal_attention(q, k, v, per_step), expected, rtol=1e-5, atol=1e-5)


def test_no_tensor_of_the_clips_tokens_squared_is_made():
    """The mathematics of a dense mask would need (T * K) ** 2 elements; nothing of that size may appear."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model, inputs = tiny_model(pred_num_hidden_layers=1), random_inputs()
    tokens = (T - 1) * (N + 2)
    seen = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    seen.append(tuple(tensor.shape))
            return result

    with Shapes(), torch.no_grad():
        model(**inputs)
    assert (B, tokens, 48) in seen  # the whole clip was there
    assert not [shape for shape in seen if shape[-2:] == (tokens, tokens)]


def test_predictions_are_normalised_and_optional():
    inputs = random_inputs()
    predicted = tiny_model().predict(inputs["features"][:, :-1], inputs["actions"], inputs["states"])
    torch.testing.assert_close(predicted.mean(-1), torch.zeros(B, T - 1, N), rtol=0, atol=1e-5)
    raw = tiny_model(normalize_features=False).predict(inputs["features"][:, :-1], inputs["actions"], inputs["states"])
    assert raw.mean(-1).abs().max() > 1e-2


def test_encoder_stays_frozen_and_in_eval_mode(tmp_path):
    model = tiny_model().train()
    assert not model.encoder.training and model.predictor.training
    model.encoder.train()
    assert not any(m.training for m in model.encoder.modules())
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).train()
    assert isinstance(loaded, VJEPA2ACModel)
    assert not any(p.requires_grad for p in loaded.encoder.parameters())
    assert all(p.requires_grad for p in loaded.predictor.parameters())
    pixels = torch.randn(B, 16, 3, 32, 32)
    output = loaded(pixel_values_videos=pixels, actions=random_inputs()["actions"], states=random_inputs()["states"])
    output.loss.backward()
    assert all(p.grad is None for p in loaded.encoder.parameters())


def test_saved_model_gives_the_same_outputs(tmp_path):
    model, inputs = tiny_model(), random_inputs()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, found = model(**inputs), loaded(**inputs)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=0)
    torch.testing.assert_close(found.rollout_features, expected.rollout_features, rtol=0, atol=0)
    for field in ("action_dim", "action_space", "pred_hidden_size", "loss_type", "encoding", "auto_steps", "grid_size"):
        assert getattr(loaded.config, field) == getattr(model.config, field)


def test_pretrained_encoder_is_taken_over(tmp_path):
    torch.manual_seed(3)
    pretrained = VJEPA2Model(copy.deepcopy(tiny_config().encoder_config))
    pretrained.save_pretrained(tmp_path)
    model = VJEPA2ACModel.from_pretrained_encoder(tmp_path, pred_hidden_size=48, pred_num_attention_heads=2)
    for name, tensor in pretrained.encoder.state_dict().items():
        torch.testing.assert_close(model.encoder.state_dict()[name], tensor, rtol=0, atol=0)
    assert not any(p.requires_grad for p in model.encoder.parameters())
    from_config = VJEPA2ACModel.from_pretrained_encoder(tmp_path, tiny_config(loss_type="l1"))
    assert from_config.config.loss_type == "l1" and from_config.config.encoder_config.hidden_size == D


def test_initialisation():
    torch.manual_seed(0)
    config = tiny_config(pred_hidden_size=192, pred_num_hidden_layers=4)
    model = VJEPA2ACModel(config)
    assert all(p.eq(0).all() for n, p in model.predictor.named_parameters() if n.endswith("bias"))
    assert abs(model.predictor.layers[0].attention.qkv.weight.std().item() - 0.02) < 0.001
    for i, layer in enumerate(model.predictor.layers, start=1):
        expected = 0.02 / (2 * i) ** 0.5
        for projection in (layer.attention.proj, layer.mlp.fc2):
            assert abs(projection.weight.std().item() / expected - 1) < 0.05


def test_default_sizes():
    config = VJEPA2ACConfig()
    assert (config.num_steps, config.grid_size, config.encoder_config.hidden_size) == (8, 16, 1024)
    assert (config.pred_num_hidden_layers, config.layer_norm_eps, config.initializer_range) == (24, 1e-6, 0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_size": 7}, "unknown key 'hiden_size'.*pred_hidden_size"),
        ({"encoder_config": {"hiden_size": 7}}, "encoder_config: unknown key 'hiden_size'.*'hidden_size'"),
        ({"action_dim": 5, "action_space": "vpt-13"}, "action_dim is 5.*lists 13"),
        ({"action_space": ["yaw_delta", "key.ww"]}, "unknown action column 'key.ww'.*'key.w'"),
        ({"action_space": "vpt-14"}, "unknown action space 'vpt-14'"),
        ({"pred_hidden_size": 50, "pred_num_attention_heads": 4}, "pred_hidden_size 50 is not a multiple.*4"),
        ({"frames_per_clip": 15}, "frames_per_clip 15 is not a multiple.*tubelet_size 2"),
        ({"loss_type": "l3"}, "loss_type must be one of.*'l3'"),
        ({"encoding": "frame"}, "encoding must be one of.*'frame'"),
        ({"auto_steps": 8}, "auto_steps 8 is more than the 7"),
        ({"action_dim": 0}, "action_dim must be a whole number.*0"),
    ],
)
def test_bad_configurations_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        VJEPA2ACConfig(**values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values_videos": torch.zeros(B, 16, 3, 64, 64)}, r"\(batch, frames, 3, 32, 32\), found \(2, 16, 3, 64"),
        ({"pixel_values_videos": torch.zeros(B, 15, 3, 32, 32)}, "frames_per_clip 16 frames, found 15"),
        ({"features": torch.zeros(B, T, 9, D)}, r"found \(2, 8, 9, 48\)"),
        ({"features": torch.zeros(B, T, N, 40)}, r"\(batch, steps, 4, 48\).*found \(2, 8, 4, 40\)"),
        ({"actions": torch.zeros(B, T - 1, 12)}, r"actions must be.*13\), found \(2, 7, 12\)"),
        ({"actions": torch.zeros(B, T, A)}, "8 steps of features need 7 actions, found 8"),
        ({"states": torch.zeros(B, T, 3)}, r"states must be.*2\), found \(2, 8, 3\)"),
        ({"states": torch.zeros(B, T - 2, S)}, "7 actions need at least as many states, found 6"),
        ({"auto_steps": 8}, "auto_steps must be between 1 and 7.*found 8"),
        ({"actions": None}, "actions and states are needed"),
        ({"features": None}, "either pixel_values_videos or features"),
    ],
)
def test_bad_inputs_are_refused(change, message):
    inputs = random_inputs() | change
    if "pixel_values_videos" in change:
        del inputs["features"]
    with pytest.raises(ValueError, match=message):
        tiny_model()(**inputs)


def test_rollout_needs_an_action_out_of_the_context():
    inputs = random_inputs()
    with pytest.raises(ValueError, match="context of 3 steps needs at least 3 actions.*found 2"):
        tiny_model().rollout(inputs["features"][:, :3], inputs["actions"][:, :2], inputs["states"])


def test_rotary_tables_survive_inference_mode():
    model, inputs = tiny_model(), random_inputs()
    with torch.inference_mode():
        before = model(**inputs).loss.item()
    loss = model(**inputs).loss
    loss.backward()  # tables made under inference mode could not be saved for this
    assert loss.item() == before
    assert all(p.grad is not None for p in model.predictor.parameters())


def test_bfloat16_weights():
    model, inputs = tiny_model(), random_inputs()
    with torch.no_grad():
        expected = model(**inputs).predicted_features
        found = model.to(torch.bfloat16)(**inputs)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.predicted_features.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("changes", [{"action_space": "vpt-36", "action_dim": None}, {"pred_hidden_size": 48}])
def test_random_encoders_of_a_seed_are_the_same_whatever_predicts_from_them(changes):
    """Features that were cached for one action space serve the next one (docs/model.md, "Feature cache")."""
    encoders = []
    for seed, options in ((7, {}), (7, changes), (8, {})):
        torch.manual_seed(seed)
        encoders.append(VJEPA2ACModel(tiny_config(**options)).encoder.state_dict())
    for name, tensor in encoders[0].items():
        assert torch.equal(tensor, encoders[1][name]), name
    name = "layer.0.mlp.fc1.weight"
    assert not torch.equal(encoders[0][name], encoders[2][name])
    assert encoders[0][name].std().item() == pytest.approx(0.02, rel=0.2)  # and drawn as the rest is


def test_a_model_is_made_of_a_state_dict_and_a_configuration():
    """transformers' way without a folder: its own tests use it (slow: tests/test_common_model_tests.py)."""
    model = tiny_model()
    made = VJEPA2ACModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor), name
