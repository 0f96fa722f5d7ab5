"""Heads: what the token matching computes, losses and weights by hand, causality, freezing, saving, bad input."""

from unittest.mock import Mock

import numpy as np
import pytest
import python_forks
import torch
import torch.nn.functional as F
from helpers_models import WITHOUT_PACKAGE
from safetensors.torch import save_file
from test_modeling import tiny_config, tiny_model
from transformers import AutoModel, AutoModelForVideoClassification, VJEPA2Config

from vjepa_ac_hf import (
    ACTION_SPACES,
    VJEPA2ACConfig,
    VJEPA2ACForActionAnticipation,
    VJEPA2ACForInverseDynamics,
    VJEPA2ACForVideoClassification,
    VJEPA2ACModel,
    VJEPA2ACProcessor,
)
from vjepa_ac_hf.configuration_heads_vjepa2_ac import VJEPA2ACInverseDynamicsConfig, VJEPA2ACVideoClassificationConfig
from vjepa_ac_hf.modeling_heads_vjepa2_ac import VJEPA2ACTokenMatching, binary_pos_weight

B, T, N, D = 2, 8, 4, 48
SMALL = {"head_hidden_size": 32, "head_num_hidden_layers": 1, "head_num_attention_heads": 2}
STATISTICS = {
    "columns": ["mouse_dx", "mouse_dy", "yaw_delta", "pitch_delta"],
    "count": 9,
    "mean": [1.0, -2.0, 3.0, 0.5],
    "std": [100.0, 30.0, 15.0, 4.0],
}


def head(cls, space="vpt-38", **kwargs):
    """A head over a tiny world model, every parameter away from its initial zeros and ones."""
    extra = {} if cls is VJEPA2ACForVideoClassification else {"action_space": space}
    torch.manual_seed(1)
    model = cls.from_world_model(tiny_model(), **SMALL, **extra, **kwargs).eval()
    for parameter in model.head.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def random_features(seed=0, steps=T, batch=B):
    return torch.randn(batch, steps, N, D, generator=torch.Generator().manual_seed(seed))


def random_actions(seed=0, steps=T - 1, batch=B, columns=ACTION_SPACES["vpt-38"]):
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randn(batch, steps, len(columns), generator=generator)
    for i, column in enumerate(columns):
        if column not in STATISTICS["columns"]:
            actions[..., i] = (actions[..., i] > 0.8).float()
    slots = [i for i, c in enumerate(columns) if c.startswith("hotbar.")]
    if len(slots) == 9:
        actions[..., slots] = F.one_hot(torch.randint(9, (batch, steps), generator=generator), 9).float()
    return actions


# ------------------------------------------------------------------------------------------------- token matching


def shifted_textures(count, seed, size=32, span=6):
    """Clips of two tubelets: a random texture, then the same `(dx, dy)` pixels further along; and the shifts."""
    generator = torch.Generator().manual_seed(seed)
    edge = size + 2 * span
    textures = F.interpolate(torch.rand(count, 3, edge // 4, edge // 4, generator=generator), size=(edge, edge))
    shifts = torch.randint(-span, span + 1, (count, 2), generator=generator)
    windows = [
        torch.stack([t[:, span + y : span + y + size, span + x : span + x + size] for x, y in ((0, 0), (dx, dy))])
        for t, (dx, dy) in zip(textures, shifts.tolist(), strict=True)
    ]
    return (torch.stack(windows).repeat_interleave(2, dim=1) - 0.5) / 0.25, shifts.float() / shifts.float().std()


def test_inverse_dynamics_learns_shifts_of_textures_it_has_not_seen():
    """A frozen random encoder and 192 textures are enough, because the head matches tokens."""
    torch.manual_seed(0)
    encoder = VJEPA2Config(
        crop_size=32, patch_size=4, hidden_size=48, num_hidden_layers=1, num_attention_heads=2, frames_per_clip=16
    )
    sizes = {"pred_hidden_size": 48, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}
    world = VJEPA2ACModel(VJEPA2ACConfig(encoder_config=encoder, frames_per_clip=4, auto_steps=1, **sizes))
    space = ["yaw_delta", "pitch_delta"]
    model = VJEPA2ACForInverseDynamics.from_world_model(
        world, action_space=space, head_hidden_size=64, head_num_hidden_layers=1
    )
    (clips, shifts), (new_clips, new_shifts) = shifted_textures(192, seed=1), shifted_textures(96, seed=2)
    features, new_features = world.encode(clips), world.encode(new_clips)
    optimizer = torch.optim.AdamW(model.head.parameters())
    for step in range(60):
        picked = torch.arange(16) + 16 * (step % 12)
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (60 - step) / 30)
        loss = model(features=features[picked], labels=shifts[picked, None]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        told = model(features=new_features).continuous[:, 0]
    r2 = 1 - (told - new_shifts).square().sum(dim=0) / (new_shifts - new_shifts.mean(dim=0)).square().sum(dim=0)
    assert r2.min() > 0.8, r2


def matching(grid: int) -> VJEPA2ACTokenMatching:
    config = tiny_config()
    config.encoder_config.crop_size = 16 * grid
    torch.manual_seed(3)
    values = {"encoder_config": config.encoder_config, "action_space": ["yaw_delta"], **SMALL}
    module = VJEPA2ACTokenMatching(VJEPA2ACInverseDynamicsConfig(**values))
    module.embed.weight.data.normal_()
    return module


def shifted_tokens(grid: int, dx: int, dy: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens on a grid, and the same moved by (dx, dy), new ones coming in at the edges."""
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(1, grid, grid, D, generator=generator) for _ in range(2))
    for y in range(grid):
        for x in range(grid):
            if 0 <= y + dy < grid and 0 <= x + dx < grid:
                after[0, y + dy, x + dx] = before[0, y, x]
    return before.flatten(1, 2), after.flatten(1, 2)


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (2, -1), (-3, 2)])
def test_matching_finds_where_every_token_went_and_came_from(dx, dy):
    grid = 6
    module = matching(grid)
    for scale in (module.token_scale, module.frame_scale):
        scale.log_scale.data.fill_(6.0)  # sharp: the likeliest match alone
    with torch.no_grad():
        field, summary = module(*shifted_tokens(grid, dx, dy))
    field = field.view(grid, grid, 2, 2, 5)  # rows, columns, heads, directions, channels
    expected = torch.tensor([dx, dy]) / (grid / 4)
    found = 0
    for y in range(grid):
        for x in range(grid):
            for direction, sign in ((0, 1), (1, -1)):
                if 0 <= x + sign * dx < grid and 0 <= y + sign * dy < grid:
                    found += 1
                    for h in range(2):
                        torch.testing.assert_close(field[y, x, h, direction, :2], expected, atol=2e-2, rtol=0)
                        assert field[y, x, h, direction, 3] > 0.95 and field[y, x, h, direction, 2] < 0.2
    assert found == 2 * (grid - abs(dx)) * (grid - abs(dy))
    for of_frame in summary.view(2, 9):  # heads
        torch.testing.assert_close(of_frame[:2], expected, atol=2e-2, rtol=0)


def test_matching_equals_loops_over_tokens_and_displacements():
    grid, unit = 3, 3 / 4
    module = matching(grid)
    generator = torch.Generator().manual_seed(5)
    before, after = (torch.randn(1, grid * grid, D, generator=generator) for _ in range(2))
    with torch.no_grad():
        field, summary = module(before, after)
    weight = module.embed.weight.detach().double().numpy()
    vectors = []
    for tokens in (before, after):
        tokens = tokens[0].double().numpy()
        embedded = ((tokens - tokens.mean(axis=0)) @ weight.T).reshape(grid * grid, 2, -1)
        vectors.append(embedded / np.linalg.norm(embedded, axis=-1, keepdims=True))
    places = [(x, y) for y in range(grid) for x in range(grid)]

    def moments(weights, displacements):
        weights = np.exp(weights - max(weights))
        weights /= weights.sum()
        mean = sum(w * np.array(d, float) for w, d in zip(weights, displacements, strict=True))
        square = sum(w * np.array(d, float) ** 2 for w, d in zip(weights, displacements, strict=True))
        return [*(mean / unit), np.sqrt(max((square - mean**2).sum(), 1e-4)) / unit, weights.max()]

    expected_field, expected_frames = np.zeros((grid * grid, 2, 2, 5)), np.zeros((2, 5))
    for h in range(2):
        q, k = vectors[0][:, h], vectors[1][:, h]
        for i, (x, y) in enumerate(places):
            ahead, back = [q[i] @ other for other in k], [other @ k[i] for other in q]
            where_to = [(u - x, v - y) for u, v in places]
            where_from = [(x - u, y - v) for u, v in places]
            expected_field[i, h, 0] = [*moments(20 * np.array(ahead), where_to), max(ahead)]
            expected_field[i, h, 1] = [*moments(20 * np.array(back), where_from), max(back)]
        displacements, similarities = [], []
        for dy in range(1 - grid, grid):
            for dx in range(1 - grid, grid):
                pairs = [
                    q[places.index((x, y))] @ k[places.index((x + dx, y + dy))]
                    for x, y in places
                    if (x + dx, y + dy) in places
                ]
                displacements.append((dx, dy))
                similarities.append(sum(pairs) / (len(pairs) + grid * grid / 8))
        expected_frames[h] = [*moments(100 * np.array(similarities), displacements), max(similarities)]
    np.testing.assert_allclose(field.view(grid * grid, 2, 2, 5), expected_field, atol=2e-4)
    np.testing.assert_allclose(summary.view(2, 9)[:, :5], expected_frames, atol=2e-4)
    for direction in (0, 1):  # the mean displacements, weighted by the greatest probability
        weights = expected_field[:, :, direction, 3:4]
        mean = (weights * expected_field[:, :, direction, :2]).sum(axis=0) / weights.sum(axis=0)
        np.testing.assert_allclose(summary.view(2, 9)[:, 5 + 2 * direction :][:, :2], mean, atol=2e-4)


# ------------------------------------------------------------------------------------------- losses and decoding


def numpy_action_loss(model, output, labels, valid):
    """The three losses by hand; `labels` and `valid` as the predictions are laid out."""
    config, space = model.config, model.config.action_space
    continuous, binary, slots = [], [], []
    for index in np.argwhere(valid):
        at = tuple(index)
        for i, column in enumerate(config.continuous_columns):
            error = abs(float(output.continuous[at][i]) - float(labels[at][space.index(column)]))
            continuous.append(0.5 * error**2 if error < 1 else error - 0.5)
        for i, column in enumerate(config.binary_columns):
            p = 1 / (1 + np.exp(-float(output.binary_logits[at][i])))
            pressed = float(labels[at][space.index(column)])
            weight = config.pos_weight[i] if config.pos_weight else 1.0
            binary.append(-weight * pressed * np.log(p) - (1 - pressed) * np.log(1 - p))
        if config.slot_columns:
            logits = output.slot_logits[at].double().numpy()
            true = [float(labels[at][space.index(c)]) for c in config.slot_columns].index(1.0)
            slots.append(np.log(np.exp(logits).sum()) - logits[true])
    return [np.mean(x) if x else None for x in (continuous, binary, slots)]


@pytest.mark.parametrize("space", ["vpt-38", "vpt-13", ["hotbar.3", "yaw_delta", "key.w"]])
@pytest.mark.parametrize("cls", [VJEPA2ACForInverseDynamics, VJEPA2ACForActionAnticipation])
def test_action_losses_are_those_worked_out_by_hand(cls, space):
    model = head(cls, space)
    columns = model.config.action_space
    model.config.pos_weight = np.linspace(0.5, 7, len(model.config.binary_columns)).tolist()
    labels = random_actions(columns=columns)
    with torch.no_grad():
        output = model(features=random_features(), labels=labels)
    targets, valid = labels.numpy(), np.ones((B, T - 1), bool)
    if cls is VJEPA2ACForActionAnticipation:
        targets, valid = np.zeros((B, T, 2, len(columns))), np.zeros((B, T, 2), bool)
        for t in range(T):
            for j in range(2):
                if t + j < T - 1:
                    targets[:, t, j], valid[:, t, j] = labels[:, t + j], True
        assert valid.sum() == B * (7 + 6)
    expected = numpy_action_loss(model, output, targets, valid)
    for name, value in zip(("continuous_loss", "binary_loss", "slot_loss"), expected, strict=True):
        found = getattr(output, name)
        assert (found is None) == (value is None), name
        if value is not None:
            assert found.item() == pytest.approx(value, rel=1e-4), name
    assert output.loss.item() == pytest.approx(sum(v for v in expected if v is not None), rel=1e-4)
    # One hotbar column alone is a yes or no like a key.
    assert ("hotbar.3" in model.config.binary_columns) == (len(columns) == 3)


@pytest.mark.parametrize("cls", [VJEPA2ACForInverseDynamics, VJEPA2ACForActionAnticipation])
def test_actions_without_a_slot_are_no_label_of_the_slot(cls):
    """Their slots weigh nothing in loss and gradients; their other columns count."""
    model, labels, features = head(cls), random_actions(), random_features()
    at = [i for i, c in enumerate(model.config.action_space) if c.startswith("hotbar.")]
    labels[1, :, at] = 0  # the second clip is of a recorder that logs no slot
    both = model(features=features, labels=labels)
    first = model(features=features[:1], labels=labels[:1])
    torch.testing.assert_close(both.slot_loss, first.slot_loss)
    full = model(features=features, labels=random_actions())
    torch.testing.assert_close((both.continuous_loss, both.binary_loss), (full.continuous_loss, full.binary_loss))
    (gradient,) = torch.autograd.grad(both.slot_loss, both.slot_logits)
    assert not gradient[1].any() and gradient[0].any()
    labels[..., at] = 0
    none = model(features=features, labels=labels)
    assert none.slot_loss.item() == 0 and torch.isfinite(none.loss)
    none.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.head.parameters() if p.grad is not None)


def test_classification_losses_are_those_worked_out_by_hand():
    features, labels = random_features(), torch.tensor([2, 0])
    model = head(VJEPA2ACForVideoClassification, id2label={0: "a", 1: "b", 2: "c"})
    with torch.no_grad():
        output = model(features=features, labels=labels)
    logits = output.logits.double().numpy()
    expected = np.mean([np.log(np.exp(row).sum()) - row[i] for row, i in zip(logits, labels.tolist(), strict=True)])
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert model.config.problem_type == "single_label_classification"

    several = head(VJEPA2ACForVideoClassification, num_labels=3)
    hot = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    with torch.no_grad():
        output = several(features=features, labels=hot)
    p = 1 / (1 + np.exp(-output.logits.double().numpy()))
    expected = -np.mean(hot.numpy() * np.log(p) + (1 - hot.numpy()) * np.log(1 - p))
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert several.config.problem_type == "multi_label_classification"
    # The head knows the order of steps, though each was encoded on its own.
    with torch.no_grad():
        assert not torch.allclose(several(features=features.flip(1)).logits, output.logits, atol=1e-3)


def test_pressed_keys_weigh_as_much_as_all_others():
    actions = torch.zeros(4, 25, 5)
    for column, pressed in enumerate((1, 20, 50, 100, 0)):
        actions[..., column].view(-1)[:pressed] = 1
    assert binary_pos_weight(actions, max_weight=20) == pytest.approx([20, 80 / 20, 50 / 50, 1 / 20, 20])
    with pytest.raises(ValueError, match="0 and 1"):
        binary_pos_weight(torch.full((3, 2), float("nan")))


def test_decoded_actions_are_in_raw_units():
    model = head(VJEPA2ACForInverseDynamics)
    model.config.action_statistics = STATISTICS
    with torch.no_grad():
        output = model(features=random_features())
    decoded = model.decode_actions(output)
    assert set(decoded) == {c for c in ACTION_SPACES["vpt-38"] if not c.startswith("hotbar.")} | {"hotbar"}
    for i, (column, mean, std) in enumerate(zip(*(STATISTICS[k] for k in ("columns", "mean", "std")), strict=True)):
        np.testing.assert_allclose(decoded[column], output.continuous[..., i].double() * std + mean)
    for i, column in enumerate(model.config.binary_columns):
        assert decoded[column].dtype == torch.bool
        assert torch.equal(decoded[column], output.binary_logits[..., i] > 0)
    assert torch.equal(decoded["hotbar"], output.slot_logits.argmax(-1))
    # What the model tells can be given to a world model and to the processor.
    normalised = model.normalized_actions(output)
    processor = VJEPA2ACProcessor(resolution=32, action_space="vpt-38", action_statistics=STATISTICS)
    raw = processor.denormalize_actions(normalised)
    for column, values in decoded.items():
        if column != "hotbar":
            np.testing.assert_allclose(raw[..., ACTION_SPACES["vpt-38"].index(column)], values.double(), atol=1e-4)
    assert torch.equal(raw[..., 28:37].argmax(-1), decoded["hotbar"]) and (raw[..., 28:37].sum(-1) == 1).all()
    model.config.action_statistics = None
    with pytest.raises(ValueError, match="action_statistics is None"):
        model.decode_actions(output)


def test_keys_are_told_above_their_own_threshold():
    model = head(VJEPA2ACForInverseDynamics, "vpt-13")
    output = model(features=random_features())
    columns = model.config.binary_columns
    thresholds = output.binary_logits[0, 0].double().add(torch.linspace(-1, 1, len(columns))).tolist()
    model.config.key_thresholds = thresholds
    model.config.check()
    actions = model.normalized_actions(output)
    for i, (column, threshold) in enumerate(zip(columns, thresholds, strict=True)):
        expected = output.binary_logits[..., i].double() > threshold
        assert torch.equal(actions[..., model.config.action_space.index(column)].bool(), expected)
    ahead = head(VJEPA2ACForActionAnticipation, "vpt-13")
    output = ahead(features=random_features())
    shift = torch.tensor([-0.3, 0.4]).double()
    ahead.config.key_thresholds = [[t + float(s) for t in thresholds] for s in shift]
    ahead.config.check()
    at = [ahead.config.action_space.index(c) for c in columns]
    expected = output.binary_logits.double() > torch.tensor(ahead.config.key_thresholds, dtype=torch.float64)
    assert torch.equal(ahead.normalized_actions(output)[..., at].bool(), expected)
    ahead.config.key_thresholds = thresholds
    with pytest.raises(ValueError, match="key_thresholds must be 2 lists, one for each action told"):
        ahead.config.check()


# ------------------------------------------------------------------------------------------------------ causality


@pytest.mark.parametrize("source", ["encoder", "predictor"])
def test_anticipation_does_not_see_what_is_yet_to_come(source):
    space = "vpt-13" if source == "predictor" else "vpt-38"
    told = {"use_past_actions": True, "use_states": True, "features_from": source}
    model = head(VJEPA2ACForActionAnticipation, space, **told)
    inputs = {
        "features": random_features(),
        "actions": random_actions(columns=ACTION_SPACES[space]),
        "states": torch.randn(B, T, 2, generator=torch.Generator().manual_seed(3)),
    }

    def told_by(**changed):
        with torch.no_grad():
            return model.normalized_actions(output := model(**inputs | changed)), output.continuous

    reference = told_by()[1]
    for step in range(T):
        for name, first_changed in (("features", step), ("states", step), ("actions", step + 1)):
            if name == "actions" and step == T - 1:
                continue
            changed = inputs[name].clone()
            changed[:, step] = 1 - changed[:, step] if name == "actions" else changed[:, step] + 1.5
            if name == "actions" and space == "vpt-38":
                changed[:, step, 28:37] = inputs[name][:, step, 28:37].roll(1, dims=-1)
            found = told_by(**{name: changed})[1]
            torch.testing.assert_close(found[:, :first_changed], reference[:, :first_changed], atol=1e-5, rtol=0)
            difference = (found - reference).abs().amax(dim=(0, 2, 3))
            assert difference[first_changed] > 1e-4, (name, step)


def test_inverse_dynamics_sees_both_steps_of_a_pair_and_no_other():
    model = head(VJEPA2ACForInverseDynamics)
    features = random_features()
    with torch.no_grad():
        reference = model(features=features).continuous
        for step in range(T):
            changed = features.clone()
            changed[:, step] += torch.randn(B, N, D)
            differs = (model(features=changed).continuous - reference).abs().amax(dim=(0, 2)) > 1e-5
            assert differs.tolist() == [step in (k, k + 1) for k in range(T - 1)]


# ---------------------------------------------------------------------------------------------- freezing, saving


@pytest.mark.parametrize("source", ["encoder", "predictor"])
def test_the_world_model_is_frozen_unless_asked_for(source):
    clips = torch.randn(1, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = random_actions(batch=1, columns=ACTION_SPACES["vpt-13"])
    for freeze in (True, False):
        model = head(VJEPA2ACForInverseDynamics, "vpt-13", features_from=source, freeze_encoder=freeze).train()
        assert not model.vjepa2_ac.encoder.training
        model(pixel_values_videos=clips, labels=labels).loss.backward()
        gradients = {n: p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters()}
        world = [given for name, given in gradients.items() if name.startswith("vjepa2_ac.encoder.")]
        assert any(world) is not freeze
        if source == "predictor":
            assert any(g for n, g in gradients.items() if n.startswith("vjepa2_ac.predictor.")) is not freeze
        else:
            assert model.vjepa2_ac.predictor is None
        assert all(given for name, given in gradients.items() if name.startswith("head.fc"))


ALL = [VJEPA2ACForInverseDynamics, VJEPA2ACForActionAnticipation, VJEPA2ACForVideoClassification]


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("source", ["encoder", "predictor"])
def test_heads_start_from_a_saved_world_model_and_are_saved_whole(cls, source, tmp_path):
    world = VJEPA2ACModel(tiny_config(action_space="vpt-13"))
    world.save_pretrained(tmp_path / "world")
    config = cls.config_class.from_pretrained(tmp_path / "world", features_from=source)
    assert config.model_type == cls.config_class.model_type
    model = cls.from_pretrained(tmp_path / "world", config=config)
    for name, tensor in world.encoder.state_dict().items():
        assert torch.equal(tensor, model.vjepa2_ac.encoder.state_dict()[name]), name
    if source == "predictor":
        assert torch.equal(world.predictor.head.weight, model.vjepa2_ac.predictor.head.weight)
    assert not any(p.requires_grad for p in model.vjepa2_ac.parameters())
    for name, parameter in model.head.named_parameters():  # every new parameter has been initialised
        assert parameter.isfinite().all() and (
            parameter.std() > 0 or parameter.numel() < 9 or "norm" in name or "bias" in name
        )
    scales = [m.log_scale for m in model.modules() if hasattr(m, "log_scale")]
    assert all(s.exp().round().tolist() in ([20.0] * 4, [100.0] * 4) for s in scales)

    model.save_pretrained(tmp_path / "head")
    auto = AutoModelForVideoClassification if cls is VJEPA2ACForVideoClassification else AutoModel
    again = auto.from_pretrained(tmp_path / "head")
    assert type(again) is cls and again.config.to_dict() == model.config.to_dict() | {
        k: again.config.to_dict()[k]
        for k in ("_name_or_path", "architectures", "auto_map")
        if k in again.config.to_dict()
    }
    features = random_features()
    with torch.no_grad():
        for first, second in zip(
            model.eval()(features=features).to_tuple(), again.eval()(features=features).to_tuple(), strict=True
        ):
            assert torch.equal(first, second)
    assert not any(p.requires_grad for p in again.vjepa2_ac.parameters())


LOAD_ELSEWHERE = (
    WITHOUT_PACKAGE
    + """
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForVideoClassification

for auto, name in ((AutoModel, "idm"), (AutoModel, "anticipation"), (AutoModelForVideoClassification, "classes")):
    model = auto.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True).eval()
    case = load_file(f"{sys.argv[1]}/{name}.safetensors")
    with torch.no_grad():
        output = model(features=case["features"])
    assert torch.equal(output.to_tuple()[0], case["expected"]), name
    print("loaded", type(model).__name__, type(model).__module__.split(".")[0])
"""
)


def test_heads_load_without_the_package(tmp_path):
    for cls, name in zip(ALL, ("idm", "anticipation", "classes"), strict=True):
        model = head(cls)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            expected = model(features=random_features()).to_tuple()[0]
        save_file({"features": random_features(), "expected": expected.contiguous()}, tmp_path / f"{name}.safetensors")
    # Equal bits need the same number of threads and the same instructions.
    result = python_forks.run(["-c", LOAD_ELSEWHERE, tmp_path], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [line.split()[1:] for line in result.stdout.splitlines()] == [
        [c.__name__, "transformers_modules"] for c in ALL
    ]


# ------------------------------------------------------------------------------------------------------ bad input


def test_clips_that_are_too_short_or_of_another_shape_are_refused():
    idm, ahead = head(VJEPA2ACForInverseDynamics), head(VJEPA2ACForActionAnticipation)
    clip = torch.zeros(1, 16, 3, 32, 32)
    with pytest.raises(ValueError, match=r"at least 4 frames \(2 tubelets of 2\), found 2"):
        idm(pixel_values_videos=clip[:, :2])
    with pytest.raises(ValueError, match=r"at least 2 frames \(1 tubelets of 2\), found 1"):
        ahead(pixel_values_videos=clip[:, :1])
    classes = head(VJEPA2ACForVideoClassification, num_labels=2)
    with pytest.raises(ValueError, match=r"at least 2 frames \(1 tubelets of 2\), found 1"):
        classes(pixel_values_videos=clip[:, :1])
    with pytest.raises(ValueError, match="labels need a clip of at least 2 tubelets, found 1"):
        ahead(features=random_features(steps=1), labels=random_actions(steps=0))
    with pytest.raises(ValueError, match="3 frames are not a multiple of the tubelet size 2"):
        ahead(pixel_values_videos=clip[:, :3])
    with pytest.raises(ValueError, match=r"\(batch, frames, 3, 32, 32\), found \(1, 16, 3, 16, 32\)"):
        idm(pixel_values_videos=clip[..., :16, :])
    with pytest.raises(ValueError, match=r"\(batch, steps, 4, 48\), found \(2, 8, 4, 47\)"):
        idm(features=random_features()[..., :47])
    with pytest.raises(ValueError, match="2 to 8 steps, found 9"):
        idm(features=random_features(steps=9))
    with pytest.raises(ValueError, match="not both"):
        idm(features=random_features(), pixel_values_videos=clip)
    with pytest.raises(ValueError, match="encoding 'tubelet', found 'clip'"):
        head(VJEPA2ACForActionAnticipation, encoding="clip")
    with pytest.raises(ValueError, match="use_past_actions is set"):
        head(VJEPA2ACForActionAnticipation, use_past_actions=True)(features=random_features())
    with pytest.raises(ValueError, match=r"states must be \(2, 8, 2\), found \(2, 7, 2\)"):
        head(VJEPA2ACForActionAnticipation, use_states=True)(features=random_features(), states=torch.zeros(2, 7, 2))


def test_labels_that_do_not_fit_are_refused():
    idm = head(VJEPA2ACForInverseDynamics)
    labels = random_actions()
    with pytest.raises(ValueError, match=r"batch 2, 7 actions, 38 columns of .*found \(2, 7, 13\)"):
        idm(features=random_features(), labels=labels[..., :13])
    with pytest.raises(ValueError, match=r"7 actions.*found \(2, 8, 38\)"):
        idm(features=random_features(), labels=random_actions(steps=8))
    for column, value in (("yaw_delta", float("nan")), ("key.w", float("nan")), ("key.w", 0.5), ("hotbar.4", 1.0)):
        wrong = labels.clone()
        at = ACTION_SPACES["vpt-38"].index(column)
        if column == "hotbar.4":
            wrong[0, 0, 28:37] = F.one_hot(torch.tensor(3), 9)
        wrong[0, 0, at] = value
        with pytest.raises(ValueError, match=f"labels: columns .*{column}"):
            idm(features=random_features(), labels=wrong)
    classes = head(VJEPA2ACForVideoClassification, id2label={0: "cave", 1: "forest"})
    with pytest.raises(ValueError, match="from 1 to 2, the label map has the 2 classes"):
        classes(features=random_features(), labels=torch.tensor([1, 2]))
    with pytest.MonkeyPatch.context() as patch:  # a device that has no assertions, as Apple's
        patch.setattr(torch, "_assert_async", Mock(side_effect=NotImplementedError))
        assert classes(features=random_features(), labels=torch.tensor([1, 0])).loss.isfinite()
        with pytest.raises(ValueError, match="from 1 to 2, the label map has the 2 classes"):
            classes(features=random_features(), labels=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"whole numbers \(2,\), found torch.int64 \(3,\)"):
        classes(features=random_features(), labels=torch.tensor([1, 1, 0]))
    several = head(VJEPA2ACForVideoClassification, num_labels=3, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"\(2, 3\) \(batch, classes\), found \(2, 2\)"):
        several(features=random_features(), labels=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="0 or 1"):
        several(features=random_features(), labels=torch.full((2, 3), float("nan")))


def test_a_saved_head_keeps_its_action_space(tmp_path):
    head(VJEPA2ACForInverseDynamics).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="action_dim is 38, but action_space lists 13 columns"):
        VJEPA2ACForInverseDynamics.from_pretrained(tmp_path, action_space=list(ACTION_SPACES["vpt-13"]))


def test_configurations_that_contradict_themselves_are_refused():
    encoder = tiny_config().encoder_config
    cases = [
        ({"action_space": None}, "action_space is None"),
        ({"features_from": "decoder"}, "features_from must be one of .*'decoder'"),
        ({"feature_from": "encoder"}, "did you mean 'features_from'"),
        ({"head_hidden_size": 30}, "head_hidden_size 30 is not a multiple of head_num_attention_heads 4"),
        ({"pos_weight": [1.0]}, "pos_weight has 1 numbers, the action space has 9 binary"),
        ({"pos_weight": [0.0] * 9}, "above 0"),
        ({"key_thresholds": [0.5]}, "key_thresholds must be 9 finite numbers"),
        ({"key_thresholds": [float("nan")] * 9}, "key_thresholds must be 9 finite numbers"),
    ]
    for values, message in cases:
        with pytest.raises(ValueError, match=message):
            VJEPA2ACInverseDynamicsConfig(**{"encoder_config": encoder, "action_space": "vpt-13", **values})
    for values, message in [
        ({"id2label": {0: "a", 2: "b"}}, r"without a gap.*\[0, 2\]"),
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0}}, r"misses \['b'\]"),
        ({"id2label": {0: "a", 1: "a"}}, "twice"),
        ({"problem_type": "regression"}, "found 'regression'"),
    ]:
        with pytest.raises(ValueError, match=message):
            VJEPA2ACVideoClassificationConfig(encoder_config=encoder, **values)
    with pytest.raises(ValueError, match="anticipation_steps must be between 1 and 7.*found 8"):
        head(VJEPA2ACForActionAnticipation, anticipation_steps=8)
    with pytest.raises(ValueError, match="action_dim 13, the head's action space has 38 columns"):
        head(VJEPA2ACForInverseDynamics, features_from="predictor")
