"""The page of clips with their actions, pictures and numbers (docs/data.md, "Looking at clips")."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..actions_vjepa2_ac import ACTION_COLUMNS, CONTINUOUS_COLUMNS
from ..pages import PAGE_STYLE, image_tag
from ..recordings.log import NUM_SLOTS, PRESSED_COLUMNS
from ..records import write_file, write_json
from .clip_picture import (
    KEY_CAPS,
    ClipLayout,
    PreviewClip,
    TickLog,
    clip_png,
    compare_with_log,
    cut_log,
    log_verdict,
    motion_scale,
    signed,
)
from .labels import BACK, write_index


def describe_input(clip: PreviewClip, action: int) -> str:
    """An action in words, for readers who do not see the picture."""
    down = [column.removeprefix("key.").replace(".", " ") for column in PRESSED_COLUMNS if clip.value(action, column)]
    slots = [str(slot + 1) for slot in range(NUM_SLOTS) if clip.value(action, f"hotbar.{slot}")]
    return (
        f"yaw {signed('{:+.1f}°', clip.value(action, 'yaw_delta'))}, "
        f"pitch {signed('{:+.1f}°', clip.value(action, 'pitch_delta'))}, {' '.join(down) or 'no keys'}, "
        f"slot {' '.join(slots) or 'none'}{', GUI open' if clip.value(action, 'gui_open') else ''}"
    )


def clip_record(clip: PreviewClip, image: str) -> dict[str, Any]:
    """What is shown of a clip, as JSON: binary columns by the names of those that are 1."""
    return {
        "recording_id": clip.recording_id,
        "session_id": clip.session_id,
        "split": clip.split,
        "start_tick": clip.start_tick,
        "image": image,
        "reasons": clip.reasons,
        "log": log_verdict(clip),
        "differences": clip.differences,
        "actions": [
            {
                **{column: clip.value(action, column) for column in CONTINUOUS_COLUMNS},
                "on": [c for c in ACTION_COLUMNS[len(CONTINUOUS_COLUMNS) :] if clip.value(action, c)],
            }
            for action in range(clip.num_actions)
        ],
        "states": clip.states.tolist(),
    }


def write_preview(directory: Path, facts: Mapping[str, Any], clips: Sequence[PreviewClip]) -> Path:
    """Write one PNG a clip, `clips.json`, with the pictures inside `clips.html`, and the index of pages.

    Args:
        directory: an existing folder; pictures that an earlier `clips.json` names and this one does not are removed.
        facts: what else `clips.json` has (data set, seed and so on); the page shows it.
        clips: what to show, at least one.

    Returns:
        The path of `clips.html`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pictures = {}
    for number, clip in enumerate(clips):
        pictures[f"clip-{number:02d}-{clip.recording_id}-{clip.start_tick:06d}.png"] = clip_png(clip)
    for name, picture in pictures.items():
        write_file(directory / name, picture)
    _remove_stale(directory, set(pictures))
    records = [clip_record(clip, name) for clip, name in zip(clips, pictures, strict=True)]
    write_json(directory / "clips.json", {**facts, "clips": records})
    page = directory / "clips.html"
    write_file(page, render_page(facts, clips, list(pictures.values())).encode())
    write_index(directory, str(facts.get("dataset", "")))
    return page


def _remove_stale(directory: Path, current: set[str]) -> None:
    import json

    earlier = directory / "clips.json"
    if not earlier.is_file():
        return
    for clip in json.loads(earlier.read_text()).get("clips", []):
        # The name alone: what a file says must not reach out of the folder.
        stale = directory / Path(clip["image"]).name
        if stale.name not in current and stale.suffix == ".png":
            stale.unlink(missing_ok=True)


_STYLE = """
main { max-width: 1880px; } h2 { overflow-wrap: anywhere; }
.scroll img { max-width: none; margin: 0; } ul { margin: .2rem 0 .8rem; padding-left: 1.2rem; }
th:first-child, td { text-align: left; } summary { cursor: pointer; color: #56636f; }
kbd { font: 12px system-ui, sans-serif; padding: .05rem .3rem; border: 1px solid #d5dbe0; border-radius: 3px; }
kbd { color: #9aa5af; background: white; }
kbd.on { background: #0072B2; border-color: #0072B2; color: white; font-weight: 700; }
kbd.slot.on { background: #E69F00; border-color: #1c2733; color: #1c2733; }
kbd.gui.on { background: #B0467F; border-color: #B0467F; }
"""


def render_page(facts: Mapping[str, Any], clips: Sequence[PreviewClip], pictures: Sequence[bytes]) -> str:
    """The page, without outside resources or scripts.

    Args:
        facts: about the page, shown as they are.
        clips: what is shown.
        pictures: a PNG of each.
    """
    title = html.escape(f"Clips of {facts.get('dataset', 'a data set')}")
    about = html.escape("; ".join(f"{name}: {value}" for name, value in facts.items() if value is not None))
    sections = "".join(
        _clip_section(number, clip, picture) for number, (clip, picture) in enumerate(zip(clips, pictures, strict=True))
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{PAGE_STYLE}{_STYLE}</style></head><body><main>
<h1>{title}</h1><p class="facts">{about}</p>{BACK}
<section><h2>How to read</h2><p>Time runs to the right. Top: the frames of a clip, two or more to a tubelet. Below
tubelet k, action k: everything done from the first frame of tubelet k until the first frame of tubelet k + 1. If
actions and pictures belong together, then: a view arrow to the right goes with a picture that moves to the left; an
arrow down with a picture that moves up; mouse and view arrows are the same where no GUI is open; w brings things
nearer; the slot marked in the orange cell is the one marked in the picture's hotbar; pictures are still where nothing
is pressed or moved; "GUI open" goes with a picture of a GUI.</p></section>
{sections}</main></body></html>
"""


def _clip_section(number: int, clip: PreviewClip, picture: bytes) -> str:
    heading = html.escape(f"{number}. {clip.recording_id}, tick {clip.start_tick}")
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in clip.reasons)
    verdict = html.escape(log_verdict(clip))
    words = "; ".join(f"action {action}: {describe_input(clip, action)}" for action in range(clip.num_actions))
    alternative = f"{clip.spec.frames_per_clip} frames of {clip.recording_id} from tick {clip.start_tick}; {words}"
    image = image_tag(base64.b64encode(picture).decode(), alternative)
    return f"""<section id="clip-{number}"><h2>{heading}</h2><ul>{reasons}</ul>
<p class="{"note" if clip.differences else "facts"}">{html.escape(clip.split)}; {verdict}</p>
<div class="scroll">{image}</div>
<details><summary>as a table</summary><div class="scroll">{_action_table(clip)}</div></details></section>
"""


def _action_table(clip: PreviewClip) -> str:
    def cap(column: str, label: str, action: int, kind: str = "key") -> str:
        on = " on" if clip.value(action, column) else ""
        return f'<kbd class="{kind}{on}" data-column="{column}">{label}</kbd>'

    rows = ""
    for action in range(clip.num_actions):
        keys = " ".join(cap(column, label, action) for column, label, *_ in KEY_CAPS)
        slots = "".join(cap(f"hotbar.{slot}", str(slot + 1), action, "slot") for slot in range(NUM_SLOTS))
        numbers = "".join(
            f'<td data-column="{column}">{clip.value(action, column):.6g}</td>' for column in CONTINUOUS_COLUMNS
        )
        yaw, pitch = clip.states[action]
        rows += (
            f'<tr data-action="{action}"><th>{action}</th><td>{yaw:.6g}</td><td>{pitch:.6g}</td>{numbers}'
            f"<td>{keys}</td><td>{slots}</td><td>{cap('gui_open', 'GUI', action, 'gui')}</td></tr>"
        )
    last = clip.states[-1]
    rows += f"<tr><th>end</th><td>{last[0]:.6g}</td><td>{last[1]:.6g}</td></tr>"
    names = ("action", "yaw", "pitch", *CONTINUOUS_COLUMNS, "keys and buttons", "hotbar", "GUI")
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{rows}</table>"


__all__ = [
    "ClipLayout",
    "PreviewClip",
    "TickLog",
    "clip_png",
    "compare_with_log",
    "cut_log",
    "describe_input",
    "motion_scale",
    "render_page",
    "write_preview",
]
