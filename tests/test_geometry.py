"""Frames that are not 256 x 256: grids of 24 x 24 and 16 x 28, from the pixels to the heads."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import VJEPA2Config

from vjepa_ac_hf import VJEPA2ACConfig, VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.building.selection import BuildOptions
from vjepa_ac_hf.configuration_encoder_vjepa2_ac import as_resolution, parse_resolution, show_resolution
from vjepa_ac_hf.configuration_heads_vjepa2_ac import VJEPA2ACInverseDynamicsConfig
from vjepa_ac_hf.evaluation.pictures import FeatureColours
from vjepa_ac_hf.modeling_heads_vjepa2_ac import VJEPA2ACForInverseDynamics, VJEPA2ACTokenMatching
from vjepa_ac_hf.planning import encode_goal
from vjepa_ac_hf.processing_vjepa2_ac import resize_frames

T, D = 4, 24
V21 = {
    **dict.fromkeys(("use_rope_interleave", "use_modality_embeddings", "interpolate_rope"), True),
    "use_image_patch_embedder": True,
    "hierarchical_layers": [0, 1],
}


SMALL = {"pred_hidden_size": 24, "pred_num_hidden_layers": 2, "pred_num_attention_heads": 2, "pred_mlp_ratio": 1.0}


def config(frame_size, **values) -> VJEPA2ACConfig:
    encoder = VJEPA2Config(
        crop_size=64, patch_size=16, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=1.0, **V21
    )
    return VJEPA2ACConfig(encoder_config=encoder, frame_size=frame_size, frames_per_clip=2 * T, **{**SMALL, **values})


def model(frame_size, **values) -> VJEPA2ACModel:
    torch.manual_seed(0)
    made = VJEPA2ACModel(config(frame_size, **values)).eval()
    for parameter in made.parameters():  # every parameter counts, biases too
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


GRIDS = pytest.mark.parametrize(
    ("frame_size", "grid"), [(384, (24, 24)), ([256, 448], (16, 28))], ids=["24x24", "16x28"]
)


@GRIDS
def test_the_predictor_is_causal_and_its_cache_exact(frame_size, grid):
    made, tokens = model(frame_size), grid[0] * grid[1]
    assert made.config.grid == grid and made.config.num_tokens == tokens
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, T, tokens, D, generator=generator)
    actions, states = torch.randn(1, T - 1, 13, generator=generator), torch.randn(1, T, 2, generator=generator)
    with torch.no_grad():
        before = made.predict(features[:, :-1], actions, states)
        for changed in (features, actions, states):
            original = changed.clone()
            changed[:, 1] += 1.0
            after = made.predict(features[:, :-1], actions, states)
            assert torch.equal(after[:, 0], before[:, 0])
            assert ((after - before)[:, 1:].abs().amax(dim=(0, 2, 3)) > 1e-4).all()
            changed.copy_(original)
        cached = made.rollout(features[:, :1], actions, states)
        uncached = features[:, :1]
        for step in range(1, T):  # the definition: everything again at every step
            latest = made.predict(uncached, actions[:, :step], states[:, :step])[:, -1:]
            uncached = torch.cat([uncached, latest], dim=1)
        torch.testing.assert_close(cached, uncached[:, 1:], rtol=1e-5, atol=1e-5)
        made.set_attn_implementation("eager")
        torch.testing.assert_close(made.predict(features[:, :-1], actions, states), before, rtol=1e-5, atol=1e-5)


@GRIDS
def test_rotary_tables_by_hand(frame_size, grid):
    cos, sin = model(frame_size).predictor.rotary(1, 2, torch.device("cpu"), torch.float32)
    rows, columns = grid
    per_step, axis = rows * columns + 2, 4  # head width 12: three axes of 4, pairs of angles [f0, f1, f0, f1]
    assert cos.shape == (2 * per_step, 12)
    for step, row, column in ((1, 0, 0), (1, 3, columns - 1), (2, rows - 1, 5)):
        at = (step - 1) * per_step + 2 + row * columns + column
        for number, place in enumerate((step, row, column)):
            angles = [place * 10000 ** -(i / 2) for i in (0, 1, 0, 1)]
            expected = torch.tensor([[math.cos(a) for a in angles], [math.sin(a) for a in angles]])
            found = torch.stack([cos[at], sin[at]])[:, number * axis : (number + 1) * axis]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def shifted(grid: tuple[int, int], dx: int, dy: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(1, *grid, D, generator=generator) for _ in range(2))
    for y in range(grid[0]):
        for x in range(grid[1]):
            if 0 <= y + dy < grid[0] and 0 <= x + dx < grid[1]:
                after[0, y + dy, x + dx] = before[0, y, x]
    return before.flatten(1, 2), after.flatten(1, 2)


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (3, -1), (-4, 2)])
def test_token_matching_finds_shifts_on_a_wide_grid(dx, dy):
    rows, columns = grid = (4, 9)
    values = {"encoder_config": config(None).encoder_config, "frame_size": [16 * rows, 16 * columns]}
    small = {"head_hidden_size": 48, "head_num_hidden_layers": 1, "head_num_attention_heads": 2}
    torch.manual_seed(3)
    module = VJEPA2ACTokenMatching(VJEPA2ACInverseDynamicsConfig(**values, action_space=["yaw_delta"], **small))
    module.embed.weight.data.normal_()
    for scale in (module.token_scale, module.frame_scale):
        scale.log_scale.data.fill_(6.0)  # sharp: the likeliest match alone
    with torch.no_grad():
        field, summary = module(*shifted(grid, dx, dy))
    expected = torch.tensor([dx, dy]) / (6 / 4)  # sqrt(4 * 9) = 6
    field = field.view(rows, columns, 2, 2, 5)
    for y in range(rows):
        for x in range(columns):
            for direction, sign in ((0, 1), (1, -1)):
                if 0 <= x + sign * dx < columns and 0 <= y + sign * dy < rows:
                    for h in range(2):
                        torch.testing.assert_close(field[y, x, h, direction, :2], expected, atol=2e-2, rtol=0)
    for of_frame in summary.view(2, 9):
        torch.testing.assert_close(of_frame[:2], expected, atol=2e-2, rtol=0)


def test_a_head_over_a_wide_model(tmp_path):
    world = model([64, 96], hierarchical_features=True, action_space="vpt-13")
    head = VJEPA2ACForInverseDynamics.from_world_model(
        world, head_hidden_size=24, head_num_hidden_layers=1, head_num_attention_heads=2
    ).eval()
    pixels = torch.randn(1, 2 * T, 3, 64, 96)
    with torch.no_grad():
        expected = head(pixel_values_videos=pixels).continuous
        assert expected.shape == (1, T - 1, 4)
        head.save_pretrained(tmp_path)
        loaded = VJEPA2ACForInverseDynamics.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(pixel_values_videos=pixels).continuous, expected)
        torch.testing.assert_close(head(features=world.encode(pixels)).continuous, expected)


# ------------------------------------------------------------------------------------------------------- pixels


def test_whole_wide_frames_keep_their_shape():
    """A picture of two coordinates: crop scales both alike and cuts the centre, squash scales each to its side."""
    y, x = torch.meshgrid(torch.arange(90.0), torch.arange(160.0), indexing="ij")
    frame = torch.stack([x, y, 0 * x]).to(torch.uint8)[None]
    for wanted, scale, top, left in (
        ((48, 64), 90 / 48, 0, (160 * 48 / 90 - 64) / 2),  # 85 x 48, sides cut
        ((32, 96), 160 / 96, (90 * 96 / 160 - 32) / 2, 0),  # 96 x 54, top and bottom cut
        ((90, 160), 1, 0, 0),
    ):
        found = resize_frames(frame, wanted)[0].float()
        assert found.shape == (3, *wanted)
        rows, columns = torch.arange(wanted[0]) + top, torch.arange(wanted[1]) + left
        inner = slice(3, -3)
        assert (found[0, 5, inner] - ((columns + 0.5) * scale - 0.5)[inner]).abs().max() < 2.0
        assert (found[1, inner, 5] - ((rows + 0.5) * scale - 0.5)[inner]).abs().max() < 2.0
    squashed = resize_frames(frame, (45, 40), "squash")[0].float()
    assert squashed.shape == (3, 45, 40)
    assert (squashed[0, 5] - ((torch.arange(40) + 0.5) * 4 - 0.5)).abs()[2:-2].max() < 2.0
    assert (squashed[1, :, 5] - ((torch.arange(45) + 0.5) * 2 - 0.5)).abs()[2:-2].max() < 2.0


def test_the_processor_of_a_wide_model_is_saved_and_loaded(tmp_path):
    processor = VJEPA2ACProcessor(resolution=[32, 48])
    processor.save_pretrained(tmp_path)
    loaded = VJEPA2ACProcessor.from_pretrained(tmp_path)
    assert loaded.resolution == processor.resolution == (32, 48) and loaded.frame_shape == (32, 48)
    clip = np.random.default_rng(0).integers(0, 256, (16, 40, 72, 3), dtype=np.uint8)
    assert loaded(videos=[clip])["pixel_values_videos"].shape == (1, 16, 3, 32, 48)
    assert VJEPA2ACProcessor(resolution=(32, 32)).resolution == 32


def test_colours_of_a_wide_grid_lie_in_its_rows():
    features = torch.randn(2, 6, 8)
    colours = FeatureColours(features, (2, 3))(features)
    assert colours.shape == (2, 2, 3, 3)
    torch.testing.assert_close(colours[1, 1, 0], FeatureColours(features, (1, 6))(features)[1, 0, 3])


@pytest.mark.parametrize(("text", "expected"), [("256", 256), ("256,448", (256, 448)), ("64,64", 64)])
def test_resolutions_on_a_command_line(text, expected):
    assert parse_resolution(text) == expected and parse_resolution(show_resolution(expected)) == expected


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("bad", ["", "x", "256x448", "256,", "0", "-16", "1,2,3", "16.5"])
def test_resolutions_that_are_refused(bad):
    with pytest.raises(ValueError, match="resolution"):
        parse_resolution(bad)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frame_size": 250}, "frame_size height 250 is not a multiple of encoder patch_size 16"),
        ({"frame_size": [256, 450]}, "frame_size width 450 is not a multiple of encoder patch_size 16"),
        ({"frame_size": [256]}, r"frame_size must be a side in pixels or a pair \(height, width\), found \[256\]"),
        ({"frame_size": True}, "frame_size must be of type int"),
        ({"frame_size": [16, 64]}, "interpolate_rope needs at least 2 x 2 patches, found 1 x 4"),
    ],
)
def test_sizes_that_do_not_fit(values, message):
    with pytest.raises((ValueError, TypeError), match=message):
        config(**values)


def test_hierarchical_features_belong_to_their_predictor(tmp_path):
    """Refused where the configuration, the features or a saved predictor says otherwise, with both values."""
    plain = config(64)
    plain.encoder_config = VJEPA2Config(crop_size=64, hidden_size=D, num_hidden_layers=1, num_attention_heads=2)
    plain.hierarchical_features = True
    with pytest.raises(
        ValueError, match="hierarchical_features is true, but the encoder's hierarchical_layers are None"
    ):
        plain.check()
    world, wide = model(64), model(64, hierarchical_features=True)
    pixels, actions, states = torch.randn(1, 2 * T, 3, 64, 64), torch.zeros(1, T - 1, 13), torch.zeros(1, T, 2)
    message = r"must be \(batch, steps, 16, 24\) .* hierarchical_features False, found \(1, 4, 16, 48\)"
    with pytest.raises(ValueError, match=message):
        world(features=wide.encode(pixels), actions=actions, states=states)
    world.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hierarchical_features is asked to be True, the model was trained with False"):
        VJEPA2ACModel.from_pretrained(tmp_path, hierarchical_features=True)
    assert not VJEPA2ACModel.from_pretrained(tmp_path, hierarchical_features=False).config.hierarchical_features


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hierarchical_layers": [0]}, r"must rise to the last of 2 layers, 1, found \[0\]"),
        ({"hierarchical_layers": [1, 1]}, r"found \[1, 1\]"),
        ({"interpolate_rope": "yes"}, "interpolate_rope must be true or false, found 'yes'"),
        ({"img_temporal_dim_size": 2}, "img_temporal_dim_size must be 1 or null, found 2"),
        ({"interpolate_rop": True}, "unknown key 'interpolate_rop'.*'interpolate_rope'"),
    ],
)
def test_encoder_fields_that_are_refused(changes, message):
    encoder = {**config(64).encoder_config.to_dict(), **changes}
    with pytest.raises(ValueError, match=message):
        VJEPA2ACConfig(encoder_config=encoder)


def test_earlier_name_of_the_image_path_is_taken():
    encoder = copy.deepcopy(config(64).encoder_config)
    encoder.use_image_patch_embedder, encoder.img_temporal_dim_size = False, 1
    assert (
        VJEPA2ACModel(VJEPA2ACConfig(encoder_config=encoder, **SMALL)).encoder.embeddings.patch_embeddings_img
        is not None
    )


def test_a_picture_as_a_goal():
    """By default a picture is repeated to a tubelet; on demand it takes the image path, where there is one."""
    made, processor = model([64, 96]), VJEPA2ACProcessor(resolution=[64, 96], frames_per_clip=2 * T)
    picture = torch.randint(0, 256, (3, 80, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    repeated, alone = encode_goal(made, processor, picture), encode_goal(made, processor, picture, as_pictures=True)
    pixels = processor.normalize_pixels(resize_frames(picture[None], (64, 96)))
    with torch.no_grad():
        hidden = made.encoder(pixels[None]).last_hidden_state  # one frame: the image path
        twice = made.encoder(pixels[None].expand(-1, 2, -1, -1, -1)).last_hidden_state
    normal = torch.nn.functional.layer_norm
    torch.testing.assert_close(alone, normal(hidden, (D,))[0])
    torch.testing.assert_close(repeated, normal(twice, (D,))[0])
    assert (alone - repeated).abs().mean() > 0.01
    with pytest.raises(ValueError, match="as_pictures needs a goal of frames, found features"):
        encode_goal(made, processor, alone, as_pictures=True)
    v2 = VJEPA2Config(crop_size=32, hidden_size=D, num_attention_heads=2, num_hidden_layers=1)
    with pytest.raises(ValueError, match="needs an encoder with use_image_patch_embedder"):
        VJEPA2ACModel(VJEPA2ACConfig(encoder_config=v2, **SMALL)).encode(torch.zeros(1, 1, 3, 32, 32), as_pictures=True)


@pytest.mark.parametrize("bad", [255, (256, 447), 0, (256, 448, 3)])
def test_builds_take_even_sizes(bad):
    with pytest.raises(ValueError, match="resolution must be"):
        BuildOptions(resolution=bad)
    assert as_resolution([256, 448]) == BuildOptions(resolution=[256, 448]).resolution == (256, 448)
