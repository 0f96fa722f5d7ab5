"""The page as a Space: its folder is whole, starts as it is, and arrives on the Hub."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx2
import pytest
import yaml
from datasets import load_dataset
from helpers_clips import write_clips
from helpers_models import save_world
from hub_server import HubServer

from vjepa_ac_hf.app.space import GRADIO, REQUIREMENTS, write_space

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model with figures, something of its run beside it, and clips."""
    folder = tmp_path_factory.mktemp("space")
    write_clips(folder / "clips", train=3, validation=6)
    (folder / "clips" / "report.json").write_text(json.dumps({"clips": 9}))
    model = save_world(folder / "model")
    (model / "checkpoints").mkdir()
    (model / "checkpoints" / "private.safetensors").write_bytes(b"0")
    (model / "run.json").write_text("{}")
    (folder / "report").mkdir()
    rows = [{"horizon": 1, "error": 0.5, "persistence": 0.75}]
    report = {"horizons": rows, "command": f"python evaluate.py --model {model}", "model": str(model)}
    report |= {"dataset": "org/clips", "decoder": str(folder / "decoder")}
    (folder / "report" / "metrics.json").write_text(json.dumps(report))
    return folder


def write(parts, folder, **options):
    values = {"title": 'A "world"', "model": str(parts / "model"), "dataset": str(parts / "clips"), "clips": 3}
    return write_space(folder, **{**values, **options})


def test_the_folder_has_what_a_space_needs(parts, tmp_path):
    command = f"python examples/push_space.py --model {parts}/model --dataset org/clips --output out"
    files = write(parts, tmp_path / "space", evaluation=parts / "report", command=command)
    header = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---")[1])
    assert header["title"] == 'A "world"' and header["sdk"] == "gradio" and header["sdk_version"] == GRADIO
    assert (tmp_path / "space" / header["app_file"]).is_file() and "models" not in header
    assert {"model/model.safetensors", "model/processor_config.json", "evaluation/metrics.json"} <= set(files)
    assert {"vjepa_ac_hf/app/page.js", "vjepa_ac_hf/__init__.py", "requirements.txt", "packages.txt"} <= set(files)
    assert not [name for name in files if name.startswith("model/checkpoints") or name.endswith((".pyc", "run.json"))]
    clips = load_dataset(str(tmp_path / "space" / "clips"), split="validation")
    assert len(clips) == 3 and clips[2]["recording_id"].startswith("toy-")
    app = (tmp_path / "space" / "app.py").read_text()
    compile(app, "app.py", "exec")
    metrics = json.loads((tmp_path / "space" / "evaluation" / "metrics.json").read_text())
    assert metrics == {
        "horizons": [{"horizon": 1, "error": 0.5, "persistence": 0.75}],
        **{"model": "model", "dataset": "org/clips", "decoder": "decoder"},
    }
    card = (tmp_path / "space" / "README.md").read_text()
    assert "push_space.py --model model --dataset org/clips --output out" in card
    assert str(parts) not in app + card  # nothing of this machine
    with pytest.raises(ValueError, match="is not empty: choose another --output"):
        write(parts, tmp_path / "space")
    with pytest.raises(ValueError, match=r"no model.safetensors: a folder of train.py"):
        write(parts, tmp_path / "other", model=str(parts / "clips"))


def test_models_on_the_hub_are_named_and_not_copied(parts, tmp_path):
    files = write(parts, tmp_path / "space", model="org/world", decoder="org/decoder")
    header = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---")[1])
    assert header["models"] == ["org/world", "org/decoder"]
    assert not [name for name in files if name.startswith(("model/", "decoder/"))]
    assert "'model': 'org/world'" in (tmp_path / "space" / "app.py").read_text()


def test_requirements_are_the_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = {*project["dependencies"], *project["optional-dependencies"]["app"]}
    assert set(REQUIREMENTS) == expected
    allowed = next(r for r in REQUIREMENTS if r.startswith("gradio"))
    assert re.fullmatch(r"gradio>=6\.31,<7", allowed) and GRADIO == "6.31.0"


def start(python, folder, **variables):
    """`python app.py` and its address, once it says it; ended by the caller."""
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": "7999",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    environment.pop("PYTHONPATH", None) if "PYTHONPATH" not in variables else None
    process = subprocess.Popen(
        [python, "app.py"], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("page: "):
            return process, line.removeprefix("page: ").strip()
    raise AssertionError("".join(said))


def play(address):
    with httpx2.Client(base_url=address, timeout=60) as client:
        component = next(c["id"] for c in client.get("/config").json()["components"] if c["type"] == "html")

        def ask(name, **request):
            body = {"session_hash": "s", "component_id": component, "fn_name": name, "data": request}
            return client.post("/gradio_api/component_server/", json=body).json()

        token = ask("choose", clip=0, context=2)["token"]
        return ask("act", token=token, held=["key.w"], yaw=10.0, pitch=0.0)["step"]


@pytest.mark.slow
def test_it_starts_as_it_is(parts, tmp_path):
    write(parts, tmp_path / "space", evaluation=parts / "report")
    process, address = start(sys.executable, tmp_path / "space", PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    try:
        assert address.startswith("http://127.0.0.1:7999")
        assert play(address)["sure"].startswith("measured error 0.500, 33 %")
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_it_starts_in_a_fresh_environment_with_its_own_requirements(parts, tmp_path):
    """Needs a package index, and minutes: some GB are installed."""
    write(parts, tmp_path / "space", evaluation=parts / "report")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    subprocess.run([python, *install, "-r", tmp_path / "space" / "requirements.txt"], check=True)
    where = subprocess.run(
        [python, "-c", "import vjepa_ac_hf; print(vjepa_ac_hf.__file__)"],
        cwd=tmp_path / "space",
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()) == tmp_path / "space" / "vjepa_ac_hf" / "__init__.py"
    process, address = start(python, tmp_path / "space")
    try:
        assert play(address)["picture"].startswith("data:image/webp")
    finally:
        process.terminate()
        process.wait()


def test_it_arrives_on_the_hub(parts, tmp_path):
    with HubServer() as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
        variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        flags = ["--model", parts / "model", "--dataset", parts / "clips", "--clips", 2, "--output", tmp_path / "space"]
        program = [sys.executable, ROOT / "examples" / "push_space.py", *flags, "--space", "org/page"]
        done = subprocess.run(
            [*map(str, program)], capture_output=True, text=True, env={**os.environ, **variables}, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]
        uploaded = hub.repositories[("space", "org/page")]
    local = {
        str(f.relative_to(tmp_path / "space")): f.read_bytes() for f in (tmp_path / "space").rglob("*") if f.is_file()
    }
    local = {name: content for name, content in local.items() if "__pycache__" not in name}
    assert uploaded == local and len(hub.commits) == 1
    assert done.stdout.strip().endswith(f"(files {len(local)})")
