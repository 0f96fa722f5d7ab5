"""Check from the pictures alone that log and video of VPT recordings are in step (docs/data.md, "Alignment check").

    python dataset_scripts/check_alignment.py --shards "SHARDS/*.tar" --output DIR [--num_proc N]

When the view turns, the picture moves sideways. For every recording, the shift between frames is compared with the yaw
changes of the log over lags: `lag: 3` says that the video shows things 3 frames after their log lines. Writes

- DIR/alignment.json: verdict and numbers of every recording, and the counts of verdicts;
- DIR/flagged.txt: recordings to leave out (shifted, drifting, mirrored), one id a line; DIR/undecided.txt: those of
  which nothing can be said;
- DIR/alignment.html, with DIR/alignment.png: correlation over lags of flagged recordings (extra "report").

A run that was stopped goes on where it was (DIR/progress.ndjson). Exit status: 0 when all recordings have a verdict,
whatever it is; with --fail_on_flagged, 2 when any is flagged; 1 when the work could not be done.
"""

import argparse
import base64
import hashlib
import html
import importlib.util
import io
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from vjepa_ac_hf.console import Parser

# ---------------------------------------------------------------------------------------------------- arguments


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--shards", nargs="+", required=True, help="globs of .tar shards, or folders with recordings or shards")
    add("--output", type=Path, required=True, help="folder of the results")
    add("--num_proc", type=int, default=1, help="processes (default: %(default)s)")
    add("--limit", type=int, help="check this many recordings at most, spread evenly over all")
    add("--max_lag", type=int, default=10, help="largest lag tried, ticks (default: %(default)s)")
    add("--max_ticks", type=int, default=1600, help="frames read per recording (default: %(default)s)")
    add("--num_windows", type=int, default=4, help="in so many windows (default: %(default)s)")
    add("--flag_over", type=int, default=0, help="largest lag in step, ticks (default: %(default)s)")
    add("--fail_on_flagged", action="store_true", help="exit status 2 when any recording is flagged")
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

from vjepa_ac_hf.recordings import alignment
from vjepa_ac_hf.recordings.alignment import (
    FLAGGED_VERDICTS,
    VERDICTS,
    AlignmentOptions,
    AlignmentResult,
    check_recording,
)
from vjepa_ac_hf.recordings.shards import (
    TAR_SUFFIXES,
    RecordingEntry,
    Rejection,
    Shard,
    find_files,
    list_shards,
    read_pairs,
)
from vjepa_ac_hf.records import write_file, write_json

# What a process is given at once. A compressed tar is given whole: every opening reads it from the start.
_RECORDINGS_PER_TASK = 4
_MOST_CURVES = 48


# ---------------------------------------------------------------------------------------------------- checking


def result_key(entry: RecordingEntry, options: AlignmentOptions, code: str) -> str:
    """Changes with everything a result depends on: code, options, place of the files, their sizes and times."""
    stats = [os.stat(member.path) for member in (entry.video, entry.log)]
    files = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    content = [code, asdict(options), asdict(entry), files]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def read_finished(path: Path) -> dict[str, dict]:
    """Results by key of the runs before; a line cut off when a run was stopped does not count."""
    finished: dict[str, dict] = {}
    if not path.exists():
        return finished
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            record = json.loads(line)
            finished[record["key"]] = record["result"]
            kept.append(line)
    write_file(path, "".join(kept).encode())
    return finished


def spread(shards: list[Shard], limit: int | None) -> list[Shard]:
    """The shards with `limit` of their recordings at most, evenly spread over all."""
    total = sum(len(shard.entries) for shard in shards)
    if limit is None or limit >= total:
        return shards
    chosen = set(np.linspace(0, total - 1, limit).round().astype(int).tolist())
    number = iter(range(total))
    return [replace(shard, entries=[entry for entry in shard.entries if next(number) in chosen]) for shard in shards]


def plan_tasks(shards: list[Shard]) -> list[Shard]:
    """Parts of shards, a few recordings each."""
    tasks = []
    for shard in shards:
        size = _RECORDINGS_PER_TASK if not shard.source.endswith(TAR_SUFFIXES[1:]) else max(len(shard.entries), 1)
        for start in range(0, len(shard.entries), size):
            tasks.append(replace(shard, entries=shard.entries[start : start + size], rejected=[]))
    return tasks


def check_shard(shard: Shard, options: AlignmentOptions) -> Iterator[AlignmentResult]:
    for pair in read_pairs(shard):
        if isinstance(pair, Rejection):
            yield AlignmentResult(pair.recording, pair.shard, None, "rejected", pair.reason)
        else:
            yield check_recording(pair, options)


def check_task(shard: Shard, options: AlignmentOptions) -> list[AlignmentResult]:
    return list(check_shard(shard, options))


def run_tasks(tasks: list[Shard], options: AlignmentOptions, num_proc: int) -> Iterator[AlignmentResult]:
    """Results as recordings are finished, in this process or in several."""
    if min(num_proc, len(tasks)) < 2:
        for task in tasks:
            yield from check_shard(task, options)
        return
    # Not fork: torch's threads do not survive it. One thread each: there is a process for every core asked for.
    executor = ProcessPoolExecutor(
        min(num_proc, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    try:
        for future in as_completed([executor.submit(check_task, task, options) for task in tasks]):
            yield from future.result()
    finally:
        # After an error or an interrupt: what has not begun need not.
        executor.shutdown(cancel_futures=True)


def check_all(shards: list[Shard], options: AlignmentOptions, output: Path, num_proc: int) -> tuple[list[dict], int]:
    """Results of all recordings in the order of the shards, and how many were there before."""
    journal = output / "progress.ndjson"
    before = read_finished(journal)
    entries = [entry for shard in shards for entry in shard.entries]
    code = Path(alignment.__file__).read_text()
    keys = {entry.recording_id: result_key(entry, options, code) for entry in entries}
    results = {name: before[key] for name, key in keys.items() if key in before}
    num_before = len(results)
    waiting = [
        replace(shard, entries=[entry for entry in shard.entries if entry.recording_id not in results])
        for shard in shards
    ]
    with (
        journal.open("a") as file,
        tqdm(total=len(entries), initial=num_before, desc="recordings", unit="recording") as progress,
    ):
        for result in run_tasks(plan_tasks(waiting), options, num_proc):
            assert result.recording is not None
            results[result.recording] = result.to_dict()
            record = {"key": keys[result.recording], "result": result.to_dict()}
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            progress.update()
            progress.set_postfix(Counter(found["verdict"] for found in results.values()))
    return [results[entry.recording_id] for entry in entries], num_before


# ---------------------------------------------------------------------------------------------------- results


def write_results(output: Path, results: list[dict], options: AlignmentOptions, limit: int | None) -> dict[str, int]:
    """alignment.json, flagged.txt and undecided.txt; returns the number of recordings of each verdict."""
    counts = Counter(result["verdict"] for result in results)
    verdicts = {verdict: counts[verdict] for verdict in VERDICTS}
    for name, listed in (("flagged", FLAGGED_VERDICTS), ("undecided", ("undecided",))):
        ids = [result["recording"] for result in results if result["verdict"] in listed]
        write_file(output / f"{name}.txt", "".join(f"{recording}\n" for recording in ids).encode())
    flagged = sum(verdicts[verdict] for verdict in FLAGGED_VERDICTS)
    values = {"verdicts": verdicts, "flagged": flagged, "options": {**asdict(options), "limit": limit}}
    write_json(output / "alignment.json", {**values, "recordings": results})
    return verdicts


def summary_table(results: list[dict]) -> str:
    """Verdicts by recorder version, and the medians of what was measured."""
    versions = sorted({result["recorder_version"] or "-" for result in results})
    lines = [f"{'recorder':<10}" + "".join(f"{verdict:>11}" for verdict in VERDICTS) + "   recordings by lag"]
    for version in versions:
        of_version = [result for result in results if (result["recorder_version"] or "-") == version]
        counts = Counter(result["verdict"] for result in of_version)
        lags = Counter(result["lag"] for result in of_version if result.get("lag") is not None)
        shown = ", ".join(f"{lag}: {count}" for lag, count in sorted(lags.items()))
        lines.append(f"{version:<10}" + "".join(f"{counts[verdict]:>11}" for verdict in VERDICTS) + f"   {shown}")
    slopes = [result["degrees_per_width"] for result in results if result.get("lag") is not None]
    if slopes:
        low, middle, high = np.percentile(slopes, [5, 50, 95])
        lines.append(f"degrees of yaw per picture width: median {middle:.0f}, 5 to 95 %: {low:.0f} to {high:.0f}")
    seconds = [result["seconds"] for result in results if result["seconds"]]
    if seconds:
        lines.append(f"seconds per recording and process: {np.mean(seconds):.2f} on average")
    return "\n".join(lines)


def curves_png(results: list[dict], max_lag: int) -> bytes:
    """Correlation over lags, a panel per recording; whole recording in black, windows with enough pairs in colour."""
    from vjepa_ac_hf.pages import new_figure

    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure = new_figure(3.4 * columns + 0.4, 2.5 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    lags = range(-max_lag, max_lag + 1)
    for axes, result in zip(panels, results, strict=False):
        for window in result["windows"]:
            if window["pairs"] >= alignment.MIN_PAIRS:
                draw_curve(axes, lags, window["correlations"], linewidth=1, alpha=0.6)
        draw_curve(axes, lags, result["correlations"], color="black", linewidth=1.6)
        axes.axvline(0, color="grey", linewidth=0.6)
        axes.set_title(f"{result['recording'][-34:]}\n{result['verdict']}, best lag {result['best_lag']}", fontsize=7)
        axes.grid(alpha=0.25)
    for axes in list(figure.axes)[len(results) :]:
        axes.set_visible(False)
    figure.supxlabel("lag (ticks): the video is late by", fontsize=9)
    figure.supylabel("correlation of shift and yaw change", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw_curve(axes: Any, lags: range, correlations: list[float | None], **style: Any) -> None:
    if correlations:
        axes.plot(lags, [np.nan if value is None else value for value in correlations], **style)


def write_report(output: Path, results: list[dict], options: AlignmentOptions, table: str) -> None:
    """alignment.html and alignment.png: every flagged or undecided recording, curves of the first of them."""
    shown = [result for result in results if result["verdict"] in FLAGGED_VERDICTS]
    shown += [result for result in results if result["verdict"] == "undecided"]
    curves = shown[:_MOST_CURVES]
    picture = "<p>No recording is flagged or undecided.</p>"
    if curves:
        png = curves_png(curves, options.max_lag)
        write_file(output / "alignment.png", png)
        data = base64.b64encode(png).decode()
        picture = (
            f"<p>Correlation over lags, {len(curves)} of {len(shown)} recordings: black the whole, colours its windows."
            f'</p><img src="data:image/png;base64,{data}" alt="correlation over lags">'
        )
    else:
        (output / "alignment.png").unlink(missing_ok=True)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(result[name]))}</td>" for name in ("recording", "verdict", "reason"))
        for result in results
        if result["verdict"] != "aligned"
    )
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Alignment check</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
td, th {{ border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; }}
img {{ max-width: 100%; }}</style>
<h1>Alignment of log and video</h1><pre>{html.escape(table)}</pre>{picture}
<h2>Recordings that are not aligned</h2>
<table><tr><th>recording</th><th>verdict</th><th>reason</th></tr>{rows}</table></html>
"""
    write_file(output / "alignment.html", page.encode())


# ---------------------------------------------------------------------------------------------------- main


def run(arguments: argparse.Namespace) -> int:
    options = AlignmentOptions(**{option.name: getattr(arguments, option.name) for option in fields(AlignmentOptions)})
    shards = list_shards(find_files(arguments.shards, arguments.output))
    refused = [
        AlignmentResult(rejection.recording, rejection.shard, None, "rejected", rejection.reason).to_dict()
        for shard in shards
        for rejection in shard.rejected
    ]
    chosen = spread(shards, arguments.limit)
    if not any(shard.entries for shard in chosen):
        raise ValueError(f"--shards {' '.join(arguments.shards)}: no recording to check, {len(refused)} rejected")
    arguments.output.mkdir(parents=True, exist_ok=True)
    results, num_before = check_all(chosen, options, arguments.output, arguments.num_proc)
    verdicts = write_results(arguments.output, results + refused, options, arguments.limit)
    table = summary_table(results + refused)
    if importlib.util.find_spec("matplotlib") is None:
        print("no alignment.html: it needs matplotlib (pip install 'vjepa-ac-hf[report]')", file=sys.stderr)
    else:
        write_report(arguments.output, results, options, table)
    flagged = sum(verdicts[verdict] for verdict in FLAGGED_VERDICTS)
    print(table)
    print(f"{len(results)} recordings checked ({num_before} before), {flagged} flagged; {arguments.output}")
    return 2 if flagged and arguments.fail_on_flagged else 0


def main() -> int:
    try:
        return run(parse_arguments())
    except BrokenProcessPool as error:
        raise ValueError(f"a process died (out of memory?), what is finished is kept, run again: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
