"""What a built data set holds, in numbers: action histograms and the data-set report (docs/data.md)."""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..actions_vjepa2_ac import ACTION_COLUMNS, CONTINUOUS_COLUMNS
from ..pages import PAGE_STYLE, image_tag, new_figure
from ..recordings.clips import ClipSpec
from ..recordings.shards import Rejection
from ..records import write_file, write_json
from .labels import BACK, write_index

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_RECORDED = "not recorded"
_MOST_KEYS_SHOWN = 20
BINARY_COLUMNS: tuple[str, ...] = ACTION_COLUMNS[len(CONTINUOUS_COLUMNS) :]

# Lower ends of the bins of positive values, less 0; negative values mirror them and an exact 0 has a bin of its own.
# A pixel turns the view by 0.15 degrees: the smallest turn there is lies in the second bin of degrees.
BIN_EDGES: dict[str, tuple[float, ...]] = {
    "pixels": (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000),
    "degrees": (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 45, 90),
}
UNITS: dict[str, str] = dict(zip(CONTINUOUS_COLUMNS, ("pixels", "pixels", "degrees", "degrees"), strict=True))
_EDGES = {unit: np.array(edges, dtype=np.float64) for unit, edges in BIN_EDGES.items()}
_COLUMNS_OF_UNIT = {unit: [i for i, column in enumerate(UNITS) if UNITS[column] == unit] for unit in BIN_EDGES}
_NUM_BINS = [2 * len(BIN_EDGES[unit]) + 3 for unit in UNITS.values()]
_FIRST_BIN = np.cumsum([0, *_NUM_BINS])
_ZERO_BIN = _FIRST_BIN[:-1] + np.array(_NUM_BINS) // 2

_ORANGE, _BLUE, _GREY = "#D55E00", "#0072B2", "#7f7f7f"


# ------------------------------------------------------------------------------------------------- histograms


class ActionHistograms:
    """Whole-number histograms of all 38 action columns, the same in whatever order and parts the actions come.

    Binary columns: how many actions have a 1. Continuous columns: counts in fixed bins (`BIN_EDGES`), from the most
    negative to the most positive. With edges e_1 < ... < e_n, a positive x is in the bin [e_i, e_(i+1)) (the first is
    (0, e_1), the last [e_n, inf)), a negative x in the mirror image of the bin of -x, and exact zeros, by far the most
    frequent value, are a bin of their own in the middle. 2 n + 3 bins.

    Source: docs/data.md, "Data-set report".
    """

    def __init__(self) -> None:
        self.count = 0
        self._bins = np.zeros(_FIRST_BIN[-1], dtype=np.int64)  # of all continuous columns, one after another
        self._ones = np.zeros(len(BINARY_COLUMNS), dtype=np.int64)

    def update(self, actions: np.ndarray) -> "ActionHistograms":
        """Add raw actions of shape (..., 38), all columns of `ACTION_COLUMNS` in order.

        Raises:
            ValueError: another width, values that are not finite, a binary column with another value than 0 and 1.
        """
        actions = np.asarray(actions)
        if actions.ndim == 0 or actions.shape[-1] != len(ACTION_COLUMNS):
            raise ValueError(f"histograms need all {len(ACTION_COLUMNS)} action columns, found shape {actions.shape}")
        rows = actions.reshape(-1, len(ACTION_COLUMNS))
        continuous, binary = rows[:, : len(CONTINUOUS_COLUMNS)], rows[:, len(CONTINUOUS_COLUMNS) :]
        if not np.isfinite(continuous).all():
            raise ValueError("actions hold values that are not finite")
        pressed = binary == 1
        if np.count_nonzero(pressed) != np.count_nonzero(binary):  # NaN is not 0 either
            row, column = np.argwhere(~pressed & (binary != 0))[0]
            raise ValueError(
                f"action column {BINARY_COLUMNS[column]!r}: expected 0 or 1, found {float(binary[row, column]):g}"
            )
        self.count += len(rows)
        self._ones += np.count_nonzero(pressed, axis=0)
        # In float64: an edge such as 0.1 rounded to float32 would be another edge.
        values = continuous.astype(np.float64)
        places = np.empty(values.shape, dtype=np.int64)
        for unit, columns in _COLUMNS_OF_UNIT.items():
            places[:, columns] = np.searchsorted(_EDGES[unit], np.abs(values[:, columns]), side="right")
        bins = _ZERO_BIN + np.sign(values).astype(np.int64) * (places + 1)
        self._bins += np.bincount(bins.reshape(-1), minlength=len(self._bins))
        return self

    def merge(self, other: "ActionHistograms") -> "ActionHistograms":
        """Add the counts of other data."""
        self.count += other.count
        self._ones += other._ones
        self._bins += other._bins
        return self

    def bins(self, column: str) -> list[int]:
        """Counts of a continuous column, from the most negative bin to the most positive."""
        return self._bins[_bins_of(column)].tolist()

    def pressed(self, column: str) -> int:
        """How many actions have a 1 in a binary column."""
        return int(self._ones[BINARY_COLUMNS.index(column)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActionHistograms) and self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """JSON: `actions` (how many), `edges` by unit, `histograms` of continuous and `pressed` of binary columns."""
        return {
            "actions": self.count,
            "edges": {unit: list(edges) for unit, edges in BIN_EDGES.items()},
            "histograms": {column: self.bins(column) for column in CONTINUOUS_COLUMNS},
            "pressed": {column: self.pressed(column) for column in BINARY_COLUMNS},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ActionHistograms":
        """Read what `to_dict` gave.

        Raises:
            ValueError: a field is missing, other edges or columns, counts that are negative or do not add up.
        """
        missing = [key for key in ("actions", "edges", "histograms", "pressed") if key not in values]
        if missing:
            raise ValueError(f"action histograms lack the fields {missing}: found {sorted(values)}")
        edges = {unit: tuple(found) for unit, found in values["edges"].items()}
        if edges != BIN_EDGES:
            raise ValueError(f"action histograms have the edges {edges}, expected {BIN_EDGES}")
        for field, columns in (("histograms", CONTINUOUS_COLUMNS), ("pressed", BINARY_COLUMNS)):
            if set(values[field]) != set(columns):
                raise ValueError(
                    f"action histograms: {field} is of the columns {sorted(values[field])}, expected {sorted(columns)}"
                )
        result = cls()
        result.count = int(values["actions"])
        for column, bins in values["histograms"].items():
            counts, expected = np.array(bins, dtype=np.int64), len(result.bins(column))
            if counts.shape != (expected,) or counts.sum() != result.count or (counts < 0).any():
                raise ValueError(
                    f"action histograms: {column}: expected {expected} counts that add up to {result.count}, found "
                    f"{len(bins)} that add up to {counts.sum()}"
                )
            result._bins[_bins_of(column)] = counts
        result._ones = np.array([values["pressed"][column] for column in BINARY_COLUMNS], dtype=np.int64)
        if (result._ones < 0).any() or (result._ones > result.count).any():
            raise ValueError(f"action histograms: pressed must be from 0 to {result.count}, found {values['pressed']}")
        return result


def _bins_of(column: str) -> slice:
    index = CONTINUOUS_COLUMNS.index(column)
    return slice(int(_FIRST_BIN[index]), int(_FIRST_BIN[index + 1]))


def bin_labels(unit: str) -> list[str]:
    """Names of a unit's bins, from the most negative to the most positive; the ends that are in are named first."""
    edges = [f"{edge:g}" for edge in BIN_EDGES[unit]]
    upper = [f"under {edges[0]}", *(f"{low} to {high}" for low, high in pairwise(edges))]
    upper.append(f"{edges[-1]} or more")
    return [*(f"−({label})" for label in reversed(upper)), "0", *upper]


# ---------------------------------------------------------------------------------------------------- summary


def _check_fields(report: Mapping[str, Any]) -> None:
    missing = [key for key in ("recordings", "accepted", "clips", "rejected", "repairs", "splits") if key not in report]
    if missing:
        raise ValueError(f"report.json lacks the fields {missing}: found {sorted(report)}")


def dataset_summary(
    report: Mapping[str, Any],
    histograms: ActionHistograms | None = None,
    *,
    num_bytes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The numbers of a built data set, as JSON; what an older `report.json` lacks is None.

    Args:
        report: contents of `report.json`.
        histograms: of its actions; None takes the field `actions` of the report, where there is one.
        num_bytes: size of the Parquet files of each split; None takes the report's, where it has them.

    Returns:
        dict: `recordings` (`found`, `accepted`, `rejected`, `skipped` by option), `players` and `sessions` with clips,
        `clips`, `hours` (`recordings`: ticks of accepted recordings; `clips`: frames of clips, at their own rate),
        `splits` (players, sessions and recordings with clips), `gui` (`ticks`: share of the ticks of accepted
        recordings, `actions`: share of actions), `repairs` (`ticks` and `recordings` of each), `observed` (numbers of
        what is doubtful and left as it is), `other_keys` (ticks with each key that has no column), `skipped_clips` by
        option, `rejected` by reason, `other_files`, `bytes`, `pressed` (share of actions of each binary column),
        `actions` (histograms).

    Raises:
        ValueError: a field of the report is missing that every version of it has.
    """
    _check_fields(report)
    if histograms is None and report.get("actions") is not None:
        histograms = ActionHistograms.from_dict(report["actions"])
    recordings: Sequence[Mapping] | None = report.get("per_recording")
    clip = _clip_spec(report)
    clip_hours = None if clip is None else clip.frames_per_clip / clip.fps / 3600
    units = {split: _split_units(split, part, recordings) for split, part in report["splits"].items()}
    if num_bytes is None and all("bytes" in part for part in report["splits"].values()):
        num_bytes = {split: part["bytes"] for split, part in report["splits"].items()}
    kinds = Counter(_rejection_kind(rejection) for rejection in report["rejected"])
    return {
        "recordings": {
            "found": report["recordings"],
            "accepted": report["accepted"],
            "rejected": sum(rejection["recording"] is not None for rejection in report["rejected"]),
            "skipped": dict(report.get("skipped_recordings", {})),
        },
        **{name: _count_units(part[name] for part in units.values()) for name in ("players", "sessions")},
        "clips": report["clips"],
        "hours": {
            "recordings": _recording_hours(recordings, clip),
            "clips": None if clip_hours is None else report["clips"] * clip_hours,
        },
        "splits": {
            split: {
                **{name: None if values is None else len(values) for name, values in units[split].items()},
                "recordings": part["recordings"] if recordings is None else len(_with_clips(split, recordings)),
                "clips": part["clips"],
                "hours": None if clip_hours is None else part["clips"] * clip_hours,
                "bytes": None if num_bytes is None else num_bytes[split],
            }
            for split, part in report["splits"].items()
        },
        "gui": {
            "ticks": _share(recordings, "gui_ticks", "ticks"),
            "actions": _pressed_shares(histograms, ["gui_open"]).get("gui_open"),
        },
        "repairs": {
            name: {"ticks": ticks, "recordings": _count_repaired(recordings, name)}
            for name, ticks in report["repairs"].items()
        },
        "observed": report.get("observed"),
        "other_keys": _most_frequent(report.get("other_keys")),
        "skipped_clips": dict(report.get("skipped_clips", {})),
        "rejected": dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0]))),
        "other_files": report.get("other_files"),
        "bytes": None if num_bytes is None else sum(num_bytes.values()),
        "pressed": _pressed_shares(histograms, BINARY_COLUMNS) or None,
        "actions": None if histograms is None else histograms.to_dict(),
    }


def _clip_spec(report: Mapping[str, Any]) -> ClipSpec | None:
    options = report.get("options")
    return ClipSpec(**options["clip"]) if options else None


def _with_clips(split: str, recordings: Sequence[Mapping]) -> list[Mapping]:
    return [recording for recording in recordings if recording["split"] == split and recording["clips"]]


def _split_units(
    split: str, part: Mapping[str, Any], recordings: Sequence[Mapping] | None
) -> dict[str, set[str] | None]:
    """Players and sessions that have clips, a data set's files know no others; None where the report has none."""
    units: dict[str, set[str] | None] = {}
    for name, field in (("players", "player"), ("sessions", "session")):
        used = None if recordings is None else _with_clips(split, recordings)
        if used is not None and all(field in recording for recording in used):
            units[name] = {recording[field] for recording in used}
        else:
            units[name] = set(part[name]) if name in part else None
    return units


def _count_units(units: Iterable[set[str] | None]) -> int | None:
    together: set[str] = set()
    for values in units:
        if values is None:
            return None
        together |= values
    return len(together)


def _rejection_kind(rejection: Mapping[str, Any]) -> str:
    return Rejection(rejection["recording"], rejection["shard"], rejection["reason"]).kind


def _recording_hours(recordings: Sequence[Mapping] | None, clip: ClipSpec | None) -> float | None:
    if recordings is None or clip is None:
        return None
    return sum(recording["ticks"] for recording in recordings) / clip.native_fps / 3600


def _share(recordings: Sequence[Mapping] | None, part: str, whole: str) -> float | None:
    total = sum(recording[whole] for recording in recordings or ())
    return sum(recording[part] for recording in recordings or ()) / total if total else None


def _most_frequent(counts: Mapping[str, int] | None) -> dict[str, int] | None:
    return None if counts is None else dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _count_repaired(recordings: Sequence[Mapping] | None, repair: str) -> int | None:
    return None if recordings is None else sum(recording["repairs"].get(repair, 0) > 0 for recording in recordings)


def _pressed_shares(histograms: ActionHistograms | None, columns: Sequence[str]) -> dict[str, float]:
    if histograms is None or not histograms.count:
        return {}
    return {column: histograms.pressed(column) / histograms.count for column in columns}


# ----------------------------------------------------------------------------------------------------- tables

Table = tuple[str, list[str], list[list[str]]]


def summary_tables(summary: Mapping[str, Any]) -> list[Table]:
    """What the card and the report show: for each table its title, headings and rows, as text."""
    recordings, hours, gui = summary["recordings"], summary["hours"], summary["gui"]
    skipped = sum(recordings["skipped"].values())
    contents = [
        ["recordings found", _count(recordings["found"])],
        ["recordings accepted", _count(recordings["accepted"])],
        ["recordings rejected", _count(recordings["rejected"])],
        *([["recordings left out by an option", _count(skipped)]] if skipped else []),
        ["players with clips", _count(summary["players"])],
        ["sessions with clips", _count(summary["sessions"])],
        ["hours of accepted recordings", _hours(hours["recordings"])],
        ["clips", _count(summary["clips"])],
        ["hours of clips", _hours(hours["clips"])],
        ["GUI open, share of ticks", _percent(gui["ticks"])],
        ["GUI open, share of actions", _percent(gui["actions"])],
        ["bytes of Parquet", _count(summary["bytes"])],
    ]
    splits = [
        [
            split,
            *(_count(part[name]) for name in ("players", "sessions", "recordings", "clips")),
            _hours(part["hours"]),
            _count(part["bytes"]),
        ]
        for split, part in summary["splits"].items()
    ]
    left_out = [*recordings["skipped"].items(), *summary["skipped_clips"].items()]
    kinds = ["recordings"] * len(recordings["skipped"]) + ["clips"] * len(summary["skipped_clips"])
    tables: list[Table] = [
        ("Contents", ["", "number"], contents),
        ("Splits", ["split", "players", "sessions", "recordings", "clips", "hours of clips", "bytes"], splits),
        (
            "Rejected, by reason",
            ["reason", "number"],
            [[kind, _count(count)] for kind, count in summary["rejected"].items()] or [["none", "0"]],
        ),
        (
            "Repairs",
            ["repair", "ticks", "recordings"],
            [[name, _count(part["ticks"]), _count(part["recordings"])] for name, part in summary["repairs"].items()],
        ),
        (
            "Doubtful, and left as it is",
            ["what (docs/data.md, What is only counted)", "number"],
            _rows(summary["observed"]),
        ),
        (
            "Keys without a column",
            ["key", "ticks"],
            _rows(summary["other_keys"])[:_MOST_KEYS_SHOWN],
        ),
        (
            "Left out by options",
            ["option", "what", "number"],
            [[name, kind, _count(count)] for (name, count), kind in zip(left_out, kinds, strict=True)],
        ),
    ]
    if summary["pressed"] is not None:
        pressed = [[name, _percent(share)] for name, share in summary["pressed"].items()]
        tables.append(("Share of actions with each key, button, slot", ["column", "share of actions"], pressed))
    if summary["actions"] is not None:
        tables += _histogram_tables(summary["actions"])
    return tables


def _rows(counts: Mapping[str, int] | None) -> list[list[str]]:
    if counts is None:
        return [["", NOT_RECORDED]]
    return [[name, _count(number)] for name, number in counts.items() if number] or [["none", "0"]]


def _histogram_tables(actions: Mapping[str, Any]) -> list[Table]:
    tables: list[Table] = []
    for unit in BIN_EDGES:
        columns = [column for column in CONTINUOUS_COLUMNS if UNITS[column] == unit]
        counts = zip(*(actions["histograms"][column] for column in columns), strict=True)
        rows = [[label, *map(_count, row)] for label, row in zip(bin_labels(unit), counts, strict=True)]
        tables.append((f"Actions by {' and '.join(columns)}", [unit, *columns], rows))
    return tables


def _count(value: int | None) -> str:
    return NOT_RECORDED if value is None else f"{value:,}"


def _hours(value: float | None) -> str:
    return NOT_RECORDED if value is None else f"{value:,.2f}"


def _percent(value: float | None) -> str:
    if value is None:
        return NOT_RECORDED
    # Rare must not look like never.
    return f"{100 * value:.2f} %" if value == 0 or value >= 1e-4 else f"{100 * value:.1g} %"


def summary_markdown(report: Mapping[str, Any]) -> str:
    """The data-set report for the card, from `report.json` alone; sections begin with `###`.

    Raises:
        ValueError: as `dataset_summary`.
    """
    return tables_markdown(summary_tables(dataset_summary(report)))


def tables_markdown(tables: Sequence[Table]) -> str:
    """Tables as Markdown; columns of numbers are aligned to the right."""
    parts = []
    for title, headings, rows in tables:
        lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts.append(f"### {title}\n\n{body}\n")
    return "\n".join(parts)


# ------------------------------------------------------------------------------------------------ HTML report


def histogram_figure(histograms: ActionHistograms) -> "Figure":
    """Histograms of the four continuous columns; counts on a logarithmic axis, exact zeros in grey.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(11, 6.4)
    for axes, column in zip(figure.subplots(2, 2).flat, CONTINUOUS_COLUMNS, strict=True):
        counts, unit = histograms.bins(column), UNITS[column]
        middle = len(counts) // 2
        colours = [_ORANGE] * middle + [_GREY] + [_BLUE] * middle
        axes.bar(range(len(counts)), counts, width=0.9, color=colours)
        edges = [f"{edge:g}" for edge in BIN_EDGES[unit]]
        # Edges lie between bars: -e_n .. -e_1, the zero bin, e_1 .. e_n.
        ticks = [middle - 1.5 - i for i in range(len(edges))] + [middle] + [middle + 1.5 + i for i in range(len(edges))]
        axes.set_xticks(ticks, [*(f"−{edge}" for edge in edges), "0", *edges], rotation=90, fontsize=8)
        axes.set_yscale("symlog", linthresh=1)
        axes.set(title=column, xlabel=unit, ylabel="actions", ylim=(0, 3 * max(*counts, 1)))
        axes.grid(alpha=0.25, axis="y")
    return figure


def pressed_figure(histograms: ActionHistograms) -> "Figure":
    """Share of actions of every binary column, as bars on a logarithmic axis with their numbers.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(9, 7.4)
    axes = figure.subplots()
    shares = [100 * histograms.pressed(column) / max(histograms.count, 1) for column in BINARY_COLUMNS]
    lowest, rows = min([0.01, *(share / 2 for share in shares if share)]), range(len(BINARY_COLUMNS))
    axes.barh(
        rows, shares, color=[_BLUE if column.startswith(("key", "mouse")) else _ORANGE for column in BINARY_COLUMNS]
    )
    for row, share in zip(rows, shares, strict=True):
        axes.text(max(share, lowest) * 1.1, row, _percent(share / 100) if share else "never", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set(xlim=(lowest, 400), xlabel="share of actions (%), logarithmic; orange: slot and GUI at the first tick")
    axes.set_yticks(list(rows), BINARY_COLUMNS, fontsize=8)
    axes.set_ylim(len(BINARY_COLUMNS) - 0.4, -0.6)
    axes.grid(alpha=0.25, axis="x")
    return figure


def write_dataset_report(
    directory: Path,
    name: str,
    summary: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Path:
    """Write `summary.json`, `summary.md`, the figures as PNG and, with them inside, `report.html`; the index of
    pages anew.

    Args:
        directory: an existing folder.
        name: what the report calls the data set.
        summary: as `dataset_summary` gives it.
        notes: what a reader must know first, such as numbers that contradict each other.

    Returns:
        The path of `report.html`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    images: dict[str, bytes] = {}
    if summary["actions"] is not None:
        histograms = ActionHistograms.from_dict(summary["actions"])
        figures = {"actions": histogram_figure(histograms), "pressed": pressed_figure(histograms)}
        for figure_name, figure in figures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            images[figure_name] = buffer.getvalue()
            write_file(directory / f"{figure_name}.png", images[figure_name])
    tables = summary_tables(summary)
    write_json(directory / "summary.json", {"dataset": name, "notes": list(notes), **summary})
    quoted = "".join(f"> {note}\n" for note in notes)
    write_file(directory / "summary.md", f"{quoted}\n{tables_markdown(tables)}".lstrip().encode())
    path = directory / "report.html"
    write_file(path, _render_html(name, tables, images, notes).encode())
    write_index(directory, name)
    return path


def _render_html(name: str, tables: Sequence[Table], images: Mapping[str, bytes], notes: Sequence[str]) -> str:
    title = html.escape(f"Data set {name}")
    warnings = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    alternatives = {
        "actions": "histograms of mouse movement, yaw and pitch change; the numbers are in the tables below",
        "pressed": "bars: share of actions with each key, button, hotbar slot and with an open GUI; numbers below",
    }
    figures = "".join(
        f"<section>{image_tag(base64.b64encode(image).decode(), alternatives[key])}</section>"
        for key, image in images.items()
    )
    sections = [f"<section><h2>{html.escape(table[0])}</h2>{_html_table(table)}</section>" for table in tables]
    summary_sections, histogram_sections = "".join(sections[:5]), "".join(sections[5:])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{PAGE_STYLE} th:first-child {{ text-align: left; }}</style></head><body><main>
<h1>{title}</h1>{BACK}{warnings}
{summary_sections}{figures}{histogram_sections}
<p class="facts">"{NOT_RECORDED}": the data set was built by a version that did not record it. Repairs are ticks of
accepted recordings. Bins: the lower end is in, exact zeros are a bin of their own, negative bins mirror positive ones.
The numbers are in summary.json beside this page.</p></main></body></html>
"""


def _html_table(table: Table) -> str:
    _, headings, rows = table
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr><th>{html.escape(row[0])}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
