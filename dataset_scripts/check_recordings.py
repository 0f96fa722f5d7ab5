"""Count what downloaded recordings hold: repairs, rejects and oddities (docs/data.md, "Checking recordings").

    python dataset_scripts/check_recordings.py --shards RECORDINGS [--output DIR] [--num_proc N]

Reads logs as the builder does and the tables of the videos, and prints how many recordings and ticks have each known
fault, what would be rejected and why, what is doubtful, and by recorder version what a pixel of mouse movement does:
whether real recordings are as docs/data.md, "What real recordings are like", has them. With --output the numbers, and
those of every recording, are in DIR/recordings.json. Exit status: 0 when everything was read, whatever it holds.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from vjepa_ac_hf.console import Parser


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--shards", nargs="+", required=True, help="globs of .tar shards, or folders with recordings or shards")
    add("--output", type=Path, help="folder for recordings.json (default: none, numbers are only printed)")
    add("--num_proc", type=int, default=1, help="processes (default: %(default)s)")
    add("--limit", type=int, help="read this many recordings at most, spread evenly over all")
    add("--no_video", action="store_true", help="read logs only")
    arguments = parser.parse_args()
    for name in ("num_proc", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, found {value}")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np
import torch
from tqdm import tqdm

from vjepa_ac_hf.inspection.recordings import describe, inspect_recording, summarize
from vjepa_ac_hf.recordings.shards import Rejection, Shard, find_files, list_shards, read_pairs
from vjepa_ac_hf.records import write_json


def inspect_shard(shard: Shard, with_video: bool) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    found = []
    for pair in read_pairs(shard):
        if isinstance(pair, Rejection):
            known = {"recording": pair.recording, "shard": pair.shard, "recorder_version": None}
            found.append({**known, "reason": pair.reason})
        else:
            found.append(inspect_recording(pair, with_video=with_video))
    return found


def inspect_all(shards: list[Shard], arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    inspect = partial(inspect_shard, with_video=not arguments.no_video)
    if arguments.num_proc == 1:
        yield from map(inspect, shards)
        return
    with ProcessPoolExecutor(arguments.num_proc, mp_context=multiprocessing.get_context("forkserver")) as pool:
        yield from pool.map(inspect, shards)


def check(arguments: argparse.Namespace) -> None:
    nowhere = Path(os.devnull)
    shards = list_shards(find_files(arguments.shards, arguments.output or nowhere))
    rejected = [rejection for shard in shards for rejection in shard.rejected]
    entries = [(shard, entry) for shard in shards for entry in shard.entries]
    if arguments.limit is not None and arguments.limit < len(entries):
        entries = [entries[i] for i in np.linspace(0, len(entries) - 1, arguments.limit).round().astype(int)]
    chosen = {id(entry) for _, entry in entries}
    parts = [Shard(s.name, s.source, [entry for entry in s.entries if id(entry) in chosen]) for s in shards]
    facts: list[dict[str, Any]] = []
    with tqdm(total=len(entries), desc="reading", unit="recording") as bar:
        for found in inspect_all([part for part in parts if part.entries], arguments):
            facts += found
            bar.update(len(found))
    summary = summarize(facts, rejected)
    print(describe(summary))
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output / "recordings.json", {**summary, "recordings": facts})
        print(f"written to {arguments.output / 'recordings.json'}")


def main() -> int:
    check(parse_arguments())
    return 0


if __name__ == "__main__":
    sys.exit(main())
