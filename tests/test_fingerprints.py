"""Digests of the demo's stages, against hashlib and the files themselves."""

import hashlib
import io
import json
import tarfile

import torch
from safetensors.torch import save_file

from vjepa_ac_hf.inspection.fingerprints import fingerprints


def short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def make_demo(folder, log=b"{}\n", weight=1.0):
    files = {"clips/action_stats.json": b"{}", "clips/data/train-00000-of-00002.parquet": b"PAR0"}
    files |= {"clips/data/train-00001-of-00002.parquet": b"PAR1"}
    features = {"train-bb6e369bca96": b"f", "train-7-bb6e369bca96": b"head's", "validation-5-bb6e369bca96": b"v"}
    files |= {f"features/{name}/features-00000.safetensors": content for name, content in features.items()}
    rows = [{"step": step, "loss": step / 8} for step in (10, 15, 20, 30, 40)]
    files["model/metrics.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files["report/metrics.json"] = json.dumps({"horizons": [{"persistence": 0.25}, {"persistence": 0.5}]}).encode()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    save_file({"encoder.w": torch.ones(2), "predictor.w": torch.full((3,), weight)}, folder / "model/model.safetensors")
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "shard-000000.tar", "w") as tar:
        for name, content in (("b.mp4", b"video"), ("b.jsonl", log), ("a.mp4", b"other"), ("a.jsonl", b"other")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


def test_every_stage_has_its_digest_in_order(tmp_path):
    found = fingerprints(make_demo(tmp_path))
    values = torch.ones(2).numpy().tobytes()
    tensor = hashlib.sha256(b"torch.float32 (2,) " + values).hexdigest()
    assert found.pop("weights of the model") != found["weights of the encoder"]
    assert found == {
        "shard-000000.tar": short((tmp_path / "shards" / "shard-000000.tar").read_bytes()),
        "log of the first recording": short(b"{}\n"),
        "video of the first recording": short(b"video"),
        "first Parquet of train": short(b"PAR0"),
        "action_stats.json": short(b"{}"),
        "first features of train": short(b"f"),
        "weights of the encoder": short(f"encoder.w {tensor}\n".encode()),
        "loss at step 10": 1.25,
        "loss at step 20": 2.5,
        "loss at step 30": 3.75,
        "persistence at horizon 1": 0.25,
    }
    written = json.loads((tmp_path / "fingerprints.json").read_text())
    names = list(written)
    assert (names[0], names[-1]) == ("shard-000000.tar", "persistence at horizon 1")


def test_they_part_where_the_stages_part(tmp_path):
    folders = [tmp_path / name for name in ("one", "log", "weights")]
    one, log, weights = (
        fingerprints(make_demo(folder, **different))
        for folder, different in zip(folders, ({}, {"log": b"[]\n"}, {"weight": 2.0}), strict=True)
    )
    assert {name for name in one if one[name] != log[name]} == {"shard-000000.tar", "log of the first recording"}
    assert {name for name in one if one[name] != weights[name]} == {"weights of the model"}


def test_what_is_not_there_is_left_out(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "action_stats.json").write_bytes(b"{}")
    assert fingerprints(tmp_path) == {"action_stats.json": short(b"{}")}
