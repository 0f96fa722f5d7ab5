"""`report.html` and its figure for a trained head (docs/applications.md, "Figures")."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..pages import PAGE_STYLE, image_tag, new_figure
from ..records import write_file
from .figures import LARGE_TURN_DEGREES

_NUMBERS = {
    "r2": "R2",
    "mae": "mean absolute error",
    "mae_of_mean": "... of the mean",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "average_precision": "average precision",
    "accuracy_at_even_odds": "accuracy",
    "majority_accuracy": "... of the more frequent answer",
    "share": "share pressed",
    "pressed": "pressed",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "pairs": "pairs",
    "told": "steps told, mean",
    "told_std": "... standard deviation",
    "features": "difference of features, mean",
}
Rows = list[tuple[str, Mapping[str, Any]]]


def tables(record: Mapping[str, Any]) -> dict[str, Rows]:
    """The figures of `metrics.json` as tables: title -> rows of a name and its numbers."""
    found: dict[str, Rows] = {}
    if "camera" in record:
        found["Mouse and camera (pixels, degrees)"] = list(record["camera"].items())
    if "keys" in record:
        found["Keys"] = list(record["keys"]["columns"].items())
    for horizon in record.get("horizons", []):
        names = {"model": "", "repeat_last": " (last action repeated)"}
        rows = [(c + text, f[kind]) for c, f in horizon["columns"].items() for kind, text in names.items()]
        found[f"Horizon {horizon['horizon']}" + (" (the action under way)" if horizon["horizon"] == 1 else "")] = rows
    if "distance" in record:
        found["Steps between two views, by true steps"] = list(record["distance"]["by_steps"].items())
    if "classes" in record:
        found["Classes"] = list(record["classes"].items())
    for part, kinds in record.get("frames", {}).items():
        if kinds is not None:
            name = "Frames" if part == "all" else f"Frames after turns of more than {LARGE_TURN_DEGREES:g} degrees"
            rows = [(kind, figures) for kind, figures in kinds.items() if kind != "rows"]
            found[f"{name} ({kinds['rows']} tubelets)"] = rows
    return found


def facts(record: Mapping[str, Any]) -> list[str]:
    """Sentences with the figures that stand for the whole, next to their baselines."""
    sentences = []
    if "keys" in record:
        keys = record["keys"]
        sentences.append(
            f"Keys: macro F1 {_number(keys['macro_f1'])}, mean average precision "
            f"{_number(keys['mean_average_precision'])}, over the keys that are ever pressed."
        )
    for name, of in (("slot", record.get("slot")), ("class", record)):
        if of and "accuracy" in of:
            sentences.append(
                f"Accuracy of the {name}: {_number(of['accuracy'])}; of always telling the most frequent one "
                f"{_number(of['majority_accuracy'])}, by chance {_number(of['chance'])}; balanced accuracy "
                f"{_number(of['balanced_accuracy'])}."
            )
    if "distance" in record:
        distance = record["distance"]
        sentences.append(
            f"Steps between two views: rank correlation with the true ones {_number(distance['rank_correlation'])}, "
            f"that of the difference of features {_number(distance['rank_correlation_features'])}; mean absolute error "
            f"{_number(distance['mae'])} steps, of always telling the mean {_number(distance['mae_of_mean'])}."
        )
    if "classes" in record:
        sentences.append(f"Mean average precision {_number(record['mean_average_precision'])}.")
    for part, kinds in record.get("frames", {}).items():
        if kinds is not None:
            where = "" if part == "all" else f" after turns of more than {LARGE_TURN_DEGREES:g} degrees"
            others = ", ".join(f"the {k} has {v['psnr']:.2f} dB" for k, v in list(kinds.items())[2:])
            sentences.append(f"Decoded frames{where}: PSNR {kinds['decoded']['psnr']:.2f} dB; {others}.")
    for horizon in record.get("horizons", []):
        keys = horizon["macro_f1"]
        if keys["model"] is not None:
            sentences.append(
                f"Horizon {horizon['horizon']}: macro F1 of the keys {_number(keys['model'])}; of the last action "
                f"repeated {_number(keys['repeat_last'])}."
            )
        if "model" in horizon.get("slot", {}):
            slot = horizon["slot"]
            sentences.append(
                f"Horizon {horizon['horizon']}: accuracy of the slot {_number(slot['model'])}; of the last one "
                f"repeated {_number(slot['repeat_last'])}."
            )
    return sentences


def write_head_report(directory: Path, record: Mapping[str, Any]) -> Path:
    """Write `figures.png` and, with it inside, `report.html`; returns the latter's path.

    Args:
        directory: an existing folder.
        record: the contents of `metrics.json` that `examples/train_head.py` writes.
    """
    found = tables(record)
    buffer = io.BytesIO()
    _figure(found).savefig(buffer, format="png")
    write_file(directory / "figures.png", buffer.getvalue())
    escape, title = html.escape, f"{record['task'].replace('_', ' ').capitalize()}: {record['world_model']}"
    about = (
        f"{record['clips']} validation clips of {record['sessions']} sessions of {record['players']} players of "
        f"{record['dataset']}, {record['training_clips']} for training; features "
        f"from the {record['features_from']}"
    )
    picture = image_tag(base64.b64encode(buffer.getvalue()).decode(), "figures by column")
    sections = "".join(f"<section><h2>{escape(name)}</h2>{_table(rows)}</section>" for name, rows in found.items())
    verdict = "".join(f"<p>{escape(sentence)}</p>" for sentence in facts(record))
    used = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{PAGE_STYLE}</style></head><body><main>
<h1>{escape(title)}</h1><p class="facts">{escape(about)}</p>
<section class="verdict"><h2>Figures</h2>{verdict}{picture}</section>{sections}
<section><h2>How it was made</h2><p><code>{escape(record["command"])}</code></p>
<p class="facts">{escape(used)}. The numbers are in metrics.json beside this page.</p></section>
</main></body></html>
"""
    path = directory / "report.html"
    write_file(path, page.encode())
    return path


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _table(rows: Rows) -> str:
    shown = [n for n in _NUMBERS if any(n in figures for _, figures in rows)]
    head = "".join(f"<th>{html.escape(_NUMBERS[n])}</th>" for n in shown)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{_number(figures[n]) if n in figures else ''}</td>" for n in shown)
        + "</tr>"
        for name, figures in rows
    )
    return f"<div class='scroll'><table><tr><th></th>{head}</tr>{body}</table></div>"


def _shown(figures: Mapping[str, Any]) -> float | None:
    """The figure of a column that a bar shows."""
    return figures[next(n for n in ("r2", "psnr", "average_precision", "told") if n in figures)]


def _figure(found: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]]) -> Any:
    """Bars a table: R2 of what is regressed, average precision (against the share: chance) of what is told apart,
    PSNR of frames, steps told of distances.

    Columns without such a figure (keys that are never pressed) are left out; the tables have them.
    """
    height = sum(0.22 * len(rows) + 1.0 for rows in found.values())
    figure = new_figure(9, max(height, 2.0))
    grid = figure.subplots(len(found), 1, squeeze=False, height_ratios=[len(r) + 3 for r in found.values()])
    for axes, (title, rows) in zip(grid[:, 0], found.items(), strict=True):
        rows = [(n, f) for n, f in rows[::-1] if _shown(f) is not None]
        values = [_shown(f) or 0.0 for _, f in rows]
        frames = any("psnr" in f for _, f in rows)
        steps = any("told" in f for _, f in rows)
        label = "PSNR (dB)" if frames else "steps told, mean" if steps else "R2, average precision"
        axes.barh(range(len(rows)), values, color="#0072B2", label=label)
        chance = [(i, f["share"]) for i, (_, f) in enumerate(rows) if "share" in f]
        if chance:
            axes.plot([s for _, s in chance], [i for i, _ in chance], "|", color="black", markersize=8, label="chance")
        highest = 1.1 * max(values) if frames or steps else 1
        axes.set(xlim=(min(0.0, *(max(v, -1.0) for v in values)), highest), title=title)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
        axes.grid(alpha=0.25, axis="x")
        axes.legend(frameon=False, fontsize=7, loc="lower right")
    return figure
