"""How long programs take to answer, and what importing the package costs, against importing torch and transformers.

    python benchmarks/startup.py --output startup.json [--repeats 7]

Each repeat starts every command once, one after another, so that a machine that is busy for a while is so for all.
Reported are medians of seconds and, of each repeat's own ratio to `import torch, transformers`, the median.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from vjepa_ac_hf.programs.command import PROGRAMS
from vjepa_ac_hf.records import versions, write_json

REFERENCE = "import torch, transformers"
COMMAND = "import sys; from vjepa_ac_hf.programs.command import main; main()"
# What users wait for in the end, whatever is imported when.
IMPORTS = {
    "import nothing": "",
    "import vjepa_ac_hf": "import vjepa_ac_hf",
    "transformers, then vjepa_ac_hf": "import torch, transformers, vjepa_ac_hf",
    "datasets": "import torch, transformers, datasets",
    "datasets, with vjepa_ac_hf": "import torch, transformers, vjepa_ac_hf, datasets",
    "Auto classes and V-JEPA 2": "from transformers import AutoModel, AutoProcessor, VJEPA2Model",
    "the same, with vjepa_ac_hf": "import vjepa_ac_hf; from transformers import AutoModel, AutoProcessor, VJEPA2Model",
}


def commands() -> dict[str, tuple[list[str], int]]:
    """Arguments of Python and the exit status expected, by name."""
    found = {REFERENCE: (["-c", REFERENCE], 0)}
    found |= {name: (["-c", code], 0) for name, code in IMPORTS.items()}
    found["vjepa-ac --help"] = (["-c", COMMAND, "--help"], 0)
    for name in PROGRAMS:
        found[f"vjepa-ac {name} --help"] = (["-c", COMMAND, name, "--help"], 0)
        found[f"vjepa-ac {name} --no_such_flag"] = (["-c", COMMAND, name, "--no_such_flag"], 2)
    return found


def seconds(arguments: list[str], status: int) -> float:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    taken = time.perf_counter() - started
    if done.returncode != status:
        raise SystemExit(f"{arguments}: exit status {done.returncode}, expected {status}: {done.stderr[-500:]}")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, found {arguments.repeats}")
    runs: dict[str, list[float]] = {name: [] for name in commands()}
    for repeat in range(-1, arguments.repeats):  # the first fills the system's caches and does not count
        for name, (flags, status) in commands().items():
            taken = seconds(flags, status)
            if repeat >= 0:
                runs[name].append(taken)
    figures = {
        name: {
            "median_s": statistics.median(times),
            "ratio": statistics.median(t / r for t, r in zip(times, runs[REFERENCE], strict=True)),
        }
        for name, times in runs.items()
    }
    for name, row in figures.items():
        print(f"{row['median_s']:7.3f} s  {row['ratio']:6.3f}  {name}")
    if arguments.output:
        write_json(arguments.output, {"repeats": arguments.repeats, "figures": figures, "versions": versions()})
        print(json.dumps({"written": str(arguments.output)}))


if __name__ == "__main__":
    main()
