"""Pack recordings (`<name>.mp4` + `<name>.jsonl`) of a folder into tar shards (docs/data.md, "Shards").

    python dataset_scripts/pack_shards.py --input RECORDINGS --output SHARDS [--recordings_per_shard 32]

Pairs lie beside each other, sorted by path below the input, so that a recorder version's folder stays in the names.
The same files give the same shards; finished ones are not written again. What has no partner is reported in
SHARDS/pack_report.json. Exit status 0 only if all shards are written.
"""

import argparse
import sys
import tarfile
from pathlib import Path

from vjepa_ac_hf.console import Parser


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="folder with recordings, searched recursively")
    parser.add_argument("--output", type=Path, required=True, help="folder for shard-000000.tar, ...")
    parser.add_argument("--recordings_per_shard", type=int, default=32, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.recordings_per_shard < 1:
        parser.error(f"--recordings_per_shard must be at least 1, found {arguments.recordings_per_shard}")
    if not arguments.input.is_dir():
        parser.error(f"--input: no such folder: {arguments.input}")
    return arguments


if __name__ == "__main__":
    parse_arguments()  # --help and mistakes are answered before the imports below, which take seconds

from tqdm import tqdm

from vjepa_ac_hf.recordings.shards import LOG_SUFFIX, MISSING, VIDEO_SUFFIX, is_recording_file, write_tar
from vjepa_ac_hf.records import write_json


def find_recordings(folder: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Stems (relative to the folder) that have both files, and what lacks its partner."""
    suffixes: dict[str, set[str]] = {}
    for file in folder.rglob("*"):
        if file.is_file() and is_recording_file(file.name):
            suffixes.setdefault(file.relative_to(folder).with_suffix("").as_posix(), set()).add(file.suffix)
    paired = sorted(stem for stem, found in suffixes.items() if len(found) == 2)
    unpaired = [
        {"recording": stem, "reason": MISSING[({VIDEO_SUFFIX, LOG_SUFFIX} - found).pop()]}
        for stem, found in sorted(suffixes.items())
        if len(found) == 1
    ]
    return paired, unpaired


def is_current(shard: Path, members: list[tuple[str, Path]]) -> bool:
    """Whether a shard already holds these members, by name and size, and is newer than all of them."""
    if not shard.exists() or any(file.stat().st_mtime > shard.stat().st_mtime for _, file in members):
        return False
    try:
        with tarfile.open(shard) as archive:
            return [(info.name, info.size) for info in archive] == [
                (name, file.stat().st_size) for name, file in members
            ]
    except tarfile.TarError:
        return False


def main() -> int:
    arguments = parse_arguments()
    paired, unpaired = find_recordings(arguments.input)
    if not paired:
        raise ValueError(
            f"--input {arguments.input}: no pair of .mp4 and .jsonl below it, {len(unpaired)} unpaired files"
        )
    groups = [
        paired[start : start + arguments.recordings_per_shard]
        for start in range(0, len(paired), arguments.recordings_per_shard)
    ]
    shards = [arguments.output / f"shard-{index:06d}.tar" for index in range(len(groups))]
    arguments.output.mkdir(parents=True, exist_ok=True)
    # Shards of an earlier, other packing would double recordings.
    foreign = sorted(set(arguments.output.glob("shard-*.tar")) - set(shards))
    if foreign:
        raise ValueError(f"{arguments.output} has shards that this run does not write: {foreign[0]}; remove them")

    num_written = 0
    for shard, stems in zip(tqdm(shards, desc="shards", unit="shard"), groups, strict=True):
        names = [stem + suffix for stem in stems for suffix in (VIDEO_SUFFIX, LOG_SUFFIX)]
        members = [(name, arguments.input / name) for name in names]
        if not is_current(shard, members):
            write_tar(shard, members)
            num_written += 1

    report = {"recordings": len(paired), "shards": len(shards), "unpaired": unpaired}
    write_json(arguments.output / "pack_report.json", report)
    counts = f"{len(paired)} recordings in {len(shards)} shards, {num_written} written, {len(unpaired)} files unpaired"
    print(f"{counts}; {arguments.output}")
    for entry in unpaired:
        print(f"  unpaired: {entry['recording']}: {entry['reason']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
