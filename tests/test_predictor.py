"""The predictor against the straightforward implementation, its attention kernels, caches, candidates and limits."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers_models import golden_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_modeling import A, B, D, N, S, T, random_inputs, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache, VJEPA2Config

from vjepa_ac_hf import VJEPA2ACModel
from vjepa_ac_hf.convert_vjepa2_ac_to_hf import convert_predictor_state_dict
from vjepa_ac_hf.modeling_vjepa2_ac import (
    eager_frame_causal_attention,
    frame_causal_block_mask,
    sdpa_frame_causal_attention,
    shared_context_attention,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from straightforward import StraightforwardPredictor  # noqa: E402

K = N + 2


def straightforward(model) -> StraightforwardPredictor:
    oracle = StraightforwardPredictor(model.config)
    oracle.load_state_dict(model.predictor.state_dict())
    return oracle


def assert_relatively_close(found, expected, tolerance=1e-5):
    """Largest difference over the largest expected value."""
    assert found.shape == expected.shape
    difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert difference <= tolerance, difference


# ---------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("name", ["ac_predictor_l1_auto2.safetensors", "ac_predictor_l2_auto4.safetensors"])
def test_the_straightforward_implementation_is_the_official_one(name):
    with safe_open(ROOT / "tests" / "golden" / name, "pt") as file:
        sizes = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    oracle = StraightforwardPredictor(golden_config(sizes))
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    oracle.load_state_dict(convert_predictor_state_dict(weights), strict=True)
    features = tensors["input.features"].unflatten(1, (sizes["num_tubelets"], -1))
    losses = oracle.losses(features, tensors["input.actions"], tensors["input.states"], sizes["auto_steps"])
    for loss, official in zip(losses, ("loss.teacher_forcing", "loss.rollout"), strict=True):
        torch.testing.assert_close(loss / sizes["loss_exponent"], tensors[official], rtol=0, atol=1e-5)
    predicted = oracle.predict(features[:, :-1], tensors["input.actions"], tensors["input.states"][:, :-1])
    torch.testing.assert_close(predicted.flatten(1, 2), tensors["output.teacher_forcing"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("auto_steps", range(1, T))
@pytest.mark.parametrize(("loss_type", "checkpointing"), [("mse", False), ("l1", False), ("mse", True)])
def test_losses_outputs_and_all_gradients_equal_the_oracles(auto_steps, loss_type, checkpointing):
    model, inputs = tiny_model(loss_type=loss_type), random_inputs()
    oracle = straightforward(model)
    if checkpointing:
        model.train()
        model.activation_checkpointing_enable()
    output = model(**inputs, auto_steps=auto_steps)
    output.loss.backward()
    losses = oracle.losses(inputs["features"], inputs["actions"], inputs["states"], auto_steps)
    sum(losses).backward()
    assert_relatively_close(output.teacher_forcing_loss, losses[0])
    assert_relatively_close(output.rollout_loss, losses[1])
    with torch.no_grad():
        rollout = oracle.rollout(inputs["features"][:, :1], inputs["actions"][:, :auto_steps], inputs["states"])
    assert_relatively_close(output.rollout_features, rollout)
    expected = dict(oracle.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in expected.values())
    for name, parameter in model.predictor.named_parameters():
        reference = expected[name].grad
        assert reference.abs().max() > 0
        # Keys' biases have no gradient but rounding: relative to the largest gradient they must vanish too.
        error = (parameter.grad - reference).abs().max()
        assert error <= 1e-5 * max(reference.abs().max(), 1e-2 * largest), (name, error)


# ---------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize(("steps", "per_step"), [(1, 6), (5, 6), (3, 66), (2, 130), (4, 100)])
def test_attention_kernels_agree(past, steps, per_step):
    generator = torch.Generator().manual_seed(steps * per_step + past)
    q = torch.randn(2, 2, steps * per_step, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, (past + steps) * per_step, 16, generator=generator)
    expected = eager_frame_causal_attention(q, k, v, per_step)
    torch.testing.assert_close(sdpa_frame_causal_attention(q, k, v, per_step), expected, rtol=1e-5, atol=1e-5)
    mask = frame_causal_block_mask(q.shape[2], k.shape[2], per_step, q.device)
    step = torch.arange(k.shape[2]) // per_step
    seen = (step[past * per_step :, None] >= step).float()
    dense = mask.to_dense()[0, 0].bool()
    blocks = torch.nn.functional.pad(seen, (0, -seen.shape[1] % 128, 0, -seen.shape[0] % 128))
    blocks = blocks.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).amax(dim=(1, 3)).bool()
    assert torch.equal(dense, blocks), "a block is there where, and only where, something in it is seen"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("how", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_flex_attention_equals_the_definition(how, monkeypatch):
    if how == "eager":
        from torch.nn.attention.flex_attention import flex_attention

        import vjepa_ac_hf.modeling_vjepa2_ac as modeling

        monkeypatch.setattr(modeling, "compiled_flex_attention", lambda: flex_attention)
    model, inputs = tiny_model(), random_inputs()
    with torch.no_grad():
        expected = model(**inputs)
        model.set_attn_implementation("flex_attention")
        assert model.config._attn_implementation == "flex_attention"
        found = model(**inputs)
    torch.testing.assert_close(found.predicted_features, expected.predicted_features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.rollout_features, expected.rollout_features, rtol=1e-5, atol=1e-5)


def test_implementations_are_chosen_as_in_transformers_and_refused_with_reasons(tmp_path):
    model, inputs = tiny_model(), random_inputs()
    model.save_pretrained(tmp_path)
    eager = VJEPA2ACModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == eager.config.encoder_config._attn_implementation == "eager"
    pixels = torch.randn(1, 16, 3, 32, 32)
    torch.testing.assert_close(eager.encode(pixels), model.encode(pixels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(eager(**inputs).loss, model(**inputs).loss)
    flex = VJEPA2ACModel.from_pretrained(tmp_path, attn_implementation="flex_attention")
    assert flex.config.encoder_config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="'flex_attention' has no gradients on a CPU; use 'sdpa'"):
        flex(**inputs)
    with pytest.raises(ValueError, match="flash_attention_2.*cannot be used: attention is frame-causal.*'sdpa'"):
        VJEPA2ACModel.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")


@pytest.mark.parametrize("what", ["forward", "rollout", "candidates"])
def test_no_graph_breaks(what):
    """fullgraph=True raises where the graph breaks; the aot_eager backend traces forward and backward."""
    torch._dynamo.reset()
    model, inputs = tiny_model(), random_inputs()
    context = inputs["features"][:, :2]
    if what == "forward":
        expected = model(**inputs).loss
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss
        found.backward()
        assert all(p.grad is not None for p in model.predictor.parameters())
    elif what == "rollout":
        with torch.no_grad():
            expected = model.rollout(context, inputs["actions"], inputs["states"])
            compiled = torch.compile(model.rollout, fullgraph=True, backend="aot_eager")
            found = compiled(context, inputs["actions"], inputs["states"])
    else:
        features, actions, states = candidate_inputs(3, context=2)
        with torch.no_grad():
            expected = model.predictor(features, actions[:, 0, :2], states[:, 0, :2])[0]
            compiled = torch.compile(model.predictor, fullgraph=True, backend="aot_eager")
            found = compiled(features, actions[:, 0, :2], states[:, 0, :2])[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_by_inductor_equals_eager():
    torch._dynamo.reset()
    model, inputs = tiny_model(), random_inputs()
    expected = model(**inputs)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.predictor.named_parameters()}
    model.zero_grad()
    found = torch.compile(model, fullgraph=True)(**inputs)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    for name, parameter in model.predictor.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- caches


@given(first=st.integers(1, 3), second=st.integers(1, 3), horizon=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_a_cache_continues_where_it_was(first, second, horizon):
    """Two calls over a cache equal one over the whole context; imagined steps are taken off by `crop`."""
    model, inputs = tiny_model(), random_inputs(steps=10)
    features, actions, states = inputs["features"], inputs["actions"], inputs["states"]
    with torch.no_grad():
        cache = DynamicCache()
        model.rollout(features[:, :first], actions[:, : first + 1], states, past_key_values=cache)
        assert cache.get_seq_length() == (first + 1) * K
        cache.crop(-K)  # the imagined step
        total = first + second
        found = model.rollout(
            features[:, first:total],
            actions[:, first : total - 1 + horizon],
            states[:, first:],
            past_key_values=cache,
        )
        expected = model.rollout(features[:, :total], actions[:, : total - 1 + horizon], states)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_caches_of_something_else_are_refused():
    model, inputs = tiny_model(), random_inputs()
    features, actions, states = inputs["features"][:, :1], inputs["actions"][:, :1], inputs["states"]

    def cache_of(model, batch=B):
        cache = DynamicCache()
        with torch.no_grad():
            model.rollout(features[:batch], actions[:batch], states[:batch], past_key_values=cache)
        return cache

    def refused(cache, match):
        with pytest.raises(ValueError, match=match):
            model.rollout(features, actions, states, past_key_values=cache)

    refused(cache_of(tiny_model(pred_num_hidden_layers=3)), "another model or batch: expected 2 layers.*found 3")
    refused(cache_of(tiny_model(pred_num_attention_heads=3)), r"expected 2 layers.*\(2, 2, 24,.*\(2, 3, 16,")
    refused(cache_of(model, batch=1), r"expected 2 layers.*\(2, 2, 24,.*\(1, 2, 24,")
    torn = cache_of(model)
    torn.crop(-1)
    refused(torn, r"whole steps of 6 tokens, found \[5\] tokens")
    refused([(torch.zeros(1), torch.zeros(1))], "must be a transformers.DynamicCache, found list")
    static = StaticCache(config=VJEPA2Config(num_hidden_layers=1), max_cache_len=8)
    refused(static, "must be a transformers.DynamicCache, found StaticCache")
    model.train()
    model.activation_checkpointing_enable()
    refused(DynamicCache(), "training with gradient checkpointing")


def test_contexts_longer_than_the_clip_extend_the_rotary_tables():
    model, inputs = tiny_model(), random_inputs(steps=40)
    with torch.no_grad():
        model(**random_inputs())  # tables of a clip's length are there
        found = model.predict(inputs["features"][:, :-1], inputs["actions"], inputs["states"])
        expected = straightforward(model).predict(
            inputs["features"][:, :-1], inputs["actions"], inputs["states"][:, :-1]
        )
    assert_relatively_close(found, expected)


# ---------------------------------------------------------------------------------------------------- candidates


def candidate_inputs(candidates: int, context: int = 3, horizon: int = 3, batch: int = B):
    generator = torch.Generator().manual_seed(candidates)
    features = torch.randn(batch, context, N, D, generator=generator)
    actions = torch.randn(batch, candidates, context - 1 + horizon, A, generator=generator)
    states = torch.randn(batch, candidates, context - 1 + horizon, S, generator=generator)
    actions[:, :, : context - 1] = actions[:, :1, : context - 1]
    states[:, :, :context] = states[:, :1, :context]
    return features, actions, states


def one_by_one(model, features, actions, states):
    rollouts = [model.rollout(features, actions[:, m], states[:, m]) for m in range(actions.shape[1])]
    return torch.stack(rollouts, dim=1)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 6))
@settings(max_examples=15, deadline=None)
def test_candidates_equal_rollouts_one_by_one(candidates, context, horizon, batch, chunk):
    model = tiny_model()
    features, actions, states = candidate_inputs(candidates, context, horizon, batch)
    limit = None if chunk == 0 else chunk * batch * K
    with torch.no_grad():
        found = model.rollout(features, actions, states, max_batch_tokens=limit)
        expected = one_by_one(model, features, actions, states)
    assert found.shape == (batch, candidates, horizon, N, D)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_candidates():
    model = tiny_model()
    features, actions, states = candidate_inputs(3)
    gradients = []
    for roll in (model.rollout, lambda *inputs: one_by_one(model, *inputs)):
        leaf = actions.clone().requires_grad_()
        mask = torch.ones_like(leaf)
        mask[:, :, :2] = 0  # the context's actions stay shared
        rolled = roll(features, actions + (leaf - actions) * mask, states)
        # Not the mean square, which normalisation makes the same for all outputs: its gradients would be nothing.
        (rolled * torch.linspace(-1, 1, rolled.numel()).reshape(rolled.shape).sin()).sum().backward()
        gradients.append(leaf.grad)
    assert gradients[1][:, :, 2:].abs().max() > 1e-2
    assert_relatively_close(*gradients)


def test_bfloat16_candidates():
    model = tiny_model()
    features, actions, states = candidate_inputs(4)
    with torch.no_grad():
        expected = model.rollout(features, actions, states)
        found = model.to(torch.bfloat16).rollout(features, actions, states)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.15)


class Elements(TorchDispatchMode):
    """Largest number of elements of any tensor made, and every shape."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.shapes.add(tuple(tensor.shape))
        return result


def test_the_contexts_keys_and_values_are_not_copied_for_each_candidate_and_parts_bound_memory():
    model = tiny_model(pred_num_hidden_layers=1)
    candidates, context = 6, 5
    inputs = candidate_inputs(candidates, context=context, horizon=2, batch=1)

    def largest(**options):
        with Elements() as made, torch.no_grad():
            model.rollout(*inputs, **options)
        return made.shapes

    shapes = largest()
    assert not [s for s in shapes if len(s) == 4 and s[0] == candidates and s[2] >= (context - 1) * K]
    assert (candidates, K, 48) in shapes
    parts = largest(max_batch_tokens=2 * K)
    assert (candidates, K, 48) not in parts and (2, K, 48) in parts


def test_a_shared_context_is_attended_exactly_however_large_the_scores():
    generator = torch.Generator().manual_seed(0)
    q = 30 * torch.randn(6, 2, 5, 16, generator=generator)
    shared = torch.randn(2, 2, 2, 7, 16, generator=generator)
    own = torch.randn(2, 6, 2, 10, 16, generator=generator)
    found = shared_context_attention(q, tuple(shared), tuple(own))
    keys, values = (torch.cat([s.repeat_interleave(3, dim=0), o], dim=2) for s, o in zip(shared, own, strict=True))
    expected = ((q @ keys.mT) / 4).softmax(-1) @ values
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, a, s: (f, a, s[:, 0]), r"for candidates, actions must be .* found \(2, 3, 5, 13\) and \(2, 5, 2\)"),
        (lambda f, a, s: (f, a[:, :0], s[:, :0]), "at least one candidate"),
        (lambda f, a, s: (f, a[..., :12], s), r"actions must be.*13\), found"),
        (lambda f, a, s: (f[:, :0], a, s), "a context of 0 steps"),
        (
            lambda f, a, s: (f, a + torch.arange(3.0)[:, None, None], s),
            "actions of its first 2 steps differ",
        ),
        (
            lambda f, a, s: (f, a, s + torch.arange(3.0)[:, None, None]),
            "states of its first 3 steps differ among",
        ),
    ],
)
def test_candidates_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().rollout(*change(*candidate_inputs(3)))


def test_options_of_rollouts_that_do_not_fit_are_refused():
    model, (features, actions, states) = tiny_model(), candidate_inputs(3)
    with pytest.raises(ValueError, match=f"max_batch_tokens must be at least {B * K}.*found 5"):
        model.rollout(features, actions, states, max_batch_tokens=5)
    with pytest.raises(ValueError, match="candidates .* take no past_key_values"):
        model.rollout(features, actions, states, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="max_batch_tokens divides candidates"):
        model.rollout(features, actions[:, 0], states[:, 0], max_batch_tokens=100)


@pytest.mark.parametrize("name", ["features", "actions", "states"])
def test_other_devices_and_types_are_refused_by_name(name):
    inputs = random_inputs()
    with pytest.raises(ValueError, match=f"{name} are on meta, the predictor is on cpu"):
        tiny_model()(**{**inputs, name: inputs[name].to("meta")})
    with pytest.raises(ValueError, match=f"{name} must be floating-point numbers.*found torch.int64"):
        tiny_model()(**{**inputs, name: inputs[name].long()})


# ---------------------------------------------------------------------------------------------------- cost


def flops(call) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def test_the_cost_of_a_rollout_step_grows_linearly_with_its_context():
    model = tiny_model()
    model.set_attn_implementation("eager")  # matrix products that are counted
    inputs = random_inputs(steps=20)
    costs = {}
    for context in (1, 2, 4, 8, 16):
        _, past = model.predictor(*(inputs[k][:, :context] for k in ("features", "actions", "states")))
        step = [inputs[k][:, context : context + 1] for k in ("features", "actions", "states")]
        costs[context] = flops(lambda step=step, past=past, context=context: model.predictor(*step, past, context))
    slopes = {(costs[b] - costs[a]) / (b - a) for a, b in ((1, 2), (2, 4), (4, 8), (8, 16))}
    assert len(slopes) == 1 and slopes.pop() > 0, costs


def test_a_training_rollout_costs_single_steps_and_candidates_share_their_context():
    model, inputs = tiny_model(), random_inputs()
    model.set_attn_implementation("eager")
    dense = {auto_steps: flops(lambda k=auto_steps: model(**inputs, auto_steps=k)) for auto_steps in (1, 4)}
    whole = flops(lambda: model.predict(inputs["features"][:, :-1], inputs["actions"], inputs["states"]))
    assert dense[1] == whole, "the rollout's first step is teacher forcing's"
    assert dense[4] - dense[1] < 3 * whole / 7 + whole / 20, "three single steps, not three prefixes"
    features, actions, states = candidate_inputs(8, context=5, horizon=1)
    shared = flops(lambda: model.rollout(features, actions, states))
    apart = flops(lambda: one_by_one(model, features, actions, states))
    assert shared < apart / 3


@pytest.mark.parametrize("loss_type", ["mse", "l1"])
def test_targets_and_given_features_are_detached(loss_type):
    model = tiny_model(loss_type=loss_type)
    inputs = random_inputs()
    inputs["features"].requires_grad_()
    output = model(**inputs)
    assert output.loss.requires_grad and not output.target_features.requires_grad
    assert torch.autograd.grad(output.loss, [inputs["features"]], allow_unused=True) == (None,)


def kept_for_backward(call) -> dict[int, tuple[int, tuple[int, ...]]]:
    """Bytes and shape of every storage that autograd keeps, each once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output
    return kept


def test_training_keeps_nothing_quadratic_and_less_than_the_oracle_without_its_mask():
    totals = {}
    for count in (6, 12):
        model = tiny_model(pred_num_hidden_layers=2, frames_per_clip=2 * count).train()
        oracle = straightforward(model)
        inputs = random_inputs(steps=count)
        length = (count - 1) * K
        ours = kept_for_backward(lambda m=model, i=inputs: m(**i, auto_steps=2).loss)
        theirs = kept_for_backward(lambda o=oracle, i=inputs: sum(o.losses(**i, auto_steps=2)))
        assert not [shape for _, shape in ours.values() if shape.count(length) > 1]
        masks = [nbytes for nbytes, shape in theirs.values() if shape[-2:] == (length, length)]
        assert masks, "the oracle is supposed to have one"
        totals[count] = sum(nbytes for nbytes, _ in ours.values())
        assert totals[count] <= sum(nbytes for nbytes, _ in theirs.values()) - sum(masks)
    assert totals[12] - totals[6] < 1.1 * totals[6], "linear in the number of steps"


def test_the_encoder_is_neither_built_nor_initialised_for_a_pretrained_one(tmp_path, monkeypatch):
    from transformers import VJEPA2Model

    VJEPA2Model(tiny_config().encoder_config).save_pretrained(tmp_path)
    made = []
    original = torch.nn.Linear.reset_parameters
    monkeypatch.setattr(
        torch.nn.Linear,
        "reset_parameters",
        lambda self: made.append(self.weight.device.type) or original(self),
    )
    config = copy.deepcopy(tiny_config())
    model = VJEPA2ACModel.from_pretrained_encoder(tmp_path, config, dtype=torch.bfloat16)
    assert set(made) == {"meta"}, "nothing was allocated but what the checkpoint filled"
    assert model.encoder.layer[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert model.predictor.head.weight.dtype == torch.float32
    weights = model.predictor.layers[0].attention.qkv.weight
    assert 0.015 < weights.std() < 0.025 and not model.predictor.head.bias.any()


def test_the_benchmark_compares_the_same_numbers(tmp_path, monkeypatch, capsys):
    import predictor as benchmark

    sizes = ["--width", "48", "--heads", "2", "--tokens", "4", "--depth", "1", "--rollout_depth", "1", "--steps", "4"]
    counts = ["--candidates", "3", "--horizon", "2", "--repeats", "1", "--auto_steps", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["predictor.py", *sizes, *counts, "--output", str(tmp_path / "results.json")])
    monkeypatch.setattr(benchmark, "peak_memory", lambda *_: 2**20)  # that takes processes of their own
    benchmark.main()
    results = json.loads((tmp_path / "results.json").read_text())
    training, candidates = results["rows"]
    assert training["losses"]["ours"] == pytest.approx(training["losses"]["baseline"], rel=1e-5)
    assert candidates["largest_difference"] < 1e-5
    assert set(results["rollout_step_seconds"]) == {"1", "2", "4", "8", "16"}
    assert "| training step, auto_steps 2 |" in capsys.readouterr().out
    # What is counted is what the mathematics needs: here without attention, which torch's counter does not see.
    monkeypatch.setattr(sys, "argv", ["predictor.py", *sizes, *counts])
    arguments = benchmark.parse_arguments()
    model, _ = benchmark.build(arguments, arguments.depth)
    inputs = {"features": (1, 4, 4, 48), "actions": (1, 3, 13), "states": (1, 4, 2)}
    counted = flops(lambda: model(**{name: torch.randn(shape) for name, shape in inputs.items()}, auto_steps=2))
    attention = 4 * K * K * (1 + 2 + 3 + 2) * 48
    assert benchmark.model_flops(arguments, 2) / 3 - attention == pytest.approx(counted, rel=0.03)
