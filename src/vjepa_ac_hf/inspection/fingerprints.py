"""Digests of what every stage of the demo has made: where two machines part (docs/training.md, "Fingerprints")."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from ..records import tensor_digests, tensors_of, weights_digest, write_json

STEPS = (10, 20, 30)  # losses are named


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _recording(shard: Path) -> Iterator[tuple[str, str]]:
    """Log and video of a shard's first recording."""
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
        stem = members[0].name.rpartition(".")[0]
        for stage, suffix in (("log", "jsonl"), ("video", "mp4")):
            (member,) = (member for member in members if member.name == f"{stem}.{suffix}")
            file = tar.extractfile(member)
            assert file is not None
            yield f"{stage} of the first recording", _short(file.read())


def fingerprints(folder: Path) -> dict[str, str | float]:
    """Of the folder of `examples/demo.py`, in the order of its stages, also written to `fingerprints.json` there.

    Returns:
        First 16 hexadecimal digits of SHA-256, of files' bytes and of weights (`weights_digest`); losses and the
        persistence at horizon 1 as numbers. What is not there is left out.
    """
    found: dict[str, str | float] = {}
    shard = folder / "shards" / "shard-000000.tar"
    if shard.is_file():
        found["shard-000000.tar"] = _short(shard.read_bytes())
        found |= dict(_recording(shard))
    for stage, pattern in (
        ("first Parquet of train", "clips/data/train-00000*.parquet"),
        ("action_stats.json", "clips/action_stats.json"),
        # of the predictor's training; a head's are in train-CLIPS-KEY
        ("first features of train", f"features/train-{12 * '?'}/features-00000.safetensors"),
    ):
        for path in sorted(folder.glob(pattern))[:1]:
            found[stage] = _short(path.read_bytes())
    model = folder / "model"
    if (model / "model.safetensors").is_file():
        digests = tensor_digests(tensors_of(model / "model.safetensors"))
        encoder = {name: digest for name, digest in digests.items() if name.startswith("encoder.")}
        found["weights of the encoder"] = weights_digest(encoder)[:16]
        rows = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
        found |= {f"loss at step {row['step']}": row["loss"] for row in rows if row["step"] in STEPS}
        found["weights of the model"] = weights_digest(digests)[:16]
    if (folder / "report" / "metrics.json").is_file():
        first = json.loads((folder / "report" / "metrics.json").read_text())["horizons"][0]
        found["persistence at horizon 1"] = first["persistence"]
    write_json(folder / "fingerprints.json", found)
    return found
