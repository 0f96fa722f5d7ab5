"""A small V-JEPA 2.1 encoder and wide frames through the whole job: official file, data, training, figures, the Hub."""

import json
import re

import pytest
import torch
from helpers_data import name_of, write_recording
from helpers_models import WITHOUT_PACKAGE
from hub_server import HubServer
from test_encoder21 import TENSORS
from test_golden import weights
from test_push import environment, run

from vjepa_ac_hf import VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.planning import CEM, encode_context, plan

LOSS_ELSEWHERE = """
import torch
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("org/world", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("org/world", trust_remote_code=True)
frames = torch.randint(0, 256, (16, 3, 80, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
inputs = processor(videos=[frames], actions=torch.zeros(1, 7, 38), states=torch.zeros(1, 8, 2))
with torch.no_grad():
    print("loss", float(model(**inputs).loss), tuple(inputs["pixel_values_videos"].shape))
"""


@pytest.mark.slow
def test_from_an_official_file_to_the_hub(tmp_path):
    v21 = weights(TENSORS, "module.backbone.")
    torch.save({"target_encoder": v21, "encoder": v21, "predictor": {}}, tmp_path / "official.pt")
    for session in range(4):
        write_recording(tmp_path / "recordings", name_of(f"s{session}"), 200, session, size=(80, 128))
    tiny = {"pred_hidden_size": 48, "pred_num_hidden_layers": 2, "pred_num_attention_heads": 2}
    (tmp_path / "tiny.json").write_text(json.dumps({**tiny, "hierarchical_features": True}))
    out, clips = tmp_path / "out", tmp_path / "clips"
    convert = ["-m", "vjepa_ac_hf.convert_vjepa2_ac_to_hf", "--checkpoint", tmp_path / "official.pt"]
    steps = [
        [*convert, "--output", tmp_path / "encoder", "--family=2.1", "--encoder_heads=3", "--crop_size=320"],
        [
            *("dataset_scripts/build_vpt_tubelets.py", "--shards", tmp_path / "recordings", "--output", clips),
            *("--resolution=64,96", "--validation_sessions", "silly-s1-20220101"),
        ],
        [
            *("examples/train.py", "--dataset", clips, "--output_dir", out, "--model_config", tmp_path / "tiny.json"),
            *("--encoder", tmp_path / "encoder", "--frame_size=64,96", "--max_steps=2", "--per_device_batch_size=2"),
            *("--log_every=1", "--eval_every=2", "--num_workers=0", "--cache_features", tmp_path / "cache"),
            *("--push_to_hub", "--hub_model_id=org/world"),
        ],
        [
            *("examples/evaluate.py", "--model", out, "--dataset", clips, "--output", tmp_path / "report"),
            *("--shuffles=1", "--num_pictures=1"),
        ],
        [
            *("examples/energy_landscape.py", "--model", out, "--dataset", clips, "--output", tmp_path / "energy"),
            *("--cells=3", "--max_clips=1"),
        ],
        [
            *("examples/train_head.py", "--task=inverse_dynamics", "--model", out, "--dataset", clips),
            *("--output_dir", tmp_path / "head", "--max_steps=2", "--per_device_batch_size=2", "--head_hidden_size=24"),
        ],
    ]
    with HubServer() as server:
        env = environment(server, tmp_path)
        for step in steps:
            done = run(step, env)
            assert done.returncode == 0, (step[0], done.stderr[-3000:])
        elsewhere = environment(server, tmp_path / "nothing", token=None)
        elsewhere.pop("PYTHONPATH", None)
        read = run(["-c", WITHOUT_PACKAGE + LOSS_ELSEWHERE], elsewhere)
        assert read.returncode == 0, read.stderr[-3000:]
    assert "(1, 16, 3, 64, 96)" in read.stdout

    model, processor = VJEPA2ACModel.from_pretrained(out).eval(), VJEPA2ACProcessor.from_pretrained(out)
    assert model.config.grid == (4, 6) and model.config.feature_size == 192 and processor.resolution == (64, 96)
    frames = torch.randint(0, 256, (16, 3, 80, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = processor(videos=[frames], actions=torch.zeros(1, 7, 38), states=torch.zeros(1, 8, 2))
    with torch.no_grad():
        loss = float(model(**inputs).loss)
    assert float(re.search(r"loss (\S+)", read.stdout)[1]) == pytest.approx(loss, rel=1e-4)
    context = encode_context(model, processor, frames=frames[:2], states=torch.zeros(1, 2))
    made = plan(
        *(model, processor, context, frames[3]),
        horizon=2,
        generator=torch.Generator().manual_seed(0),
        method=CEM(candidates=4, elites=2, iterations=1),
        goal_as_pictures=True,
    )
    assert made.features.shape == (2, 24, 192) and torch.isfinite(made.features).all()

    card = (out / "README.md").read_text()
    assert "8 steps of 4 x 6 tokens of width 192" in card and "feature space of V-JEPA 2.1" in card
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["horizons"]
    built = (clips / "README.md").read_text()
    assert "16 frames, 96x64, H.264" in built
    key = json.loads(next((tmp_path / "cache").glob("train-*/key.json")).read_text())
    assert key["resolution"] == [64, 96] and key["hierarchical_features"] and key["encoder_config.interpolate_rope"]
