"""The head that tells steps between two views: learnt from synthetic sequences, and as a plan's cost."""

import json

import numpy as np
import pytest
import python_forks
import torch
from helpers_models import WITHOUT_PACKAGE
from test_modeling import tiny_model
from transformers import AutoModel

from vjepa_ac_hf import VJEPA2ACForInverseDynamics, VJEPA2ACForTemporalDistance, VJEPA2ACModel
from vjepa_ac_hf.evaluation.head_figures import distance_figures, rank_correlation
from vjepa_ac_hf.planning import DistanceCost
from vjepa_ac_hf.training.heads import TASKS, head_inputs

SMALL = {"head_hidden_size": 16, "head_num_hidden_layers": 1, "head_num_attention_heads": 2}


def make_head(**fields):
    torch.manual_seed(0)
    return VJEPA2ACForTemporalDistance.from_world_model(tiny_model(), **SMALL, **fields)


def walks(count, steps, tokens, width, generator):
    """Features that circle at one speed, from a random start, in a plane of their own for each clip."""
    start = torch.rand(count, 1, generator=generator) * 6.28
    phase = start + 0.9 * torch.arange(steps)
    plane = torch.nn.functional.normalize(torch.randn(count, 2, tokens, width, generator=generator), dim=-1)
    return (width**0.5) * (phase.cos()[..., None, None] * plane[:, :1] + phase.sin()[..., None, None] * plane[:, 1:])


def test_the_loss_by_hand():
    model = make_head().eval()
    steps, tokens, width = 3, model.config.num_tokens, model.config.feature_size
    features = torch.randn(3, steps, tokens, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(features=features, return_loss=True)
        terms = []
        for clip in range(3):
            for i in range(steps):
                for j in range(i, steps):
                    pairs = [(features[clip, i], features[clip, j]), (features[clip, j], features[clip, i])]
                    told = sum(float(model.head(one[None], other[None])) for one, other in pairs) / 2
                    assert float(output.distances[clip, i, j]) == pytest.approx(told, abs=1e-4)
                    assert output.distances[clip, i, j] == output.distances[clip, j, i]
                    terms.append((told, j - i))
                other = features[clip - 1, i]
                pairs = [(features[clip, i], other), (other, features[clip, i])]
                terms.append((sum(float(model.head(a[None], b[None])) for a, b in pairs) / 2, model.config.num_steps))
    huber = [0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5 for a, b in terms]
    assert float(output.loss) == pytest.approx(sum(huber) / len(huber), rel=1e-4)
    assert model(features=features).loss is None
    assert model(features=features[:1], return_loss=True).loss.isfinite()  # no other clip


def test_a_head_learns_steps_and_that_other_clips_are_far():
    """Of clips in planes that it has not seen: more steps apart, and further from other clips than any two of one."""
    model = make_head().train()
    steps, tokens, width = 4, model.config.num_tokens, model.config.feature_size
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=3e-3)
    for _ in range(50):
        loss = model(features=walks(8, steps, tokens, width, generator), return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        held_out = walks(8, steps, tokens, width, generator)
        told = model(features=held_out).distances
        other = model.distance(held_out.flatten(0, 1), held_out.roll(1, dims=0).flatten(0, 1))
    first, second = np.triu_indices(steps, 1)
    true = np.tile(second - first, 8)
    assert rank_correlation(told[:, first, second].flatten().numpy(), true) > 0.6
    same = torch.diagonal(told, dim1=1, dim2=2)
    assert float(same.mean()) < 1 and float(other.mean()) > steps


def test_rank_correlation_and_figures_by_hand():
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([10.0, 20, 15])) == pytest.approx(0.5)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    ties = rank_correlation(np.array([0.0, 1, 1, 2]), np.array([0.0, 1, 2, 3]))
    assert ties == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert rank_correlation(np.ones(3), np.arange(3.0)) is None
    told, features, true = np.array([1.0, 3, 2, 4]), np.array([0.2, 0.1, 0.4, 0.3]), np.array([1.0, 1, 2, 3])
    figures = distance_figures(told, features, true)
    assert figures["pairs"] == 4 and figures["mae"] == pytest.approx((0 + 2 + 0 + 1) / 4)
    assert figures["mae_of_mean"] == pytest.approx((0.75 + 0.75 + 0.25 + 1.25) / 4)
    assert figures["by_steps"]["1"] == {
        "pairs": 2,
        "told": 2.0,
        "told_std": 1.0,
        "features": pytest.approx(0.15),
    }


def test_it_is_saved_loaded_and_trained_like_the_others(tmp_path):
    model = make_head(training_clips=7).eval()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is VJEPA2ACForTemporalDistance and again.config.training_clips == 7
    features = torch.randn(2, model.config.num_steps, model.config.num_tokens, model.config.feature_size)
    torch.testing.assert_close(again.eval()(features=features).distances, model(features=features).distances)
    assert TASKS["temporal_distance"] is VJEPA2ACForTemporalDistance
    assert head_inputs(model, {"features": features}, None) == {"features": features, "return_loss": True}
    code = (
        WITHOUT_PACKAGE + "from transformers import AutoModel\n"
        f"print(type(AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)).__name__)\n"
    )
    done = python_forks.run(["-c", code])
    assert done.stdout.strip() == "VJEPA2ACForTemporalDistance", done.stderr
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vjepa2_ac_temporal_distance"


def test_a_cost_is_what_the_head_tells_of_the_last_step():
    world = tiny_model()
    head = VJEPA2ACForTemporalDistance.from_world_model(world, **SMALL, training_clips=1).eval()
    tokens, width = world.config.num_tokens, world.config.feature_size
    goal, features = torch.randn(tokens, width), torch.randn(5, 2, tokens, width)
    costs = DistanceCost(head, world, goal)(features, torch.zeros(5, 2, 38))
    expected = [head.distance(f[None], goal[None])[0] for f in features[:, 1]]
    torch.testing.assert_close(costs, torch.stack(expected))


def test_distances_that_are_not_to_be_asked():
    world = tiny_model()
    goal = torch.randn(world.config.num_tokens, world.config.feature_size)
    new = VJEPA2ACForTemporalDistance.from_world_model(world, **SMALL)
    with pytest.raises(ValueError, match=r"was not trained: its config.training_clips is None, expected the number"):
        DistanceCost(new, world, goal)
    other = VJEPA2ACForInverseDynamics.from_world_model(world, action_space=["yaw_delta"], **SMALL)
    for wrong in (other, world):
        with pytest.raises(ValueError, match=f"told by VJEPA2ACForTemporalDistance .*found {type(wrong).__name__}"):
            DistanceCost(wrong, world, goal)
    trained = VJEPA2ACForTemporalDistance.from_world_model(world, **SMALL, training_clips=1)
    torch.manual_seed(5)
    another = VJEPA2ACModel(world.config)
    with torch.no_grad():
        another.encoder.layernorm.bias.add_(1.0)
    with pytest.raises(ValueError, match=r"the head was trained on another encoder, checksum \w{8}, the model's \w{8}"):
        DistanceCost(trained, another, goal)
    with pytest.raises(ValueError, match="to one goal"):
        DistanceCost(trained, world, goal[None])
