"""Pushing to the Hub and reading back: the unmodified client against a local server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_models import WITHOUT_PACKAGE
from helpers_training import write_workspace
from hub_server import HubServer
from huggingface_hub import DatasetCard

ROOT = Path(__file__).resolve().parents[1]

READ_BACK = """
import torch, vjepa_ac_hf
from datasets import load_dataset
from transformers import AutoModel, AutoProcessor
from vjepa_ac_hf.loading.clips import load_action_statistics

model, processor = AutoModel.from_pretrained("org/world").eval(), AutoProcessor.from_pretrained("org/world")
clips = load_dataset("org/clips", split="train")
clip = clips[0]
inputs = processor(videos=[clip["video"]], actions=[clip["actions"]], states=[clip["states"]])
with torch.no_grad():
    loss = model(**inputs).loss
assert torch.isfinite(loss)
assert processor.action_statistics == load_action_statistics("org/clips").to_dict()
print("clips", len(clips), "columns", sorted(clips.column_names))
"""

# For a process that cannot import this package.
READ_BACK_WITHOUT_PACKAGE = (
    WITHOUT_PACKAGE
    + """
import torch
from datasets import load_dataset
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("org/world", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("org/world", trust_remote_code=True)
clip = load_dataset("org/clips", split="train")[0]
frames = torch.stack([frame for frame in clip["video"]])
inputs = processor(videos=[frames], actions=[clip["actions"]], states=[clip["states"]])
with torch.no_grad():
    print("loss", float(model(**inputs).loss))
"""
)


def environment(server: HubServer | str, folder: Path, token: str | None = "hf_test") -> dict[str, str]:
    url = server if isinstance(server, str) else server.url
    values = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    values |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    clean = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    return clean | values | ({"HF_TOKEN": token} if token else {})


def run(arguments: list, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env, cwd=ROOT)


def train_command(clips: str, output: Path, config: Path, *flags: str) -> list:
    return [
        *("examples/train.py", "--dataset", clips, "--output_dir", output, "--model_config", config),
        *("--max_steps=2", "--checkpoint_every=1", "--log_every=1", "--per_device_batch_size=2", "--num_workers=0"),
        *("--eval_every=0", "--push_to_hub", "--hub_model_id=org/world", *flags),
    ]


@pytest.mark.slow
def test_model_and_data_set_are_pushed_and_read_back(tmp_path):
    config = write_workspace(tmp_path, train=4, validation=2) / "tiny.json"
    with HubServer() as server:
        env = environment(server, tmp_path)
        push = "from huggingface_hub import HfApi; a = HfApi(); a.create_repo('org/clips', repo_type='dataset'); "
        push += f"a.upload_folder(repo_id='org/clips', repo_type='dataset', folder_path={str(tmp_path / 'clips')!r})"
        assert run(["-c", push], env).returncode == 0
        trained = run(train_command("org/clips", tmp_path / "out", config, "--eval_every=2"), env)
        assert trained.returncode == 0, trained.stderr[-3000:]
        assert "pushed to org/world: all is up" in trained.stdout
        files = server.repositories[("model", "org/world")]
        wanted = {"config.json", "model.safetensors", "processor_config.json", "README.md", "modeling_vjepa2_ac.py"}
        assert wanted | {"metrics.jsonl", "training_args.json"} <= files.keys()
        assert not [f for f in files if f.startswith(("checkpoints", ".hub")) or f.endswith(".tmp")]
        assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
        card = files["README.md"].decode()
        assert (
            "datasets:\n- org/clips" in card and "model-index:" in card and "error over persistence, horizon 1" in card
        )
        assert server.commits[-1][1] == "Trained model, step 2"
        read = run(["-c", READ_BACK], environment(server, tmp_path / "elsewhere", token=None))
        assert read.returncode == 0, read.stderr[-3000:]
        assert "clips 4" in read.stdout
        env = environment(server, tmp_path / "nothing", token=None)
        env.pop("PYTHONPATH", None)
        read = run(["-c", READ_BACK_WITHOUT_PACKAGE], env)
        assert read.returncode == 0, read.stderr[-3000:]
        assert float(read.stdout.split("loss")[1]) > 0


@pytest.mark.slow
def test_a_build_is_pushed_with_its_card(tmp_path):
    with HubServer() as server:
        env = environment(server, tmp_path)
        flags = ["--output", tmp_path / "built", "--resolution=32", "--push_to_hub=org/tubelets"]
        built = run(["dataset_scripts/build_vpt_tubelets.py", "--shards", "tests/data", *flags], env)
        assert built.returncode == 0, built.stderr[-3000:]
        files = server.repositories[("dataset", "org/tubelets")]
        assert {"README.md", "action_stats.json", "report.json"} <= files.keys()
        assert not [f for f in files if f.startswith(".build")]
        load = "from datasets import load_dataset; d = load_dataset('org/tubelets', split='train'); "
        load += "print('rows', len(d), len(d[0]['video']), d.features['actions'].shape)"
        read = run(["-c", load], environment(server, tmp_path / "elsewhere", token=None))
        assert read.returncode == 0, read.stderr[-3000:]
        card = DatasetCard(files["README.md"].decode())
        assert card.data.license == "unknown" and "OpenAI's contractor data: MIT" in card.text
        assert all(
            f"\n## {section}\n" in card.text for section in ("Columns", "Data", "Limits", "Licence and citation")
        )
        clips = json.loads(files["report.json"])["clips"]
        assert f"rows {clips} 16 (7, 38)" in read.stdout
