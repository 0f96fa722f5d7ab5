"""The V-JEPA 2.1 encoder: the official code's numbers, and what its fields change, one by one.

`golden/encoder21_small.safetensors` holds outputs of the official code for random weights (its metadata say which). If
one of these fails, the mathematics has changed: find the change, never the tolerance.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import VJEPA2Config, VJEPA2Model

from vjepa_ac_hf import VJEPA2ACConfig, VJEPA2ACModel
from vjepa_ac_hf.convert_vjepa2_ac_to_hf import convert_encoder_state_dict
from vjepa_ac_hf.modeling_encoder_vjepa2_ac import VJEPA21Encoder, rotate_interleaved

GOLDEN = Path(__file__).parent / "golden" / "encoder21_small.safetensors"
TOLERANCE = dict(rtol=0, atol=5e-5)
V21 = {
    "use_rope_interleave": True,
    "use_modality_embeddings": True,
    "interpolate_rope": True,
    "use_image_patch_embedder": True,
}


def load() -> tuple[dict, dict, dict]:
    with safe_open(GOLDEN, "pt") as file:
        metadata = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    return json.loads(metadata["config"]), json.loads(metadata["cases"]), tensors


SIZES, CASES, TENSORS = load()


def golden_config(**changes) -> VJEPA2Config:
    names = ("crop_size", "patch_size", "tubelet_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    values = {k: SIZES[k] for k in (*names, "mlp_ratio", "layer_norm_eps", "hierarchical_layers")}
    return VJEPA2Config(**{**values, **V21, **changes})


def golden_weights() -> dict:
    official = {"module.backbone." + k.removeprefix("weights."): v for k, v in TENSORS.items() if "weights." in k}
    return convert_encoder_state_dict(official)


def golden_input(case: dict) -> torch.Tensor:
    """`(B, frames, C, Y, X)`; the file has `(B, C, frames, Y, X)` in int8."""
    first, last = case.get("frames", (0, None))
    return (TENSORS[f"input.{case['input']}"].float() / 32)[:, :, first:last].transpose(1, 2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_official_values(name, attention):
    case, config = CASES[name], golden_config()
    config._attn_implementation = attention
    encoder = VJEPA21Encoder(config).eval()
    encoder.load_state_dict(golden_weights(), strict=True)
    mask = TENSORS.get(f"mask.{case.get('mask')}")
    with torch.no_grad():
        output = encoder(golden_input(case), position_mask=mask, output_hierarchical=case.get("hierarchical", False))
    found = output.hierarchical_hidden_state if "hierarchical" in case else output.last_hidden_state
    torch.testing.assert_close(found, TENSORS[f"output.{name}"], **TOLERANCE)


def world_model(size: tuple[int, int], **values) -> VJEPA2ACModel:
    sizes = {"pred_hidden_size": 48, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}
    config = VJEPA2ACConfig(
        encoder_config=golden_config(),
        frame_size=size,
        frames_per_clip=4,
        auto_steps=1,
        normalize_features=False,
        **{**sizes, **values},
    )
    model = VJEPA2ACModel(config).eval()
    model.encoder.load_state_dict(golden_weights(), strict=True)
    return model


@pytest.mark.parametrize(
    ("size", "values", "options", "cases"),
    [
        ((320, 320), {"encoding": "clip"}, {}, ["clip320"]),
        ((320, 320), {}, {}, ["clip320_tubelet1", "clip320_tubelet2"]),
        ((256, 256), {"encoding": "clip"}, {}, ["clip256"]),
        ((256, 256), {}, {}, ["clip256_tubelet1", "clip256_tubelet2"]),
        ((256, 384), {}, {}, ["wide256x384"]),
        ((320, 320), {"hierarchical_features": True}, {}, [None, "clip320_tubelet2_hier"]),
        ((256, 256), {"hierarchical_features": True}, {}, ["clip256_tubelet1_hier", None]),
        ((256, 256), {}, {"as_pictures": True}, [None, None, "clip256_image3", None]),
        ((320, 320), {}, {"as_pictures": True}, ["clip320_image1", None, None, None]),
        ((256, 256), {"hierarchical_features": True}, {"as_pictures": True}, [None, None, "clip256_image3_hier", None]),
    ],
    ids=str,
)
def test_official_values_through_encode(size, values, options, cases):
    """The same numbers by the public call: clips, tubelets one by one, pictures, squares and not."""
    model = world_model(size, **values)
    name = next(c for c in cases if c)
    features = model.encode(golden_input({"input": CASES[name]["input"]}), **options)
    if values.get("encoding") == "clip":
        assert features.shape[1] == 2
        torch.testing.assert_close(features.flatten(1, 2), TENSORS[f"output.{name}"], **TOLERANCE)
        return
    assert features.shape[1] == len(cases) and features.shape[2] == size[0] // 16 * (size[1] // 16)
    for step, case in enumerate(cases):
        if case:
            torch.testing.assert_close(features[:, step], TENSORS[f"output.{case}"], **TOLERANCE)


def test_levels_are_normalised_one_by_one():
    model = world_model((256, 256), hierarchical_features=True)
    raw = model.encode(golden_input({"input": "clip256"}))
    model.config.normalize_features = True
    features = model.encode(golden_input({"input": "clip256"})).unflatten(-1, (4, 48))
    expected = torch.stack(
        [
            (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
            for x in raw.split(48, dim=-1)
        ],
        dim=-2,
    )
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    # The last level is the usual feature of the same encoder.
    model.config.hierarchical_features = False
    torch.testing.assert_close(features[..., -1, :], model.encode(golden_input({"input": "clip256"})))


def test_rotation_against_complex_numbers():
    x, places = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.rand(5, dtype=torch.float64) * 15
    turned = rotate_interleaved(x, places)
    for j in range(4):
        angle = places * 10000 ** (-j / 4)
        expected = torch.complex(x[..., 2 * j], x[..., 2 * j + 1]) * torch.exp(1j * angle)
        torch.testing.assert_close(
            torch.complex(turned[..., 2 * j], turned[..., 2 * j + 1]), expected, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("field", V21)
def test_every_field_counts(field):
    """Golden values hold for the whole; this says which field a later failure is about."""
    encoder, other = (VJEPA21Encoder(golden_config(**c)).eval() for c in ({}, {field: False}))
    weights = golden_weights()
    encoder.load_state_dict(weights, strict=True)
    other.load_state_dict({k: v for k, v in weights.items() if k in other.state_dict()}, strict=True)
    frames = golden_input({"input": "clip320", "frames": [0, 1 if field == "use_image_patch_embedder" else 2]})
    with torch.no_grad():
        difference = (encoder(frames).last_hidden_state - other(frames).last_hidden_state).abs().max()
    assert difference > 0.1


def test_without_the_fields_it_is_transformers_encoder():
    torch.manual_seed(0)
    config = VJEPA2Config(
        crop_size=64, patch_size=16, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, frames_per_clip=4
    )
    config._attn_implementation = "sdpa"
    theirs = VJEPA2Model(config).encoder.eval()
    ours = VJEPA21Encoder(copy.deepcopy(config)).eval()
    ours.config._attn_implementation = "sdpa"
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for frames in (4, 2, 1):
        pixels = torch.randn(2, frames, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(ours(pixels).last_hidden_state, theirs(pixels).last_hidden_state)


def test_v2_over_a_wide_frame_has_the_places_of_a_square_one():
    """2 x 6 patches stand where the first two rows of 6 x 6 do, which transformers' own layers take by number."""
    torch.manual_seed(0)
    sizes = {"patch_size": 16, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = VJEPA2Config(crop_size=96, **sizes)
    config._attn_implementation = "sdpa"
    theirs, ours = VJEPA2Model(config).encoder.eval(), VJEPA21Encoder(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    wide = torch.randn(1, 2, 3, 32, 96)
    with torch.no_grad():
        expected = theirs.embeddings(wide)
        for layer in theirs.layer:
            expected = layer(expected, torch.arange(12)[None])[0]
        torch.testing.assert_close(ours(wide).last_hidden_state, theirs.layernorm(expected))


def test_bfloat16_weights_run():
    """The official code fails with them (positions stay float32); here tables are cast after they are computed."""
    encoder = VJEPA21Encoder(golden_config()).eval()
    encoder.load_state_dict(golden_weights(), strict=True)
    frames = golden_input({"input": "wide256x384"})
    with torch.no_grad():
        expected = encoder(frames).last_hidden_state
        found = encoder.to(torch.bfloat16)(frames).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).pow(2).mean().sqrt() < 0.05 * expected.pow(2).mean().sqrt()
