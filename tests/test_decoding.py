"""The decoder from features to frames: where pixels go, its loss by hand, learning, freezing, saving, bad input."""

import numpy as np
import pytest
import python_forks
import torch
from accelerate import Accelerator
from helpers_models import WITHOUT_PACKAGE
from safetensors.torch import save_file
from test_geometry import model as world_of_any_shape
from test_modeling import tiny_config, tiny_model
from transformers import AutoModel, VJEPA2Config

from vjepa_ac_hf import VJEPA2ACConfig, VJEPA2ACForFrameDecoding, VJEPA2ACFrameDecodingConfig, VJEPA2ACModel
from vjepa_ac_hf.modeling_heads_decoding_vjepa2_ac import VJEPA2ACFrameDecodingHead
from vjepa_ac_hf.training.heads import fit_linear

B, T, N, D = 2, 8, 4, 48
SMALL = {"head_hidden_size": 32, "head_num_hidden_layers": 1, "head_num_attention_heads": 2}


def decoder(**fields):
    """A decoder over a tiny world model, every parameter away from its initial zeros and ones."""
    torch.manual_seed(1)
    model = VJEPA2ACForFrameDecoding.from_world_model(tiny_model(), **SMALL, **fields).eval()
    for parameter in model.head.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def random_features(seed=0, steps=T, batch=B):
    return torch.randn(batch, steps, N, D, generator=torch.Generator().manual_seed(seed))


def random_frames(steps=T, batch=B, size=32):
    shape = (batch, 2 * steps, 3, size, size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


# --------------------------------------------------------------------------------------------------- what it tells


@pytest.mark.parametrize("grid", [(2, 2), (2, 3)])
def test_every_number_of_a_token_comes_to_its_pixel(grid):
    """Also where a frame is wider than high."""
    fields = {"encoder_config": tiny_config().encoder_config, "frame_size": [16 * grid[0], 16 * grid[1]]}
    head = VJEPA2ACFrameDecodingHead(VJEPA2ACFrameDecodingConfig(**fields))
    rows, columns, patch = *grid, 16
    pixels = torch.randn(3, rows * columns, 2 * 3 * patch * patch, generator=torch.Generator().manual_seed(0))
    placed = head._arrange(pixels)
    assert placed.shape == (3, 6, rows * patch, columns * patch)
    for token in range(rows * columns):
        top, left = token // columns * patch, token % columns * patch
        for at in range(0, 6 * patch * patch, 131):
            channel, y, x = at // patch**2, at // patch % patch, at % patch
            assert torch.equal(placed[:, channel, top + y, left + x], pixels[:, token, at])


def test_the_linear_map_is_fitted_by_least_squares():
    """Against numpy's, on patches cut out by loops; frames that are linear in the features come out as they were."""
    world = tiny_model()
    model = VJEPA2ACForFrameDecoding.from_world_model(world, **SMALL).eval()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(24, T, N, D, generator=generator)
    features[..., 0] *= 30  # steps of an optimizer would take long
    features[..., 1:5] *= 0.03
    weights = torch.randn(D, 6 * 256, generator=generator) / 40
    frames = torch.zeros(24, 2 * T, 3, 32, 32)
    patches = (features / features.std(dim=(0, 1, 2))) @ weights / 7 + 0.5
    for token in range(N):
        top, left = token // 2 * 16, token % 2 * 16
        cut = patches[:, :, token].unflatten(2, (2, 3, 16, 16)).flatten(1, 2)
        frames[:, :, :, top : top + 16, left : left + 16] = cut
    frames = (255 * frames.clamp(0, 1)).round().to(torch.uint8)
    batches = [{"features": features[at : at + 8], "frames": frames[at : at + 8]} for at in (0, 8, 16)]
    fit_linear(model, batches, Accelerator(cpu=True))
    known = np.concatenate([features.flatten(0, 1).flatten(0, 1).numpy(), np.ones((24 * T * N, 1))], axis=1)
    wanted = torch.stack(
        [frames[..., r : r + 16, c : c + 16] for r in (0, 16) for c in (0, 16)], dim=2
    )  # (24, 16, N, 3, 16, 16)
    wanted = wanted.unflatten(1, (T, 2)).movedim(3, 2).flatten(3).flatten(0, 2).double().numpy()
    expected = np.linalg.lstsq(known.astype(np.float64), 4 * (wanted / 255 - 0.5), rcond=None)[0]
    found = model.head.linear.weight.detach().double().numpy().T
    assert np.abs(found - expected[:-1]).max() < 2e-3 * np.abs(expected).max()
    with torch.no_grad():
        told = model(features=features[:2, :, :]).frames
    assert (told - frames[:2] / 255).square().mean() < 1e-4


def test_frames_lie_where_their_features_are_and_nowhere_else():
    """A changed step changes the two frames of its tubelet, in all of their pixels' range, and no other frame."""
    model, features = decoder(), random_features()
    with torch.no_grad():
        reference = model(features=features).frames
        assert reference.shape == (B, 2 * T, 3, 32, 32) and reference.dtype == torch.float32
        assert reference.min() >= 0 and reference.max() <= 1
        for step in (0, 3, T - 1):
            changed = features.clone()
            changed[:, step] += torch.randn(B, N, D)
            differs = (model(features=changed).frames - reference).abs().amax(dim=(0, 2, 3, 4)) > 1e-5
            assert differs.tolist() == [frame // 2 == step for frame in range(2 * T)]
        single = model(features=features[:, 5:6]).frames
        torch.testing.assert_close(single, reference[:, 10:12], rtol=1e-5, atol=1e-6)


def test_frames_of_any_shape_and_features_of_several_layers():
    world = world_of_any_shape([64, 96], hierarchical_features=True)
    model = VJEPA2ACForFrameDecoding.from_world_model(world, **SMALL).eval()
    assert model.head.embed.in_features == 2 * world.config.encoder_config.hidden_size
    pixels = torch.randn(1, 4, 3, 64, 96)
    with torch.no_grad():
        output = model(pixel_values_videos=pixels, labels=torch.rand(1, 4, 3, 64, 96))
    assert output.frames.shape == pixels.shape and output.loss.isfinite()


def test_pixels_are_encoded_and_decoded():
    model = decoder()
    pixels = torch.randn(1, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.vjepa2_ac.encode(pixels)
        assert torch.equal(model(pixel_values_videos=pixels).frames, model(features=features).frames)


def test_frames_are_float32_under_autocast_without_its_steps():
    model, features = decoder(), random_features()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        frames = model(features=features, labels=random_frames()).frames
    assert frames.dtype == torch.float32
    between = frames[(frames > 0.5) & (frames < 1)]
    assert len(between) > 1000 and (between * 256 != (between * 256).round()).float().mean() > 0.9


def test_the_loss_is_the_mean_absolute_error_before_anything_is_cut_off():
    model, features, frames = decoder(), random_features(), random_frames()
    with torch.no_grad():
        output = model(features=features, labels=frames)
        fractions = model(features=features, labels=frames.double() / 255)
        told = model.head(features)
    assert float(output.loss) == pytest.approx(float(fractions.loss))
    expected = np.abs(told.double().numpy() - frames.numpy() / 255).mean()
    assert float(output.loss) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(output.frames, told.clamp(0, 1))
    assert float(told.min()) < 0 or float(told.max()) > 1  # else nothing was cut off


# -------------------------------------------------------------------------------------------- learning and freezing


def textures(count, steps=2, size=32):
    """Clips of smooth random pictures, uint8."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count * 2 * steps, 3, 6, 6, generator=generator)
    frames = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear")
    return (frames * 255).to(torch.uint8).unflatten(0, (count, 2 * steps))


def test_it_learns_a_few_clips_far_better_than_their_mean_and_the_world_model_stays_as_it_is():
    torch.manual_seed(0)
    encoder = VJEPA2Config(
        crop_size=32, patch_size=8, hidden_size=96, num_hidden_layers=1, num_attention_heads=2, frames_per_clip=4
    )
    sizes = {"pred_hidden_size": 48, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}
    world = VJEPA2ACModel(VJEPA2ACConfig(encoder_config=encoder, frames_per_clip=4, auto_steps=1, **sizes))
    before = {name: tensor.clone() for name, tensor in world.state_dict().items()}
    model = VJEPA2ACForFrameDecoding.from_world_model(world, head_hidden_size=64, head_num_hidden_layers=1).train()
    clips = textures(4)
    pixels = (clips / 255.0 - 0.5) / 0.25
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        loss = model(pixel_values_videos=pixels, labels=clips).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    true = clips / 255.0
    mean = true.mean(dim=(0, 1)).expand_as(true)
    with torch.no_grad():
        output = model.eval()(pixel_values_videos=pixels, labels=clips)
    assert float(output.loss) < 0.7 * float((mean - true).abs().mean())
    assert (output.frames - true).square().mean() < 0.5 * (mean - true).square().mean()
    for name, tensor in world.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_gradients_reach_the_head_alone():
    model = decoder().train()
    model.vjepa2_ac.requires_grad_(True)  # even where somebody has thawed the encoder
    imagined = random_features().requires_grad_(True)
    model(features=imagined, labels=random_frames()).loss.backward()
    assert imagined.grad is None
    pixels = torch.randn(1, 16, 3, 32, 32)
    model(pixel_values_videos=pixels, labels=random_frames(batch=1)).loss.backward()
    for name, parameter in model.named_parameters():
        given = parameter.grad is not None and bool(parameter.grad.any())
        assert given is name.startswith("head."), name
    assert model.vjepa2_ac.predictor is None


# --------------------------------------------------------------------------------------------------------- saving


def test_it_starts_from_a_saved_world_model_and_is_saved_whole(tmp_path):
    world = tiny_model(action_space="vpt-13")
    world.save_pretrained(tmp_path / "world")
    model = VJEPA2ACForFrameDecoding.from_pretrained(tmp_path / "world", **SMALL).eval()
    assert type(model.config) is VJEPA2ACFrameDecodingConfig
    for name, tensor in world.encoder.state_dict().items():
        assert torch.equal(tensor, model.vjepa2_ac.encoder.state_dict()[name]), name
    assert not any(p.requires_grad for p in model.vjepa2_ac.parameters())
    for name, parameter in model.head.named_parameters():  # every new parameter has been initialised
        assert parameter.isfinite().all() and (
            parameter.std() > 0 or "norm" in name or "bias" in name or name == "out.weight" or "conv2" in name
        )
    assert not model.head.seams.conv2.weight.any()  # frames start as the patches alone

    model.save_pretrained(tmp_path / "decoder")
    again = AutoModel.from_pretrained(tmp_path / "decoder").eval()
    assert type(again) is VJEPA2ACForFrameDecoding
    with torch.no_grad():
        assert torch.equal(again(features=random_features()).frames, model(features=random_features()).frames)


LOAD_ELSEWHERE = (
    WITHOUT_PACKAGE
    + """
import torch
from safetensors.torch import load_file
from transformers import AutoModel

model = AutoModel.from_pretrained(sys.argv[1] + "/decoder", trust_remote_code=True).eval()
case = load_file(sys.argv[1] + "/case.safetensors")
with torch.no_grad():
    assert torch.equal(model(features=case["features"]).frames, case["frames"])
model.save_pretrained(sys.argv[1] + "/again")
print("loaded", type(model).__name__, type(model).__module__.split(".")[0])
"""
)


def test_it_loads_without_the_package(tmp_path):
    model = decoder()
    model.save_pretrained(tmp_path / "decoder")
    with torch.no_grad():
        frames = model(features=random_features()).frames
    save_file({"features": random_features(), "frames": frames.contiguous()}, tmp_path / "case.safetensors")
    # Equal bits need the same number of threads and the same instructions.
    result = python_forks.run(["-c", LOAD_ELSEWHERE, tmp_path], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "loaded VJEPA2ACForFrameDecoding transformers_modules" in result.stdout
    assert (tmp_path / "again" / "modeling_heads_decoding_vjepa2_ac.py").is_file()


# ------------------------------------------------------------------------------------------------------- bad input


def test_what_does_not_fit_is_refused_with_both_values():
    model, features, frames = decoder(), random_features(), random_frames()
    with pytest.raises(ValueError, match=r"\(batch, steps, 4, 48\), found \(2, 8, 4, 64\)"):
        model(features=torch.randn(B, T, N, 64))  # another encoder's
    with pytest.raises(ValueError, match=r"\(batch, steps, 4, 48\), found \(2, 8, 16, 48\)"):
        model(features=torch.randn(B, T, 16, D))
    with pytest.raises(ValueError, match=r"\(2, 16, 3, 32, 32\) \(batch, frames, .*found \(2, 8, 3, 32, 32\)"):
        model(features=features, labels=frames[:, ::2])
    with pytest.raises(ValueError, match=r"\(2, 16, 3, 32, 32\) .*found \(2, 16, 3, 16, 16\)"):
        model(features=features, labels=frames[..., ::2, ::2])
    with pytest.raises(ValueError, match="uint8 or floating point, found torch.int64"):
        model(features=features, labels=frames.long())
    with pytest.raises(ValueError, match=r"in \[0, 1\], not normalised pixels, found -2 to 2"):
        model(features=features, labels=torch.linspace(-2, 2, frames.numel()).view_as(frames))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        model(features=features, labels=torch.full(frames.shape, float("nan")))
    with pytest.raises(ValueError, match="either pixel_values_videos or features"):
        model(labels=frames)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze_encoder": False}, "freeze_encoder of a decoder must be True, found False"),
        ({"features_from": "predictor"}, "features_from of a decoder must be 'encoder', found 'predictor'"),
        ({"head_hidden_size": 30}, "head_hidden_size 30 is not a multiple of head_num_attention_heads 4"),
    ],
    ids=str,
)
def test_configurations_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VJEPA2ACFrameDecodingConfig(encoder_config=tiny_config().encoder_config, **fields)
