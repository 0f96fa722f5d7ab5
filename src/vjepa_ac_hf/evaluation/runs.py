"""Figures of several runs of one recipe: mean, spread between runs, and each run's own interval (docs/evaluation.md).

A run is a folder `RUNS/seed-K` with what its programs left, one folder each: their `metrics.json`, `summary.json`
and `landscapes.json` hold the figures, the `training_args.json` of a model says how it was trained.
"""

import html
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..pages import PAGE_STYLE
from ..records import versions, write_file, write_json

FILES = ("metrics.json", "summary.json", "landscapes.json")
_NO_FIGURES = frozenset({"settings", "versions", "arguments", "seed", "landscapes"})
# Of a run's own: they differ between runs of one recipe, as do checksums of the models that a program's settings name.
_OWN = frozenset(
    {"seed", "command", "model", "weights_sha256", "processor", "world_model", "hub_model_id", "hub_private"}
)
_CHECKSUM = re.compile(r".*weights|encoder|predictor")

Interval = tuple[float, float] | None


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, float, Interval]]:
    """Every figure in what a program left, as (name, value, 95 % interval or None).

    A figure is a number with a fraction in JSON (1.0, not the count 1); of a list, its place or `horizon` is in the
    name. Its interval stands beside it as `NAME_ci95`, in a `ci95` by name, or as a `ci95` right after it.
    """
    if isinstance(value, list):
        for number, entry in enumerate(value):
            if isinstance(entry, dict | list):
                key = f"horizon {entry['horizon']}" if isinstance(entry, dict) and "horizon" in entry else str(number)
                yield from flatten(entry, f"{name}.{key}" if name else key)
        return
    intervals = value.get("ci95") if isinstance(value.get("ci95"), dict) else {}
    keys = list(value)
    for key, entry in value.items():
        if key in _NO_FIGURES or key.endswith("ci95"):
            continue
        place = f"{name}.{key}" if name else key
        if isinstance(entry, dict | list):
            yield from flatten(entry, place)
        elif isinstance(entry, float):
            after = keys[keys.index(key) + 1 :][:1] == ["ci95"] and isinstance(value["ci95"], list)
            found = intervals.get(key) or value.get(f"{key}_ci95") or (value["ci95"] if after else None)
            yield place, entry, None if found is None else (found[0], found[1])


def read_run(folder: Path) -> dict[str, Any]:
    """What a run's programs left: `figures` by name, `settings` that runs share, and by folder the evaluated `weights`
    and the `clip_sets` that figures are of (`describe_clips`)."""
    figures: dict[str, tuple[float, Interval]] = {}
    settings: dict[str, Any] = {}
    weights: dict[str, str] = {}
    clip_sets: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/*.json")):
        if path.name not in (*FILES, "training_args.json"):
            continue
        content, place = json.loads(path.read_text()), f"{path.parent.name}/{path.name}"
        if path.name in FILES:
            figures |= {f"{path.parent.name}: {name}": (value, of) for name, value, of in flatten(content)}
            weights |= {path.parent.name: content["weights_sha256"]} if "weights_sha256" in content else {}
            shared = {k: v for k, v in content.get("settings", {}).items() if not _CHECKSUM.fullmatch(k)}
            shared |= {k: v for k, v in content.items() if isinstance(v, str)}
            if "clip_set" in content:
                clip_sets[path.parent.name] = content["clip_set"]
                shared |= {f"clip_set.{k}": v for k, v in content["clip_set"].items()}
        else:
            shared = content["arguments"]
        shared = {f"{place}, {k}": v for k, v in shared.items() if k not in _OWN}
        settings |= json.loads(json.dumps(shared).replace(json.dumps(str(folder))[1:-1], "{run}"))
    return {"figures": figures, "settings": settings, "weights": weights, "clip_sets": clip_sets}


def aggregate(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Figures over runs (`read_run`, by the run's name), JSON.

    Returns:
        `runs`, their number; `weights_sha256` by run and folder; `clip_sets` by folder; `figures` by name: `runs` that
        have it, `mean`, `std` (sample standard deviation between runs, n - 1; None of one run), `min`, `max`, `values`
        and `ci95` by run.

    Raises:
        ValueError: no figures, or runs of different recipes or clips (the message has both values).
    """
    first, *others = runs
    for name in others:
        then, now = runs[first]["settings"], runs[name]["settings"]
        differing = [k for k in sorted(then.keys() | now.keys()) if then.get(k) != now.get(k)]
        if differing:
            details = "; ".join(f"{k}: {then.get(k)!r} in {first}, {now.get(k)!r} in {name}" for k in differing)
            raise ValueError(f"{name} is no run of the recipe of {first} ({details}): figures of both have no mean")
    figures = {}
    for figure in dict.fromkeys(name for run in runs.values() for name in run["figures"]):
        found = {name: run["figures"][figure] for name, run in runs.items() if figure in run["figures"]}
        values = {name: value for name, (value, _) in found.items()}
        figures[figure] = {
            "runs": len(values),
            "mean": statistics.fmean(values.values()),
            "std": statistics.stdev(values.values()) if len(values) > 1 else None,
            "min": min(values.values()),
            "max": max(values.values()),
            "values": values,
            "ci95": {name: interval for name, (_, interval) in found.items()},
        }
    if not figures:
        raise ValueError(f"{', '.join(runs)}: no figures; a program's folder has them in {' or '.join(FILES)}")
    return {
        "runs": len(runs),
        "weights_sha256": {name: run["weights"] for name, run in runs.items()},
        "clip_sets": runs[first]["clip_sets"],
        "figures": figures,
        "versions": versions(),
    }


def table(summary: Mapping[str, Any], all_figures: bool = False) -> list[list[str]]:
    """Rows of text, the first one names the columns; without `all_figures` those that have an interval in a run."""
    names = list(summary["weights_sha256"])
    rows = [["figure", "mean", "std of runs", "min to max", *(f"{name} (95 % within the run)" for name in names)]]
    for figure, of in summary["figures"].items():
        if not all_figures and not any(of["ci95"].values()):
            continue
        std, span = (
            ("one run", "") if of["std"] is None else (f"{of['std']:.3g}", f"{of['min']:.4g} to {of['max']:.4g}")
        )
        own = []
        for name in names:
            interval = of["ci95"].get(name)
            bounds = "" if interval is None else f" ({interval[0]:.4g} to {interval[1]:.4g})"
            own.append(f"{of['values'][name]:.4g}{bounds}" if name in of["values"] else "-")
        rows.append([figure, f"{of['mean']:.4g}", std, span, *own])
    return rows


def folder_of(summary: Mapping[str, Any], weights: str) -> str | None:
    """The folder, in every run, of these weights' figures; None: no run has them."""
    found = (folder for of in summary["weights_sha256"].values() for folder, own in of.items() if own == weights)
    return next(found, None)


def card_rows(summary: Mapping[str, Any], weights: str, keys: Sequence[str]) -> list[list[str]]:
    """Rows for a card: horizon, and for each figure of `keys` mean, standard deviation, least and largest of runs."""
    start = f"{folder_of(summary, weights)}: horizons.horizon "
    names = [name.removeprefix(start) for name in summary["figures"] if name.startswith(start)]
    rows = []
    for horizon in dict.fromkeys(name.split(".")[0] for name in names):
        cells = []
        for key in keys:
            of = summary["figures"].get(f"{start}{horizon}.{key}")
            cells.append("-" if of is None else f"{of['mean']:.4f}")
            if of is not None and of["std"] is not None:
                cells[-1] += f" ± {of['std']:.4f} ({of['min']:.4f} to {of['max']:.4f})"
        rows.append([horizon, *cells])
    return rows


def as_text(rows: list[list[str]]) -> str:
    """A table for a screen."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def count(runs: int) -> str:
    """How many runs figures are of, in words."""
    return "one run: how much runs differ is not known" if runs == 1 else f"{runs} runs"


def write_runs(output: Path, summary: Mapping[str, Any], programs: Mapping[str, str]) -> None:
    """`runs.json` and the page `report.html` in a folder.

    Args:
        output: an existing folder.
        summary: of `aggregate`.
        programs: what every run ran, for the page.
    """
    write_json(output / "runs.json", {**summary, "programs": dict(programs)})

    def tagged(row: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    tables = []
    for title, rows in (("Figures with intervals", table(summary)), ("All figures", table(summary, True))):
        body = tagged(rows[0], "th") + "".join(tagged(row, "td") for row in rows[1:])
        tables.append(f"<section><h2>{title}</h2><div class='scroll'><table>{body}</table></div></section>")
    ran = "".join(f"<p><code>{html.escape(f'{name} {flags}')}</code></p>" for name, flags in programs.items())
    clips = "; ".join(
        f"{folder}: {of['clips']} clips by {of['rule'] or 'no rule'}, {of['digest']}"
        for folder, of in summary["clip_sets"].items()
    )
    title, used = f"Figures of {count(summary['runs'])}", ", ".join(f"{k} {v}" for k, v in summary["versions"].items())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{PAGE_STYLE}</style></head><body><main><h1>{title}</h1>
<p class="facts">The standard deviation, least and largest value are between runs, which differ in their seed; an
interval is within a run, over the players, sessions or episodes that it was measured on.</p>
{"".join(tables)}
<section><h2>How it was made</h2>{ran}<p class="facts">{html.escape(clips)}</p>
<p class="facts">{html.escape(used)}. The numbers are in runs.json.</p></section>
</main></body></html>
"""
    write_file(output / "report.html", page.encode())
