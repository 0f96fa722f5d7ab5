"""The section "Controllability" of `report.html`."""

import html
from collections.abc import Mapping
from typing import Any

from .controllability import headline_figures

TITLES = {
    "imagined": "imagined",
    "true_features": "true features (ceiling)",
    "persistence": "persistence (floor)",
    "other_actions": "other clip's actions (floor)",
    "repeat_last": "last action repeated, no head",
    "other_actions_obeyed": "other clip's actions, against those",
}
_GROUP_TITLES = {"forward_back": "forward, back", "left_right": "left, right", "sneak_sprint": "sneak, sprint"}


def controllability_section(metrics: Mapping[str, Any]) -> str:
    """HTML of what an inverse dynamics head read in imagined features; empty where none was given."""
    if "controllability" not in metrics:
        return ""
    found = metrics["controllability"]
    rows = headline_figures(found)
    tables = ""
    for name in dict.fromkeys(row["figure"] for row in rows):
        own = [row for row in rows if row["figure"] == name]
        unit = f" ({own[0]['unit']})" if own[0]["unit"] else ""
        cells = [(row["horizon"], [_cell(row[kind], "mean") for kind in TITLES]) for row in own]
        tables += f"<h3>{html.escape(name + unit)}: {own[0]['better']} is better</h3>{_table('horizon', cells)}"
    for at in dict.fromkeys((0, len(found["horizons"]) - 1)):
        tables += _keys_tables(found["horizons"][at])
    head = html.escape(str(metrics["inverse_dynamics"]))
    return f"""<section><h2>Controllability</h2><p class="facts">Can the actions that a rollout was given be read from
it? The inverse dynamics head {head} reads the change from each imagined step to the next, and is compared with the
actions given. Ceiling: the same head on the true features, all that it can tell. Floors: on the last true features
repeated; and on the rollout that was given another clip's actions, compared with the clip's own. The last column
compares that rollout with the actions it was given: a model that obeys its actions and not its context is as good there
as with its own. Onsets are presses of keys that were up one action before, among such actions only: repeating the last
action finds none at horizon 1.</p>{tables}</section>"""


def _keys_tables(at: Mapping[str, Any]) -> str:
    """F1 of every group and key that is pressed at a horizon, and of its onsets."""
    tables = ""
    for what, title in (("f1", "F1"), ("onset", "F1 of onsets")):
        cells = []
        for part in ("groups", "keys"):
            for name in at["kinds"]["imagined"][part]:
                of = {kind: None if figures is None else figures[part][name] for kind, figures in at["kinds"].items()}
                if what == "onset":
                    of = {kind: None if figures is None else figures["onset"] for kind, figures in of.items()}
                if (own := of["imagined"]) is None:
                    continue
                label = f"{_GROUP_TITLES.get(name, name)} ({own['pressed']})"
                cells.append((label, [_cell(of[kind], "f1") for kind in TITLES]))
        if cells:
            tables += f"<h3>{title}, horizon {at['horizon']}</h3>{_table('columns (presses)', cells)}"
    missing = "; ".join(f"{name}: {why}" for name, why in at["reasons"].items())
    note = (
        f"<p class='facts'>Without figures at horizon {at['horizon']}: {html.escape(missing)}.</p>" if missing else ""
    )
    return tables + note


def _table(first: str, rows: list[tuple[Any, list[str]]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in TITLES.values())
    body = "".join(
        f"<tr><th>{html.escape(str(name))}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return f"<div class='scroll'><table><tr><th>{html.escape(first)}</th>{head}</tr>{body}</table></div>"


def _cell(figure: Mapping[str, Any] | None, name: str) -> str:
    if figure is None or figure[name] is None:
        return "–"
    interval = figure["ci95"]
    bounds = "" if interval is None else f"<small>{interval[0]:.3f} – {interval[1]:.3f}</small>"
    return f"{figure[name]:.3f}{bounds}"
