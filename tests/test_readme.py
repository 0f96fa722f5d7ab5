"""The snippets of the README and of docs/tour.md run as they stand, and what the README says about files is true."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from helpers_clips import write_clips
from test_modeling import tiny_model

from vjepa_ac_hf import (
    VJEPA2ACForActionAnticipation,
    VJEPA2ACForInverseDynamics,
    VJEPA2ACForVideoClassification,
    VJEPA2ACProcessor,
)
from vjepa_ac_hf.recordings.shards import write_tar

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def snippets_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def save_heads(folder: Path, statistics: dict) -> None:
    world, space = tiny_model(), {"action_space": ["mouse_dx", "yaw_delta", "key.w"], "action_statistics": statistics}
    small = {"head_hidden_size": 16, "head_num_hidden_layers": 1, "head_num_attention_heads": 2}
    processor = VJEPA2ACProcessor(resolution=32, **space)
    for name, head in (
        ("idm", VJEPA2ACForInverseDynamics.from_world_model(world, **space, **small)),
        (
            "anticipation",
            VJEPA2ACForActionAnticipation.from_world_model(world, **space, **small, use_past_actions=True),
        ),
        (
            "classifier",
            VJEPA2ACForVideoClassification.from_world_model(world, **small, id2label={0: "cave", 1: "forest"}),
        ),
    ):
        head.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


def test_snippets_run(tmp_path, monkeypatch, caplog, capsys):
    recording = sorted((ROOT / "tests" / "data").glob("*.mp4")) + sorted((ROOT / "tests" / "data").glob("*.jsonl"))
    (tmp_path / "demo" / "shards").mkdir(parents=True)
    write_tar(tmp_path / "demo" / "shards" / "shard-000000.tar", [(path.name, path) for path in recording])
    write_clips(tmp_path / "demo" / "clips", train=3, validation=2)
    statistics = json.loads((tmp_path / "demo" / "clips" / "action_stats.json").read_text())
    tiny_model().save_pretrained(tmp_path / "demo" / "model")
    VJEPA2ACProcessor(resolution=32, action_statistics=statistics).save_pretrained(tmp_path / "demo" / "model")
    save_heads(tmp_path / "demo", statistics)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    names: dict = {}
    assert len(snippets_of("README.md")) == 3
    for snippet in snippets_of("README.md"):  # the last one goes on from the second
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["future"].shape == (1, 6, 4, 48) and names["imagined"].shape == (2, 6, 4, 48)
    # The clips that turn most come first, and of them the turns alone are mirrored, after the context.
    first = [abs(c["actions"][1][2]) for c in names["turning"]]
    assert first == sorted(first, reverse=True) and min(first) > 1
    taken, mirrored = np.array(names["taken"]), names["mirrored"]
    assert np.argwhere((taken != mirrored).any(axis=(0, 1))).ravel().tolist() == [0, 2]
    np.testing.assert_array_equal(mirrored[:, 1:, 2], -taken[:, 1:, 2])
    np.testing.assert_array_equal(mirrored[:, 0], taken[:, 0])
    told = dict(re.findall(r"turns as (\w+) error one step ahead ([\d.]+)", capsys.readouterr().out))
    assert set(told) == {"taken", "mirrored"} and told["taken"] != told["mirrored"]
    assert not [record for record in caplog.records if "split" in record.getMessage()]  # nobody has asked for one
    names = {}
    tour = snippets_of("docs/tour.md")
    assert len(tour) == 7
    for module in ("vizdoom", "stable_baselines3"):
        if find_spec(module) is None:
            tour = [s for s in tour if "envs" not in s]
    for snippet in tour:  # each goes on from those before
        exec(compile(snippet, "docs/tour.md", "exec"), names)
    assert names["told"]["yaw_delta"].shape == (1, 7) and names["ahead"].binary_logits.shape[:3] == (1, 8, 2)
    assert names["found"].actions.shape == (2, 38) and len(names["found"].to_minerl()) == 16
    assert not any(tick["drop"] for tick in names["found"].to_minerl())


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 250
    assert README.index("make demo") < README.index("```python") < README.index("## What can be done")


def test_files_that_are_named_exist():
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link.partition("#")[0]).exists(), link
    for program in re.findall(r"(?:examples|dataset_scripts)/\w+\.py", README):
        assert (ROOT / program).exists(), program
