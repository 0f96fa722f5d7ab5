"""How fast data are read and built: this package's loader, the pipeline that is usually written, and the builder.

    python benchmarks/data.py --work WORK --output data.json

Everything is measured on the same recordings (ViZDoom play at 640x360, five minutes each, made once and kept in WORK)
in one run, one thread a process:

- table, stream: clips a second of this package's loader in one process, in batches ready for the model (decoded;
  pixels, actions and states normalised), from the built data set, with random access and streamed;
- usual: such batches straight from the shards, as `UsualDataset` has it: open members of the tar, parse the log (json
  and pandas), open the mp4 with torchcodec, decode the 16 frames of a random window, resize, crop, normalise;
- usual_lean: the same, but only those lines of the log are parsed that the window needs, which repairs do not allow;
- build: clips a second and process of dataset_scripts/build_vpt_tubelets.py. What it takes to start (interpreters,
  imports, planning, the card) is taken off: the time of the same command on the same recordings cut to one clip each.

Repeats are interleaved, figures are medians, the JSON file has every repeat. Run it on an idle machine.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchcodec.decoders import VideoDecoder
from torchcodec.encoders import VideoEncoder
from tqdm import tqdm

from vjepa_ac_hf import ActionStatistics, VJEPA2ACProcessor
from vjepa_ac_hf.loading.clips import decode_clip, load_action_statistics, load_clips
from vjepa_ac_hf.loading.loader import ClipLoader
from vjepa_ac_hf.recordings.shards import LOG_SUFFIX, VIDEO_SUFFIX, write_tar
from vjepa_ac_hf.records import versions, write_json

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE, FRAMES, STRIDE, TICKS_PER_TUBELET = 8, 16, 4, 8
SPAN = (FRAMES - 1) * STRIDE + 1
KEYS = [str(number) for number in range(1, 10)]
GOALS = {"loader_over_usual": 10.0, "build_speedup": 1.7}


# ---------------------------------------------------------------------------------------------- the usual pipeline


class UsualDataset(Dataset):
    """Random windows of recordings in tar shards, read when they are asked for.

    Args:
        shards: tars with `<name>.mp4` and `<name>.jsonl`.
        statistics: mean and standard deviation of the four continuous action columns.
        resolution: of the frames.
        whole_log: parse the whole log, as repairs and checks need it; False: the lines of the window.
    """

    def __init__(self, shards: list[Path], statistics: ActionStatistics, resolution: int = 256, whole_log: bool = True):
        self.whole_log = whole_log
        self.recordings = []
        for shard in shards:
            with tarfile.open(shard) as archive:
                names = [name for name in archive.getnames() if name.endswith(VIDEO_SUFFIX)]
            self.recordings += [(shard, name.removesuffix(VIDEO_SUFFIX)) for name in names]
        self.resolution = resolution
        self.action_mean, self.action_std = np.array(statistics.mean), np.array(statistics.std)
        self.pixel_mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        self.pixel_std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, index: int, start: int | None = None) -> dict[str, torch.Tensor]:
        shard, name = self.recordings[index]
        with tarfile.open(shard) as archive:
            lines = archive.extractfile(name + LOG_SUFFIX).read().splitlines()
            # The open member, not its bytes: only what is needed is read. "approximate" spares the scan of the whole
            # file that "exact" begins with; these files have a constant rate.
            video = archive.extractfile(name + VIDEO_SUFFIX)
            decoder = VideoDecoder(video, seek_mode="approximate", num_ffmpeg_threads=1)
            if start is None:
                start = random.randrange(min(len(lines), len(decoder)) - SPAN + 1)
            frames = decoder.get_frames_in_range(start, start + SPAN, STRIDE).data
        if self.whole_log:
            log = pd.DataFrame([json.loads(line) for line in lines]).iloc[start : start + SPAN]
        else:
            log = pd.DataFrame([json.loads(line) for line in lines[start : start + SPAN]])
        return {"pixel_values_videos": self.pixels(frames), "actions": self.actions(log), "states": self.states(log)}

    def pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 (16, 3, Y, X) -> float32 (16, 3, resolution, resolution), normalised."""
        height, width = frames.shape[-2:]
        scale = self.resolution / min(height, width)
        size = (int(height * scale), int(width * scale))
        frames = F.interpolate(frames, size=size, mode="bilinear", antialias=True, align_corners=False)
        top, left = ((side - self.resolution) // 2 for side in size)
        frames = frames[..., top : top + self.resolution, left : left + self.resolution]
        return (frames / 255 - self.pixel_mean) / self.pixel_std

    def actions(self, log: pd.DataFrame) -> torch.Tensor:
        """(7, 13): mouse movement summed, view changes, number keys pressed, over every tick of a tubelet."""
        log = log.reset_index(drop=True)
        mouse = pd.json_normalize(log["mouse"].tolist())[["dx", "dy"]]
        keys = log["keyboard"].map(lambda keyboard: set(keyboard["keys"]))
        pressed = pd.DataFrame({key: keys.map(lambda down, key=key: f"key.keyboard.{key}" in down) for key in KEYS})
        steps = FRAMES * STRIDE // TICKS_PER_TUBELET - 1
        ticks, tubelet = slice(0, steps * TICKS_PER_TUBELET), np.arange(len(log)) // TICKS_PER_TUBELET
        moved = mouse[ticks].groupby(tubelet[ticks]).sum().to_numpy()
        turned = np.diff(
            log[["yaw", "pitch"]].to_numpy()[: (steps + 1) * TICKS_PER_TUBELET : TICKS_PER_TUBELET], axis=0
        )
        turned[:, 0] = (turned[:, 0] + 180) % 360 - 180
        continuous = (np.concatenate([moved, turned], axis=1) - self.action_mean) / self.action_std
        binary = pressed[ticks].groupby(tubelet[ticks]).any().to_numpy()
        return torch.from_numpy(np.concatenate([continuous, binary], axis=1).astype(np.float32))

    def states(self, log: pd.DataFrame) -> torch.Tensor:
        """(8, 2): yaw and pitch at the start of every tubelet, scaled to [-1, 1]."""
        view = log[["yaw", "pitch"]].to_numpy()[::TICKS_PER_TUBELET]
        return torch.tensor(np.stack([((view[:, 0] + 180) % 360 - 180) / 180, view[:, 1] / 90], axis=1)).float()


# ---------------------------------------------------------------------------------------------------------- loader


def endless(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader


def clips_per_second(batches: Iterator[dict[str, Any]], seconds: float) -> float:
    """Batches are taken for at least `seconds`, at least one."""
    clips, begin = 0, time.perf_counter()
    while clips == 0 or time.perf_counter() - begin < seconds:
        clips += len(next(batches)["actions"])
    return clips / (time.perf_counter() - begin)


def measure_loaders(shards: list[Path], dataset: Path, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Clips a second of every repeat, by way of loading; the ways take turns."""
    torch.set_num_threads(1)
    random.seed(0)
    statistics_ = load_action_statistics(str(dataset))
    processor = VJEPA2ACProcessor(action_statistics=statistics_.to_dict())
    ways: dict[str, Iterator[dict[str, Any]]] = {}
    for name, streaming in (("table", False), ("stream", True)):
        ways[name] = iter(ClipLoader(load_clips(str(dataset), "train", streaming=streaming), processor, BATCH_SIZE))
    for name, whole_log in (("usual", True), ("usual_lean", False)):
        usual = UsualDataset(shards, statistics_, whole_log=whole_log)
        sampler = torch.utils.data.RandomSampler(usual, replacement=True, num_samples=BATCH_SIZE)
        ways[name] = endless(DataLoader(usual, BATCH_SIZE, sampler=sampler))
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    next(ways["table"]), next(ways["stream"]), usual[0]  # what is opened once is open
    for _ in tqdm(range(repeats), desc="loading", unit="repeat"):
        for name, batches in ways.items():
            speeds[name].append(clips_per_second(batches, seconds))
    return speeds


def stages_ms_per_clip(dataset: Path, repeats: int) -> dict[str, float]:
    """Where the loader's time goes: medians over batches, milliseconds a clip."""
    processor = VJEPA2ACProcessor(action_statistics=load_action_statistics(str(dataset)).to_dict())
    clips = load_clips(str(dataset), "train", streaming=True)
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = work()
        times.setdefault(name, []).append(1000 * (time.perf_counter() - begin) / len(rows))
        return result

    for group in range(min(len(clips.group_sizes), max(repeats, 2))):
        rows = clips.read_group(group)
        timed("read_row_group", lambda group=group: clips.read_group(group))
        timed("open_video", lambda rows=rows: [VideoDecoder(row["video"]["bytes"]) for row in rows])
        frames = timed("open_decode_convert", lambda rows=rows: [decode_clip(r["video"], "", FRAMES) for r in rows])
        batch = timed("stack", lambda frames=frames: processor.prepare_frames(frames))
        timed("normalize_pixels", lambda batch=batch: processor.normalize_pixels(batch))
        timed("actions_states", lambda rows=rows: normalize_log(processor, rows))
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def normalize_log(processor: VJEPA2ACProcessor, rows: list[dict[str, Any]]) -> None:
    processor.normalize_actions(np.array([row["actions"] for row in rows]))
    processor.normalize_states(np.array([row["states"] for row in rows]))


# ----------------------------------------------------------------------------------------------------------- build


def run(program: str, *arguments: object) -> float:
    """Seconds that a program takes; its output is shown where it fails."""
    begin = time.perf_counter()
    command = [sys.executable, str(ROOT / program), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if result.returncode:
        raise RuntimeError(f"{program} failed with status {result.returncode}: {result.stderr[-2000:]}")
    return time.perf_counter() - begin


def build(shards: Path, dataset: Path, processes: int) -> float:
    """Seconds of a build from nothing."""
    shutil.rmtree(dataset, ignore_errors=True)
    return run(
        *("dataset_scripts/build_vpt_tubelets.py", "--shards", shards, "--output", dataset),
        *("--num_proc", processes, "--validation_fraction", 0),
    )


def count_clips(dataset: Path) -> int:
    return json.loads((dataset / "report.json").read_text())["clips"]


def cut_shards(shards: list[Path], folder: Path, ticks: int = SPAN) -> None:
    """The same recordings, their first `ticks` ticks only."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in tqdm(shards, desc="cutting", unit="shard"):
        if (folder / shard.name).is_file():
            continue
        members = []
        with tarfile.open(shard) as archive:
            for info in archive:
                content, file = archive.extractfile(info).read(), folder / Path(info.name).name
                if file.suffix == VIDEO_SUFFIX:
                    decoder = VideoDecoder(content)
                    frames = decoder.get_frames_in_range(0, ticks).data
                    VideoEncoder(frames, frame_rate=decoder.metadata.average_fps).to_file(file)
                else:
                    file.write_bytes(b"".join(content.splitlines(keepends=True)[:ticks]))
                members.append((info.name, file))
        write_tar(folder / shard.name, members)
        for _, file in members:
            file.unlink()


def measure_builds(shards: Path, work: Path, processes: list[int], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of builds of all clips and of one clip a recording, by number of processes; they take turns."""
    cut_shards(sorted(shards.glob("*.tar")), work / "cut")
    results: dict[str, dict[str, Any]] = {str(n): {"seconds": [], "start_seconds": []} for n in processes}
    for _ in tqdm(range(repeats), desc="building", unit="repeat"):
        for n in processes:
            results[str(n)]["start_seconds"].append(build(work / "cut", work / f"start-{n}", n))
            results[str(n)]["seconds"].append(build(shards, work / f"clips-{n}", n))
    for n in processes:
        result = results[str(n)]
        clips = count_clips(work / f"clips-{n}") - count_clips(work / f"start-{n}")
        net = statistics.median(result["seconds"]) - statistics.median(result["start_seconds"])
        result |= {"clips": clips, "clips_per_second": clips / net, "clips_per_second_per_process": clips / net / n}
    return results


# ------------------------------------------------------------------------------------------------------------ main


def machine() -> dict[str, Any]:
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    load = os.getloadavg()[0]
    return {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count(), "load_at_start": load}


def print_table(results: dict[str, Any]) -> None:
    print(f"\n{results['machine']}\n{results['versions']}\n")
    print("| one process, one thread | clips/s | over usual |\n|---|---|---|")
    for name, figure in results["loading"].items():
        print(f"| {name} | {figure['clips_per_second']:.2f} | {figure['over_usual']:.1f} |")
    print("\n| loader, stage | ms a clip |\n|---|---|")
    for name, value in results["stages_ms_per_clip"].items():
        print(f"| {name} | {value:.2f} |")
    print("\n| build, processes | clips/s | clips/s a process | speed-up |\n|---|---|---|---|")
    for n, figure in results["build"].items():
        print(
            f"| {n} | {figure['clips_per_second']:.2f} | {figure['clips_per_second_per_process']:.2f} | "
            f"{figure['speed_up']:.2f} |"
        )
    print(f"\ngoals: {GOALS}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for recordings (kept) and builds")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--shards", type=Path, help="folder of shards to use instead of recording some")
    parser.add_argument("--recordings", type=int, default=2, help="one a shard (default: %(default)s)")
    parser.add_argument("--ticks", type=int, default=6000, help="of a recording (default: %(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of builds (default: 1 2)")
    parser.add_argument("--repeats", type=int, default=3, help="of loading (default: %(default)s)")
    parser.add_argument("--build_repeats", type=int, default=1, help="of building (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of loading a repeat (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="one short repeat of everything: does it still run?")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.processes, arguments.repeats, arguments.build_repeats, arguments.seconds = [1], 1, 1, 0.0
        arguments.recordings, arguments.ticks = 1, 200
    return arguments


def main() -> None:
    arguments = parse_arguments()
    results: dict[str, Any] = {
        "machine": machine(),
        "versions": versions() | {"pandas": pd.__version__},
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
    }
    work, shards = arguments.work, arguments.shards
    if shards is None:
        shards = work / f"shards-{arguments.recordings}x{arguments.ticks}"
        values = {
            "recordings": arguments.recordings,
            "ticks": arguments.ticks,
            "recordings_per_shard": 1,
            "num_proc": 2,
        }
        flags = [part for name, value in values.items() for part in (f"--{name}", value)]
        print("recording, unless it was done before ...")
        run("dataset_scripts/record_vizdoom.py", "--output", shards, "--resolution", "640x360", *flags)
    files = sorted(shards.glob("*.tar"))
    results["shards"] = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    results["build"] = measure_builds(shards, work, arguments.processes, arguments.build_repeats)
    dataset = work / f"clips-{arguments.processes[0]}"
    speeds = measure_loaders(files, dataset, arguments.repeats, arguments.seconds)
    results["stages_ms_per_clip"] = stages_ms_per_clip(dataset, arguments.repeats)

    medians = {name: statistics.median(values) for name, values in speeds.items()}
    results["loading"] = {
        name: {"clips_per_second": m, "over_usual": m / medians["usual"], "repeats": speeds[name]}
        for name, m in medians.items()
    }
    first = results["build"][str(arguments.processes[0])]["clips_per_second"]
    for figure in results["build"].values():
        figure["speed_up"] = figure["clips_per_second"] / first
    results["goals"] = GOALS
    write_json(arguments.output, results)
    print_table(results)


if __name__ == "__main__":
    main()
