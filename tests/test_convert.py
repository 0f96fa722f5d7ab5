"""Official files of V-JEPA 2, 2.1 and 2-AC, made up with random weights, through the converter's command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_encoder21 import CASES, SIZES, TENSORS, TOLERANCE, golden_input
from test_golden import load as load_golden
from test_golden import weights
from transformers import AutoModel

from vjepa_ac_hf import VJEPA2ACConfig, VJEPA2ACModel
from vjepa_ac_hf.convert_vjepa2_ac_to_hf import (
    RELEASED,
    OfficialFile,
    convert_checkpoint,
    convert_encoder_checkpoint,
    convert_encoder_state_dict,
    infer_encoder_config,
    main,
    read_checkpoint,
)
from vjepa_ac_hf.modeling_encoder_vjepa2_ac import VJEPA21EncoderModel

FLAGS = ("--encoder_heads", "3", "--crop_size", "320")
PREDICTOR = {"pred_hidden_size": 48, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}


def convert(monkeypatch, checkpoint: Path, output: Path, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", "--checkpoint", str(checkpoint), "--output", str(output), *flags])
    main()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """`v21.pt`: the golden encoder beside a student of zeros and V-JEPA 2.1's predictor; `v2.pt`; `ac.pt`."""
    folder = tmp_path_factory.mktemp("official")
    v21 = weights(TENSORS, "module.backbone.")
    masked = {
        "module.backbone.mask_tokens.0": torch.zeros(1, 1, 48),
        "module.backbone.predictor_embed.weight": torch.zeros(4, 48),
    }
    torch.save(
        {"encoder": {k: 0 * v for k, v in v21.items()}, "ema_encoder": v21, "predictor": masked}, folder / "v21.pt"
    )
    _, encoder = load_golden("encoder_small.safetensors")
    v2 = weights(encoder, "module.")
    torch.save({"encoder": {k: 0 * v for k, v in v2.items()}, "target_encoder": v2}, folder / "v2.pt")
    _, predictor = load_golden("ac_predictor_l1_auto2.safetensors")
    torch.save({"encoder": v2, "predictor": weights(predictor, "module.")}, folder / "ac.pt")
    return folder


def test_a_v21_file_becomes_an_encoder_folder(monkeypatch, files, tmp_path):
    convert(monkeypatch, files / "v21.pt", tmp_path / "encoder", *FLAGS)
    model = VJEPA2ACModel.from_pretrained_encoder(
        tmp_path / "encoder", frame_size=[256, 384], normalize_features=False, **PREDICTOR
    )
    config = model.config.encoder_config
    assert config.hierarchical_layers == SIZES["hierarchical_layers"] and config.crop_size == 320
    case = CASES["wide256x384"]
    torch.testing.assert_close(model.encode(golden_input(case))[:, 0], TENSORS["output.wide256x384"], **TOLERANCE)
    # The whole model keeps it, without the converter's folder and with transformers' Auto classes.
    model.save_pretrained(tmp_path / "model")
    again = AutoModel.from_pretrained(tmp_path / "model")
    assert torch.equal(again.encode(golden_input(case)), model.encode(golden_input(case)))
    # Names of the pull request, in a config.json that says vjepa2.
    written = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert written["model_type"] == "vjepa2" and written["interpolate_rope"] is True
    assert written["use_rope_interleave"] and written["use_modality_embeddings"] and written["use_image_patch_embedder"]


def test_v2_files_and_ac_files(monkeypatch, files, tmp_path):
    _, tensors = load_golden("encoder_small.safetensors")
    flags = ("--encoder_heads", "2", "--crop_size", "64", "--predictor_heads", "2")
    convert(monkeypatch, files / "v2.pt", tmp_path / "v2", *flags)
    convert(monkeypatch, files / "ac.pt", tmp_path / "ac", *flags)
    convert(monkeypatch, files / "ac.pt", tmp_path / "alone", "--encoder_only", *flags)
    pixels = tensors["input.video_bcthw"].transpose(1, 2)
    for folder in ("v2", "alone"):
        model = VJEPA2ACModel.from_pretrained_encoder(tmp_path / folder, normalize_features=False, **PREDICTOR)
        torch.testing.assert_close(model.encode(pixels).flatten(1, 2), tensors["output.per_tubelet"], rtol=0, atol=1e-5)
    model = AutoModel.from_pretrained(tmp_path / "ac")
    assert isinstance(model, VJEPA2ACModel) and model.config.action_dim == 7
    with pytest.raises(ValueError, match=r"v2.pt: lacks an action-conditioned predictor"):
        convert_checkpoint(files / "v2.pt")
    assert isinstance(convert_encoder_checkpoint(files / "ac.pt", crop_size=64, encoder_heads=2), VJEPA21EncoderModel)


@pytest.mark.parametrize(
    ("file", "flags", "message"),
    [
        ("v21.pt", ("--family", "2"), r"v21.pt: expected a file of V-JEPA 2, found one of V-JEPA 2.1"),
        ("v2.pt", ("--family", "2.1"), r"v2.pt: expected a file of V-JEPA 2.1, found one of V-JEPA 2\b"),
        ("v2.pt", ("--family", "2-ac"), r"expected a file of V-JEPA 2-ac, found one of V-JEPA 2\b"),
        ("v21.pt", (), r"no released file has .*2.1, width 48, depth 12.*--encoder_heads and --crop_size"),
        ("v21.pt", ("--encoder_heads", "3", "--crop_size", "250"), "crop_size 250 is not a multiple of patch_size 16"),
        (
            "ac.pt",
            ("--encoder_heads", "2", "--crop_size", "64"),
            r"no released predictor has width \d+ and depth 2: give --predictor_heads",
        ),
        ("other.pt", (), r"other.pt: lacks 'encoder', found \['model'\]"),
    ],
)
def test_files_that_are_refused(monkeypatch, files, tmp_path, file, flags, message):
    torch.save({"model": {}}, files / "other.pt")
    with pytest.raises(ValueError, match=message):  # one line of the program: tests/test_console.py
        convert(monkeypatch, files / file, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_predictor_of_another_width_is_refused(files, tmp_path):
    checkpoint = torch.load(files / "ac.pt", weights_only=True)
    checkpoint["predictor"]["module.predictor_embed.weight"] = torch.zeros(48, 64)
    torch.save(checkpoint, tmp_path / "wide.pt")
    with pytest.raises(ValueError, match="wide.pt: the predictor takes width 64, the encoder gives 48"):
        convert_checkpoint(tmp_path / "wide.pt", crop_size=64, encoder_heads=2, predictor_heads=2)


def test_a_folder_whose_weights_are_another_versions_is_refused(monkeypatch, files, tmp_path):
    """A V-JEPA 2.1 folder described as V-JEPA 2, and the reverse."""
    convert(monkeypatch, files / "v21.pt", tmp_path / "encoder", *FLAGS)
    file = tmp_path / "encoder" / "config.json"
    v21 = json.loads(file.read_text())
    v2 = {
        k: v
        for k, v in v21.items()
        if k not in ("hierarchical_layers", "use_modality_embeddings", "use_image_patch_embedder")
    }
    file.write_text(json.dumps({**v2, "use_rope_interleave": False, "interpolate_rope": False}))
    message = (
        r"config.json describes an encoder of V-JEPA 2, the weights are another's: 2 are missing \(encoder.layernorm"
    )
    with pytest.raises(ValueError, match=message + r".*12 are not of it \(encoder.embeddings.img_mod_embed"):
        VJEPA2ACModel.from_pretrained_encoder(tmp_path / "encoder", **PREDICTOR)
    convert(monkeypatch, files / "v2.pt", tmp_path / "v2", "--encoder_heads", "2", "--crop_size", "64")
    file = tmp_path / "v2" / "config.json"
    depth = json.loads(file.read_text())["num_hidden_layers"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hierarchical_layers": [depth - 1]}))
    with pytest.raises(ValueError, match=r"of V-JEPA 2.1, .*: 2 are missing \(encoder.norms_block"):
        VJEPA2ACModel.from_pretrained_encoder(tmp_path / "v2", **PREDICTOR)


# Hand-copied from the README of facebookresearch/vjepa2 and golden/README: parameters as counted there on the meta
# device (V-JEPA 2.1), or by hand from width, depth and hidden width (V-JEPA 2).
PARAMETERS = {
    "vjepa2_1_vitb_dist_vitG_384": 86_833_152,
    "vjepa2_1_vitl_dist_vitG_384": 304_680_960,
    "vjepa2_1_vitg_384": 1_013_267_968,
    "vjepa2_1_vitG_384": 1_845_216_768,
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name):
    """A file with the released tensors' shapes, none of them filled, gives the released configuration by itself."""
    released = RELEASED[name]
    D, M, v21 = released.width, int(released.width * released.mlp_ratio), released.family == "2.1"

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    official = {"patch_embed.proj.weight": empty(D, 3, 2, 16, 16), "patch_embed.proj.bias": empty(D)}
    for i in range(released.depth):
        shapes = {"norm1.weight": (D,), "norm1.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,)}
        shapes |= {"attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,), "attn.proj.weight": (D, D)}
        shapes |= {"attn.proj.bias": (D,), "mlp.fc1.weight": (M, D), "mlp.fc1.bias": (M,)}
        shapes |= {"mlp.fc2.weight": (D, M), "mlp.fc2.bias": (D,)}
        official |= {f"blocks.{i}.{k}": empty(*shape) for k, shape in shapes.items()}
    norms = [f"norms_block.{i}" for i in range(4)] if v21 else ["norm"]
    official |= {f"{norm}.{kind}": empty(D) for norm in norms for kind in ("weight", "bias")}
    if v21:
        official |= {"img_mod_embed": empty(1, 1, D), "video_mod_embed": empty(1, 1, D)}
        official |= {"patch_embed_img.proj.weight": empty(D, 3, 1, 16, 16), "patch_embed_img.proj.bias": empty(D)}
        assert len(official) == 12 * released.depth + 14
    converted = convert_encoder_state_dict(official)
    config = infer_encoder_config(OfficialFile(f"somewhere/{name}.pt", released.family, converted, None))
    assert config.num_attention_heads * 64 == D or name == "vith"  # 80 there
    assert config.crop_size == (384 if "384" in name else 256) and config.mlp_ratio == pytest.approx(released.mlp_ratio)
    with torch.device("meta"):
        encoder = VJEPA21EncoderModel(config).encoder
    encoder.load_state_dict(converted, strict=True, assign=True)
    assert sum(p.numel() for p in encoder.parameters()) == PARAMETERS.get(
        name, sum(t.numel() for t in official.values())
    )
    # Under another name, the sizes alone must do, or say what is missing.
    renamed = OfficialFile("renamed.pt", released.family, converted, None)
    if name in ("vitg", "vitg-384"):
        with pytest.raises(
            ValueError, match=r"those of vitg \(256 pixels\), vitg-384 \(384 pixels\): give --crop_size"
        ):
            infer_encoder_config(renamed)
    else:
        assert infer_encoder_config(renamed).to_dict() == config.to_dict()


MEASURE = """
import re, sys
from pathlib import Path
from vjepa_ac_hf.convert_vjepa2_ac_to_hf import main
status = lambda field: 1024 * int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = status("VmRSS")
main()
print("PEAK", status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_peak_memory_is_below_twice_the_weights(tmp_path):
    """Resident memory, mapped pages of the file included, beyond that after the imports; not all of it is used."""
    width, depth = 640, 16
    state, generator = {}, torch.Generator().manual_seed(0)
    config = VJEPA2ACConfig().encoder_config
    config.update({"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 10})
    for name, tensor in VJEPA21EncoderModel(config).encoder.state_dict().items():
        new = re.sub(r"^layer\.", "blocks.", name).replace("attention.", "attn.").replace("layernorm", "norm")
        new = new.replace("embeddings.patch_embeddings", "patch_embed")
        if ".query." in new:
            shape = (3 * tensor.shape[0], *tensor.shape[1:])
            state[new.replace("query", "qkv")] = torch.randn(shape, generator=generator)
        elif not re.search(r"\.(key|value)\.", new):
            state[new] = tensor
    size = sum(4 * t.numel() for t in state.values())
    assert size > 300e6
    student = {k: torch.zeros_like(v) for k, v in state.items()}
    torch.save({"encoder": student, "target_encoder": state, "opt": {"exp_avg": student}}, tmp_path / "big.pt")
    del student
    command = [
        sys.executable,
        "-c",
        MEASURE,
        "--checkpoint",
        str(tmp_path / "big.pt"),
        "--output",
        str(tmp_path / "out"),
    ]
    result = subprocess.run([*command, "--encoder_heads=10", "--crop_size=256"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak = int(re.search(r"PEAK (\d+)", result.stdout)[1])
    assert peak < 2 * size, (peak / size, size)
    saved = VJEPA21EncoderModel.load(tmp_path / "out")
    key = state["blocks.3.attn.qkv.weight"][width : 2 * width]
    assert torch.equal(saved.encoder.layer[3].attention.key.weight, key)


def test_only_what_is_used_is_read(files):
    file = read_checkpoint(files / "v21.pt")
    assert file.family == "2.1" and file.predictor is None
    expected = TENSORS["weights.blocks.1.attn.qkv.weight"]
    assert torch.equal(file.encoder["layer.1.attention.value.weight"], expected[96:])
