"""Numbers of the official V-JEPA 2 implementation (sizes in the metadata), float32 on a CPU.

If one of these fails, the mathematics has changed: find the change, never the tolerance. The files hold the official
weights (official names), inputs, outputs, losses and gradients; they cannot be made anew from this project.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers_models import golden_config
from safetensors import safe_open
from transformers import VJEPA2Config

from vjepa_ac_hf import VJEPA2ACConfig, VJEPA2ACModel
from vjepa_ac_hf.convert_vjepa2_ac_to_hf import convert_encoder_state_dict, convert_predictor_state_dict

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = dict(rtol=0, atol=1e-5)


def load(name: str) -> tuple[dict, dict]:
    with safe_open(GOLDEN / name, "pt") as file:
        return json.loads(file.metadata()["config"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def weights(tensors: dict, prefix: str = "") -> dict:
    return {prefix + k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}


@pytest.fixture(params=["ac_predictor_l1_auto2.safetensors", "ac_predictor_l2_auto4.safetensors"])
def predictor_case(request):
    sizes, tensors = load(request.param)
    model = VJEPA2ACModel(golden_config(sizes))
    model.predictor.load_state_dict(convert_predictor_state_dict(weights(tensors)), strict=True)
    inputs = {
        "features": tensors["input.features"].unflatten(1, (sizes["num_tubelets"], -1)),
        "actions": tensors["input.actions"],
        "states": tensors["input.states"],
    }
    return model, inputs, tensors, sizes


def test_predictor_outputs(predictor_case):
    model, inputs, tensors, _ = predictor_case
    steps = inputs["actions"].shape[1]
    with torch.no_grad():
        raw, _ = model.predictor(inputs["features"][:, :-1], inputs["actions"], inputs["states"][:, :steps])
        predicted = model.predict(inputs["features"][:, :-1], inputs["actions"], inputs["states"])
        output = model(**inputs)
    torch.testing.assert_close(raw.flatten(1, 2), tensors["raw_output.teacher_forcing"], **TOLERANCE)
    torch.testing.assert_close(predicted.flatten(1, 2), tensors["output.teacher_forcing"], **TOLERANCE)
    torch.testing.assert_close(output.predicted_features, predicted)
    torch.testing.assert_close(output.rollout_features.flatten(1, 2), tensors["output.rollout"], **TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients(predictor_case, checkpointing):
    model, inputs, tensors, sizes = predictor_case
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    output = model(**inputs)
    exponent = sizes["loss_exponent"]  # the official losses are mean(|z - h| ** p) / p
    for ours, official in (
        ("teacher_forcing_loss", "loss.teacher_forcing"),
        ("rollout_loss", "loss.rollout"),
    ):
        torch.testing.assert_close(getattr(output, ours) / exponent, tensors[official], **TOLERANCE)
    torch.testing.assert_close(output.loss, output.teacher_forcing_loss + output.rollout_loss)
    (output.loss / exponent).backward()
    gradients = {name: p.grad for name, p in model.predictor.named_parameters()}
    golden = convert_predictor_state_dict(
        {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    )
    assert len(golden) == 4
    for name, gradient in golden.items():
        torch.testing.assert_close(gradients[name], gradient, **TOLERANCE)


@pytest.mark.parametrize("encoding", ["tubelet", "clip"])
def test_encoder(encoding):
    sizes, tensors = load("encoder_small.safetensors")
    names = (
        "crop_size",
        "patch_size",
        "tubelet_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    encoder = VJEPA2Config(
        **{k: sizes[k] for k in names}, mlp_ratio=sizes["mlp_ratio"], layer_norm_eps=sizes["layer_norm_eps"]
    )
    config = VJEPA2ACConfig(
        encoder_config=encoder,
        encoding=encoding,
        normalize_features=False,
        pred_hidden_size=48,
        pred_num_hidden_layers=1,
        pred_num_attention_heads=2,
    )
    model = VJEPA2ACModel(config)
    model.encoder.load_state_dict(convert_encoder_state_dict(weights(tensors, "module.backbone.")), strict=True)
    encoded = model.encode(tensors["input.video_bcthw"].transpose(1, 2)).flatten(1, 2)
    golden = tensors[{"tubelet": "output.per_tubelet", "clip": "output.whole_clip"}[encoding]]
    torch.testing.assert_close(encoded, golden, **TOLERANCE)


def test_official_checkpoint_file(tmp_path):
    """Names with prefixes, the target encoder preferred, the unused extrinsics encoder dropped, no other pickle."""
    from vjepa_ac_hf.convert_vjepa2_ac_to_hf import convert_checkpoint

    _, encoder = load("encoder_small.safetensors")
    _, predictor = load("ac_predictor_l1_auto2.safetensors")
    assert any("extrinsics_encoder" in k for k in predictor)
    predictor = weights(predictor, "module.backbone.")
    # The two golden files have the same encoder width (48), so together they are a checkpoint.
    checkpoint = {
        "encoder": {k: torch.zeros_like(v) for k, v in weights(encoder, "module.").items()},
        "target_encoder": weights(encoder, "module."),
        "predictor": predictor,
    }
    torch.save(checkpoint, tmp_path / "official.pt")
    model = convert_checkpoint(tmp_path / "official.pt", crop_size=64, encoder_heads=2, predictor_heads=2)
    assert model.config.action_dim == 7 and model.config.pred_num_hidden_layers == 2
    weight = encoder["weights.blocks.1.attn.qkv.weight"]
    torch.testing.assert_close(model.encoder.layer[1].attention.key.weight, weight[48:96], rtol=0, atol=0)
    assert not any(p.requires_grad for p in model.encoder.parameters())

    del checkpoint["predictor"]
    torch.save(checkpoint, tmp_path / "no_predictor.pt")
    with pytest.raises(ValueError, match="no_predictor.pt.*lacks.*predictor"):
        convert_checkpoint(tmp_path / "no_predictor.pt")
    with pytest.raises(ValueError, match="surprise.weight"):
        convert_predictor_state_dict({"module.surprise.weight": torch.zeros(1)})
