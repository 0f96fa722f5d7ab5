"""A Space of the Hub with the page to play in (docs/explore.md, "A Space"): its folder written, and pushed.

The folder runs as it is: `pip install -r requirements.txt`, `python app.py`. It has a copy of this package beside its
app, since a Space installs its requirements before it has its own files.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from huggingface_hub import HfApi

from ..evaluation.clips import spread
from ..hub.cards import public_evaluation, public_name
from ..hub.upload import is_model_file, use_time_outs
from ..loading.clips import load_clips
from ..records import write_file, write_json

GRADIO = "6.31.0"  # what the Space's own installation takes
# Of this package and its extra `app` (pyproject.toml); an index of PyTorch's builds that need no GPU goes first.
REQUIREMENTS = (
    "accelerate>=1.15",
    "datasets>=5.2",
    "evaluate>=0.4.6",
    "gradio>=6.31,<7",
    "httpx2>=2.0",
    "huggingface-hub>=2.4",
    "msgspec>=0.19",
    "numpy>=2.0",
    "pillow>=11",
    "pyarrow>=20",
    "pyyaml>=6",
    "safetensors>=0.6",
    "torch>=2.11",
    "torchcodec>=0.11",
    "torchmetrics>=1.6",
    "tqdm>=4.66",
    "transformers>=5.23",
)
APP = '''"""A page to play in what a world model imagines. On a Space for all, elsewhere for this machine alone."""

import os
from pathlib import Path

from vjepa_ac_hf.app.explorer import Limits
from vjepa_ac_hf.app.load import load_explorer
from vjepa_ac_hf.app.page import launch

os.chdir(Path(__file__).resolve().parent)
SETTINGS = {settings}


def main() -> None:
    explorer = load_explorer(**SETTINGS, limits=Limits(sessions=16, upload_bytes=50 * 2**20))
    host = os.environ.get("GRADIO_SERVER_NAME") or ("0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1")
    port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    _, address, page = launch(explorer, host=host, port=port, title={title})
    print(f"page: {{address}}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
'''
CARD = """---
title: {title}
emoji: 🎮
colorFrom: blue
colorTo: green
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
license: apache-2.0
short_description: Play in what a world model imagines
{links}---

# {heading}

Choose a clip, act by keys and mouse, and see what an action-conditioned V-JEPA 2 world model imagines of it: `vjepa-ac
explore` of vjepa-ac-hf, on a free CPU. What is shown is imagined, and drawn by a decoder from features.

Made by:

    {command}

{clips}
"""


def write_space(
    folder: Path,
    *,
    title: str,
    model: str,
    dataset: str,
    decoder: str | None = None,
    evaluation: Path | None = None,
    split: str = "validation",
    clips: int = 24,
    command: str = "",
) -> list[str]:
    """Write a Space's folder.

    Args:
        folder: made where there is none; must be empty otherwise.
        title: of the Space.
        model: a Hub repository, which the Space loads; or a folder, which is copied in.
        dataset: folder or repository, from which some clips are copied in.
        decoder: as `model`; None: none.
        evaluation: folder with `metrics.json`, copied in; None: the model's own figures, where it has some.
        split: whose clips.
        clips: how many, evenly spaced.
        command: that made it, for the card, which has of absolute paths the last part.

    Returns:
        The files, relative to the folder.

    Raises:
        ValueError: a folder that holds something, or a model's folder without weights.
        FileNotFoundError: no `metrics.json` in `evaluation`.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"dataset": "clips", "split": split, "clips": clips, "device": "cpu"}
    links: dict[str, list[str]] = {}
    for kind, name in (("model", model), ("decoder", decoder)):
        if name is None:
            continue
        settings[kind] = kind if Path(name).is_dir() else name
        if Path(name).is_dir():
            copy_model(Path(name), folder / kind)
        else:
            links.setdefault("models", []).append(name)
    if evaluation is not None:
        (folder / "evaluation").mkdir()
        figures = public_evaluation(json.loads((evaluation / "metrics.json").read_text()), public_name(model))
        write_json(folder / "evaluation" / "metrics.json", figures)
        settings["evaluation"] = "evaluation"
    copy_clips(dataset, split, clips, folder / "clips")
    if not Path(dataset).is_dir():
        links["datasets"] = [dataset]
    package = Path(__file__).resolve().parents[1]
    shutil.copytree(
        package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", "programs", "data", "*.pyc")
    )
    shown = repr(settings).replace("'evaluation': 'evaluation'", "'evaluation': Path('evaluation')")
    write_file(folder / "app.py", APP.format(settings=shown, title=repr(title)).encode())
    listed = "".join(f"{kind}:\n" + "".join(f"  - {name}\n" for name in names) for kind, names in links.items())
    origin = f"Its clips are {clips} at most of the split `{split}` of `{Path(dataset).name}`"
    source = f"{origin}; their licence is that data set's."
    card = CARD.format(
        title=json.dumps(title, ensure_ascii=False),
        heading=title,
        gradio=GRADIO,
        links=listed,
        command=" ".join(public_name(word) if Path(word).is_absolute() else word for word in command.split(" ")),
        clips=source,
    )
    write_file(folder / "README.md", card.encode())
    index = "--extra-index-url https://download.pytorch.org/whl/cpu\n"
    write_file(folder / "requirements.txt", (index + "\n".join(REQUIREMENTS) + "\n").encode())
    write_file(folder / "packages.txt", b"ffmpeg\n")  # shared libraries, for torchcodec
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def copy_model(source: Path, target: Path) -> None:
    """The files of a model that its repository would have, and nothing else of a run.

    Raises:
        ValueError: there are no weights.
    """
    names = [str(file.relative_to(source)) for file in sorted(source.rglob("*")) if file.is_file()]
    wanted = [name for name in names if is_model_file(name)]
    if not any(name.endswith(".safetensors") for name in wanted):
        raise ValueError(f"{source}: no model.safetensors: a folder of train.py or train_head.py is needed")
    for name in wanted:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def copy_clips(dataset: str, split: str, count: int, target: Path) -> None:
    """Some clips of a data set as a data set of its own, with how it was built."""
    clips = load_clips(dataset, split, streaming=True)
    rows = list(clips.select(spread(len(clips), count)))
    columns = {
        name: [np.asarray(r[name]) if name in ("actions", "states") else r[name] for r in rows] for name in rows[0]
    }
    (target / "data").mkdir(parents=True)
    Dataset.from_dict(columns, features=clips.features).to_parquet(target / "data" / f"{split}-00000-of-00001.parquet")
    for name in ("report.json", "README.md", "action_stats.json"):
        if (Path(dataset) / name).is_file():
            shutil.copyfile(Path(dataset) / name, target / name)


def push_space(folder: Path, repo_id: str, *, private: bool = False, timeout: float = 60.0) -> str:
    """Make the Space where there is none, and bring the folder's files there in one commit. Returns its address.

    Raises:
        OSError: the Hub refuses, or does not answer.
    """
    use_time_outs(timeout)
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id,
        repo_type="space",
        folder_path=folder,
        commit_message="A page to play in",
        ignore_patterns=["**/__pycache__/**"],
    )
    return str(url)
