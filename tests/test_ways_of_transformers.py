"""What people do with any model of transformers: overrides on loading, its Trainer, gradient checkpointing, offloading,
quantisation, attention implementations, export."""

import json

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from test_modeling import D, N, T, random_inputs, tiny_config, tiny_model
from transformers import AutoModel, PreTrainedConfig, VJEPA2Config

from vjepa_ac_hf import (
    VJEPA2ACConfig,
    VJEPA2ACForActionAnticipation,
    VJEPA2ACForFrameDecoding,
    VJEPA2ACForInverseDynamics,
    VJEPA2ACForVideoClassification,
    VJEPA2ACInverseDynamicsConfig,
    VJEPA2ACModel,
)

# Those that the world model under them can be trained through, and all.
TRAINED_THROUGH = [VJEPA2ACForInverseDynamics, VJEPA2ACForActionAnticipation, VJEPA2ACForVideoClassification]
HEADS = [*TRAINED_THROUGH, VJEPA2ACForFrameDecoding]
FIELDS = {"head_hidden_size": 32, "head_num_attention_heads": 2, "head_num_hidden_layers": 2}


def tiny_head(cls, **fields):
    torch.manual_seed(0)
    if cls is VJEPA2ACForVideoClassification:
        fields = {"num_labels": 3, **fields}
    return cls.from_world_model(tiny_model(action_space="vpt-13"), **{**FIELDS, **fields}).eval()


def head_inputs(cls, labels: bool = True, batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    inputs = {"features": torch.randn(batch, T, N, D, generator=generator)}
    if labels and cls is VJEPA2ACForVideoClassification:
        inputs["labels"] = torch.arange(batch) % 3
    elif labels and cls is VJEPA2ACForFrameDecoding:
        inputs["labels"] = torch.rand(batch, 2 * T, 3, 32, 32, generator=generator)
    elif labels:
        keys = (torch.rand(batch, T - 1, 9, generator=generator) < 0.5).float()
        inputs["labels"] = torch.cat([torch.randn(batch, T - 1, 4, generator=generator), keys], dim=-1)
    return inputs


# Overrides on loading, and fields set after a configuration was made.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding": "Tubelet"}, "encoding must be one of .*'Tubelet'"),
        ({"loss_type": "MSE"}, "loss_type must be one of .*'MSE'"),
        ({"loss_type": "l2"}, "loss_type must be one of .*'l2'"),
        ({"action_space": "vpt-38"}, "action_dim is 13, but action_space lists 38"),
        ({"action_space": "vpt-14"}, "unknown action space 'vpt-14'"),
        ({"pred_num_attention_heads": 5}, "pred_hidden_size 48 is not a multiple of pred_num_attention_heads 5"),
        ({"pred_num_attention_heads": 16}, "pred_hidden_size 48 over 16 heads gives 3 dimensions a head"),
        ({"pred_num_attention_heads": 12}, "pred_hidden_size 48 over 12 heads gives 4 dimensions a head"),
        ({"normalize_features": "no"}, "normalize_features must be of type bool, found 'no'"),
        ({"layer_norm_eps": "a"}, "layer_norm_eps must be of type float, found 'a'"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be more than 0"),
        ({"auto_steps": 2.0}, "auto_steps must be a whole number, found 2.0"),
        ({"auto_steps": True}, "auto_steps must be a whole number, found True"),
        ({"output_hidden_states": True}, "hook model.encoder.layer"),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["loading", "loading by AutoModel", "setting", "constructor"])
def test_fields_are_checked_wherever_they_come_from(tmp_path, how, change, message):
    if how == "constructor":
        with pytest.raises(ValueError, match=message):
            tiny_config(action_dim=13, **change)
        return
    if how == "setting":
        config = tiny_config()
        for name, value in change.items():
            setattr(config, name, value)
        with pytest.raises(ValueError, match=message):
            VJEPA2ACModel(config)
        return
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        (VJEPA2ACModel if how == "loading" else AutoModel).from_pretrained(tmp_path, **change)


def test_overrides_on_loading_are_resolved(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = VJEPA2ACModel.from_pretrained(
        tmp_path, action_space="vpt-13", loss_type="l1", encoder_config={"layer_norm_eps": 0.5}
    )
    assert model.config.action_space[:2] == ["mouse_dx", "mouse_dy"] and len(model.config.action_space) == 13
    assert model.config.encoder_config.layer_norm_eps == 0.5 and model.config.encoder_config.hidden_size == D
    inputs = random_inputs()
    predicted = model(**inputs).predicted_features
    expected = (predicted - inputs["features"][:, 1:]).abs().mean()
    torch.testing.assert_close(model(**inputs).teacher_forcing_loss, expected)


@pytest.mark.parametrize("name", ["encoding", "loss_type"])
def test_a_name_set_on_a_living_model_is_not_taken_for_another(name):
    model = tiny_model()
    setattr(model.config, name, "Mse")
    with pytest.raises(ValueError, match=f"{name} must be .*found 'Mse'"):
        model(
            pixel_values_videos=torch.zeros(2, 16, 3, 32, 32),
            actions=random_inputs()["actions"],
            states=random_inputs()["states"],
        )


def test_an_encoder_whose_heads_do_not_divide_its_width_is_refused():
    with pytest.raises(ValueError, match="encoder hidden_size 48 is not a multiple of encoder num_attention_heads 5"):
        VJEPA2ACConfig(encoder_config={"hidden_size": 48, "num_attention_heads": 5})
    with pytest.raises(ValueError, match="encoder hidden_size 48 over 16 heads gives 3"):
        VJEPA2ACConfig(encoder_config={"hidden_size": 48, "num_attention_heads": 16})


def test_head_fields_are_checked_on_loading(tmp_path):
    tiny_head(VJEPA2ACForInverseDynamics).save_pretrained(tmp_path)
    for change, message in [
        ({"head_num_attention_heads": 3}, "head_hidden_size 32 is not a multiple of head_num_attention_heads 3"),
        ({"head_hidden_size": "a"}, "head_hidden_size must be a whole number, found 'a'"),
        ({"freeze_encoder": "no"}, "freeze_encoder must be of type bool, found 'no'"),
        ({"features_from": "Encoder"}, "features_from must be one of .*'Encoder'"),
        ({"pos_weight": ["a"] * 9}, "pos_weight must be finite numbers above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            VJEPA2ACForInverseDynamics.from_pretrained(tmp_path, **change)


def test_whole_numbers_are_thresholds_too():
    config = VJEPA2ACInverseDynamicsConfig(
        encoder_config=tiny_config().encoder_config, action_space="vpt-13", key_thresholds=[0] * 9, pos_weight=[1] * 9
    )
    assert config.key_thresholds == [0] * 9
    for bad in (True, "0", float("inf")):
        with pytest.raises(ValueError, match="key_thresholds must be 9 finite numbers"):
            VJEPA2ACInverseDynamicsConfig(
                encoder_config=tiny_config().encoder_config, action_space="vpt-13", key_thresholds=[0] * 8 + [bad]
            )


# Configuration files that transformers has written, and slips of persons.


@pytest.mark.parametrize("cls", [VJEPA2ACModel, *HEADS])
def test_what_transformers_writes_into_a_configuration_can_be_loaded(tmp_path, cls):
    model = tiny_model() if cls is VJEPA2ACModel else tiny_head(cls)
    written = {"use_cache": False, "tie_word_embeddings": False, "pad_token_id": 0, "is_decoder": False}
    written |= {"task_specific_params": None, "bos_token_id": 1, "tokenizer_class": None, "pruned_heads": {}}
    for name, value in written.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is False
    loaded = cls.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    inputs = random_inputs() if cls is VJEPA2ACModel else head_inputs(cls)
    assert torch.equal(cls.from_pretrained(tmp_path / "again")(**inputs).loss, model(**inputs).loss)


def test_all_fields_of_a_configuration_of_transformers_are_known(tmp_path):
    """Whatever `PreTrainedConfig` itself saves when everything is set must load, given by a person too."""
    everything = PreTrainedConfig(use_cache=True, pad_token_id=3).to_dict()
    everything |= {"quantization_config": {"quant_method": "torchao"}, "some_key_of_next_year": 1}
    tiny_model().config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(everything | saved))
    assert VJEPA2ACConfig.from_pretrained(tmp_path).some_key_of_next_year == 1
    for name in ("use_cache", "pad_token_id", "is_decoder", "tie_word_embeddings", "quantization_config"):
        VJEPA2ACConfig(**{name: None})


@pytest.mark.parametrize("key", ["auto_step", "pred_hiden_size", "los_type", "hiden_size", "normalise_features"])
def test_slips_of_persons_are_refused_with_the_nearest_key(tmp_path, key):
    with pytest.raises(ValueError, match=f"unknown key '{key}'.*did you mean"):
        tiny_config(**{key: 1})
    tiny_model().save_pretrained(tmp_path)
    if key != "hiden_size":  # too far from any key of ours for a file that transformers has saved
        saved = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(saved | {key: 1}))
        with pytest.raises(ValueError, match=f"unknown key '{key}'.*did you mean"):
            VJEPA2ACModel.from_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises((ValueError, TypeError), match=key):
        VJEPA2ACModel.from_pretrained(tmp_path, **{key: 1})


@pytest.mark.parametrize("cls", HEADS)
def test_a_head_loaded_as_a_model_says_what_it_is(tmp_path, cls):
    tiny_head(cls).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"a head over features, .*{cls.config_class.model_type}.*{cls.__name__}"):
        VJEPA2ACModel.from_pretrained(tmp_path)
    other = HEADS[HEADS.index(cls) - 1]
    with pytest.raises(ValueError, match=f"a head over features.*{cls.__name__}"):
        other.from_pretrained(tmp_path)


def test_another_model_is_refused_by_its_kind(tmp_path):
    VJEPA2Config(hidden_size=48, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another kind of model, model_type 'vjepa2'"):
        VJEPA2ACConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", [VJEPA2ACModel, *HEADS])
def test_return_dict_and_internals(cls):
    model = tiny_model() if cls is VJEPA2ACModel else tiny_head(cls)
    inputs = random_inputs() if cls is VJEPA2ACModel else head_inputs(cls)
    expected = model(**inputs)
    model.config.return_dict = False
    for found in (model(**inputs), model(**inputs, return_dict=False)):
        assert isinstance(found, tuple) and len(found) == len(expected.to_tuple())
        assert torch.equal(found[0], expected.loss)
    assert torch.equal(model(**inputs, return_dict=True).loss, expected.loss)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match="not computed: hook model.encoder.layer"):
            model(**inputs, **{name: True})


# Gradient checkpointing.


def gradients(model, run) -> dict:
    model.zero_grad()
    run().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("what", ["loss", "rollout"])
def test_checkpointed_gradients_of_the_model_are_exact(use_reentrant, what):
    model, inputs = tiny_model().train(), random_inputs()
    if what == "loss":
        run = lambda: model(**inputs, auto_steps=4).loss  # noqa: E731
    else:
        weight = torch.randn(N, D, generator=torch.Generator().manual_seed(5))
        arguments = (inputs["features"][:, :3], inputs["actions"], inputs["states"])
        run = lambda: (model.rollout(*arguments) * weight).mean()  # noqa: E731
    expected = gradients(model, run)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    found = gradients(model, run)
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("cls", TRAINED_THROUGH)
@pytest.mark.parametrize("source", ["encoder", "predictor"])
def test_checkpointed_gradients_of_heads_and_trained_encoders_are_exact(use_reentrant, cls, source):
    model = tiny_head(cls, features_from=source, freeze_encoder=False).train()
    inputs = head_inputs(cls)
    inputs["pixel_values_videos"] = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    del inputs["features"]
    expected = gradients(model, lambda: model(**inputs).loss)
    assert any(n.startswith("vjepa2_ac.encoder") for n in expected)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    found = gradients(model, lambda: model(**inputs).loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(("cls", "freeze"), [*((c, True) for c in HEADS), *((c, False) for c in TRAINED_THROUGH)])
def test_trained_encoders_and_head_layers_are_checkpointed(cls, freeze):
    """A layer that is checkpointed computes twice: in the forward pass, and again for the gradients."""
    model = tiny_head(cls, freeze_encoder=freeze).train()
    layers = {n: m for n, m in model.named_modules() if n.split(".")[-2:-1] in (["layer"], ["layers"])}
    runs = dict.fromkeys(layers, 0)
    for name, layer in layers.items():
        norm = layer.norm1

        def count(module, args, name=name):
            runs[name] += 1

        norm.register_forward_pre_hook(count)
    model.activation_checkpointing_enable()
    inputs = head_inputs(cls) | {"pixel_values_videos": torch.randn(2, 16, 3, 32, 32)}
    del inputs["features"]
    model(**inputs).loss.backward()
    assert any(".encoder." in n for n in layers) and any(n.startswith("head.") for n in layers)
    assert runs == {n: 1 if freeze and ".encoder." in n else 2 for n in layers}
    assert not any(m.training for m in model.vjepa2_ac.encoder.modules() if "Dropout" in type(m).__name__)


def test_adapters_get_gradients_with_reentrant_checkpointing():
    """As PEFT does it: all weights frozen but a new one between the layers, inputs made to require gradients."""
    model, inputs = tiny_model().train(), random_inputs()
    model.requires_grad_(False)
    trained = model.predictor.layers[0].mlp.fc1.weight
    trained.requires_grad_(True)
    expected = gradients(model, lambda: model(**inputs).loss)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    found = gradients(model, lambda: model(**inputs).loss)
    assert list(found) == ["predictor.layers.0.mlp.fc1.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


# Offloading: accelerate's hooks bring weights in for one call of a module, and inputs to where it computes.


@pytest.mark.parametrize("method", ["device_map", "cpu_offload", "disk_offload"])
@pytest.mark.parametrize("cls", [VJEPA2ACModel, *HEADS, "head from predictor"])
def test_offloaded_models_give_exact_results(tmp_path, cls, method):
    source = {"features_from": "predictor"} if cls == "head from predictor" else {}
    cls = VJEPA2ACForInverseDynamics if source else cls
    model = tiny_model() if cls is VJEPA2ACModel else tiny_head(cls, **source)
    inputs = random_inputs() if cls is VJEPA2ACModel else head_inputs(cls)
    pixels = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    model.save_pretrained(tmp_path / "saved")
    if method == "device_map" and cls is VJEPA2ACModel:
        device_map = {"encoder": "cpu", "predictor": "disk"}
    elif method == "device_map":
        device_map = {"vjepa2_ac": "disk", "head": "cpu" if source else "disk"}
    with torch.no_grad():
        results = [model(**inputs)]
        inputs_of_pixels = {k: v for k, v in inputs.items() if k != "features"} | {"pixel_values_videos": pixels}
        results.append(model(**inputs_of_pixels))
        if method == "device_map":
            (tmp_path / "offload").mkdir()
            offloaded = cls.from_pretrained(
                tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offload"
            )
        elif method == "cpu_offload":
            offloaded = cls.from_pretrained(tmp_path / "saved")
            cpu_offload(offloaded, execution_device=torch.device("cpu"))
        else:
            offloaded = cls.from_pretrained(tmp_path / "saved")
            disk_offload(offloaded, tmp_path / "disk", execution_device=torch.device("cpu"))
        offloaded.eval()
        assert any(p.device.type == "meta" for p in offloaded.parameters())
        found = [offloaded(**inputs), offloaded(**inputs_of_pixels)]
        for one, expected in zip(found, results, strict=True):
            for a, b in zip(one.to_tuple(), expected.to_tuple(), strict=True):
                assert torch.equal(a, b)
        if cls is VJEPA2ACModel:
            arguments = (inputs["features"][:, :2], inputs["actions"], inputs["states"])
            assert torch.equal(offloaded.rollout(*arguments), model.rollout(*arguments))
            assert torch.equal(offloaded.encode(pixels), model.encode(pixels))


# Attention implementations.


def test_attention_of_model_and_encoder_are_chosen_apart(tmp_path):
    model = tiny_model(action_space="vpt-13")
    model.save_pretrained(tmp_path)
    asked = {"": "eager", "encoder_config": "sdpa"}
    loaded = VJEPA2ACModel.from_pretrained(tmp_path, attn_implementation=asked)
    kinds = lambda m: (m.config._attn_implementation, m.config.encoder_config._attn_implementation)  # noqa: E731
    assert kinds(loaded) == ("eager", "sdpa")
    loaded = VJEPA2ACModel.from_pretrained(tmp_path, attn_implementation={"": "sdpa", "encoder_config": "eager"})
    assert kinds(loaded) == ("sdpa", "eager")
    assert kinds(VJEPA2ACModel.from_pretrained(tmp_path, attn_implementation="eager")) == ("eager", "eager")
    assert kinds(VJEPA2ACModel.from_pretrained(tmp_path, attn_implementation="flex_attention")) == (
        "flex_attention",
        "sdpa",
    )
    with pytest.raises(ValueError, match="encoder_config must be 'sdpa' or 'eager', found 'flex_attention'"):
        VJEPA2ACModel.from_pretrained(tmp_path, attn_implementation={"encoder_config": "flex_attention"})
    for source in ("encoder", "predictor"):
        head = VJEPA2ACForInverseDynamics.from_world_model(
            VJEPA2ACModel.from_pretrained(tmp_path, attn_implementation=asked), features_from=source, **FIELDS
        )
        assert kinds(head) == ("eager", "sdpa")


def attended(run) -> set:
    """Names of the operations that compute attention while something runs."""
    from torch.profiler import profile

    with profile() as profiled, torch.no_grad():
        run()
    return {e.key for e in profiled.key_averages() if "attention" in e.key} or {"written out"}


def test_attention_set_on_a_head_is_that_of_the_layers_it_shares():
    world = tiny_model(action_space="vpt-13")
    head = VJEPA2ACForInverseDynamics.from_world_model(world, features_from="predictor", **FIELDS).eval()
    inputs = random_inputs()
    arguments = (inputs["features"][:, :-1], inputs["actions"], inputs["states"])
    assert attended(lambda: world.predict(*arguments)) != {"written out"}
    head.set_attn_implementation("eager")
    assert attended(lambda: head.vjepa2_ac.predict(*arguments)) == {"written out"}
    assert attended(lambda: head.vjepa2_ac.encode(torch.zeros(1, 16, 3, 32, 32))) == {"written out"}


def test_candidates_use_only_kernels_that_the_gpu_has(monkeypatch):
    """On a GPU, PyTorch is asked whether it has the kernel; where it has none, the context is expanded."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from vjepa_ac_hf.modeling_vjepa2_ac import attention_with_normaliser

    with FakeTensorMode():
        for dtype, width in ((torch.float16, 64), (torch.bfloat16, 512), (torch.float32, 64)):
            query = torch.empty(1, 2, 4, width, dtype=dtype, device="cuda:0")
            monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda p, **k: False)
            monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", lambda p, **k: False)
            assert attention_with_normaliser(query) is None
            monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", lambda p, **k: True)
            assert attention_with_normaliser(query) is not None


# Export and compilation.


@pytest.mark.slow
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("cls", [VJEPA2ACModel, *HEADS])
def test_export_with_a_dynamic_batch(cls, labels):
    if cls is VJEPA2ACModel:
        model, inputs = tiny_model(), random_inputs() | {"return_loss": labels}
        other = {k: torch.cat([v, v[:1] * 2]) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    else:
        model, inputs, other = tiny_head(cls), head_inputs(cls, labels), head_inputs(cls, labels, batch=3)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {k: {0: batch} if isinstance(v, torch.Tensor) else None for k, v in inputs.items()}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
    for case in (inputs, other):
        found, expected = program.module()(**case), model(**case)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_export_from_pixels_with_a_dynamic_batch():
    model, inputs = tiny_model(), random_inputs()
    inputs["pixel_values_videos"] = torch.randn(2, 16, 3, 32, 32)
    del inputs["features"]
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (), inputs, dynamic_shapes={k: {0: batch} for k in inputs})
    other = {k: torch.cat([v, v[:1] * 2]) for k, v in inputs.items()}
    torch.testing.assert_close(program.module()(**other).loss, model(**other).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cls", HEADS)
def test_heads_with_labels_compile_without_graph_breaks(cls):
    model, inputs = tiny_head(cls), head_inputs(cls)
    expected = model(**inputs)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
