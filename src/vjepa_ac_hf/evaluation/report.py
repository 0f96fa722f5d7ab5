"""`metrics.json`, and `report.html` with its figures: what an evaluation leaves (docs/evaluation.md)."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..pages import PAGE_STYLE, image_tag
from ..records import write_file, write_json
from .controllability_report import controllability_section
from .figures import FEW_PLAYERS, LARGE_TURN_DEGREES
from .films import film_webp
from .pictures import LAST_FRAME, MEAN_FRAME, OTHER, PREDICTION, REAL, TRUE, ClipPictures
from .plots import clip_figure, curves_figure, frames_figure, histogram_figure
from .rollouts import RolloutTable

_READING = {
    "error": "Mean absolute difference between predicted and true features, over tokens, width and clips. "
    "Smaller is better; it means little by itself.",
    "persistence": "The error of predicting no change: the last context features, repeated. error / persistence "
    "below 1 means that the model knows more than that the picture mostly stays.",
    "shuffled actions": "The error when the clip gets the future actions of another clip. shuffled / error above 1 "
    "means that the actions matter to the prediction, and for the better.",
    "win rate": "The share of pairs (same clip and target, true action against another clip's) in which the true "
    "action gives the smaller error; a tie counts half, chance is 0.5.",
    "win rate, large turns": f"The same for pairs whose yaw changes since the context differ by more than "
    f"{LARGE_TURN_DEGREES:g} degrees: there the actions do say different things.",
}


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json`; a value that is not a number of JSON is an error."""
    write_json(path, metrics)


def write_report(
    directory: Path,
    metrics: Mapping[str, Any],
    table: RolloutTable,
    clips: Sequence[ClipPictures],
    chosen: str = "",
) -> Path:
    """Write the figures as PNG files, films as WebP and, with the same inside, `report.html`.

    Args:
        directory: an existing folder.
        metrics: the contents of `metrics.json`.
        table: the errors that they come from.
        clips: clips to show, possibly none.
        chosen: how they were (`turning_clips`).

    Returns:
        The path of `report.html`.
    """
    figures = {
        "curves": curves_figure(metrics["horizons"], metrics["seconds_per_step"]),
        "pairs": histogram_figure(first_differences(table)),
    }
    if "frames" in metrics:
        figures["frames"] = frames_figure(metrics["frames"], metrics["seconds_per_step"])
    for i, clip in enumerate(clips):
        figures |= {f"clip-{i}": clip_figure(clip), f"clip-{i}-colours": clip_figure(clip, colours=True)}
    files = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        files[f"{name}.png"] = buffer.getvalue()
    for i, clip in enumerate(clips):
        tubelet = len(clip.film[REAL]) // len(clip.frames)
        fps = tubelet / metrics["seconds_per_step"]
        files[f"clip-{i}.webp"] = film_webp(clip.film, clip.context_steps * tubelet, fps)
    for name, content in files.items():
        write_file(directory / name, content)
    path = directory / "report.html"
    images = {name: base64.b64encode(content).decode() for name, content in files.items()}
    write_file(path, render_html(metrics, images, clips, chosen).encode())
    return path


def first_differences(table: RolloutTable) -> np.ndarray:
    """`(pairs,)`, error with the other clip's action minus error with the true one, at horizon 1."""
    return (table.shuffled[:, :, 0] - table.error[:, None, 0]).reshape(-1)


def render_html(
    metrics: Mapping[str, Any], images: Mapping[str, str], clips: Sequence[ClipPictures], chosen: str = ""
) -> str:
    """The report as one page without outside resources.

    Args:
        metrics: the contents of `metrics.json`.
        images: base64 files by name: `curves.png`, `pairs.png`, with a decoder `frames.png`, and of clip i
            `clip-i.png`, `clip-i-colours.png`, `clip-i.webp`.
        clips: those shown.
        chosen: how they were.
    """
    escape = html.escape
    facts = (
        f"{metrics['clips']} clips of {metrics['sessions']} sessions of {metrics['players']} players (intervals: by "
        f"{metrics['interval_unit']}), split {metrics['split']} of "
        f"{metrics['dataset']}; rollouts from {metrics['context_steps']} true steps of "
        f"{metrics['seconds_per_step']:g} s; {metrics['shuffles']} shuffles, seed {metrics['seed']}; chosen by "
        f"{metrics['clip_set']['rule'] or 'no rule'}, set {metrics['clip_set']['digest']}"
    )
    verdict_html = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict(metrics))
    notes_html = "".join(f'<p class="note">{escape(note)}</p>' for note in notes(metrics))
    reading = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _READING.items())
    used = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(f"Evaluation of {metrics['model']}")}</title><style>{PAGE_STYLE}</style></head><body><main>
<h1>{escape(f"Evaluation of {metrics['model']}")}</h1><p class="facts">{escape(facts)}</p>
<section class="verdict"><h2>Verdict</h2>{verdict_html}{notes_html}</section>
<section><h2>By horizon</h2>{image_tag(images["curves.png"], "errors and win rates by horizon")}
<div class="scroll">{_table(metrics["horizons"])}</div>
<p>{escape(retrieval_sentence(metrics["retrieval"]))}</p></section>
<section><h2>Pair by pair</h2>{image_tag(images["pairs.png"], "histogram of error differences at horizon 1")}</section>
{_frames_section(metrics, images)}
{controllability_section(metrics)}
{_clips_section(clips, images, chosen, "frames" in metrics)}
<section><h2>How to read the figures</h2><dl>{reading}</dl></section>
<section><h2>How it was made</h2><p><code>{escape(metrics["command"])}</code></p>
<p class="facts">{escape(used)}. The numbers are in metrics.json beside this page.</p></section>
</main></body></html>
"""


def _frames_section(metrics: Mapping[str, Any], images: Mapping[str, str]) -> str:
    """PSNR and SSIM of decoded frames, all and after large turns."""
    if "frames" not in metrics:
        return ""
    tables = ""
    for name, title in (("psnr", "PSNR (dB)"), ("ssim", "SSIM")):
        for suffix, where in (("", ""), ("_large_turns", f", turned by more than {LARGE_TURN_DEGREES:g} degrees")):
            horizons = metrics["frames"][name + suffix]
            if horizons:
                kinds = list(horizons[0]["kinds"])
                rows = [(h["horizon"], [_mean(h["kinds"][kind], name) for kind in kinds]) for h in horizons]
                head = "".join(f"<th>{html.escape(kind)}</th>" for kind in kinds)
                body = "".join(
                    f"<tr><th>{h}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for h, cells in rows
                )
                table = f"<table><tr><th>horizon</th>{head}</tr>{body}</table>"
                tables += f"<h3>{title}{where}</h3><div class='scroll'>{table}</div>"
    figure = image_tag(images["frames.png"], "PSNR and SSIM by horizon")
    verdict = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in frames_verdict(metrics["frames"]))
    return f"""<section><h2>Frames</h2>{verdict}<p class="facts">What {html.escape(str(metrics["decoder"]))} draws from
features, against the true frames: "true features" is the best that it can do. The decoder is no part of the model. Last
frame: the context's, copied; mean frame: of all clips. Higher is better.</p>{figure}
<details><summary>the numbers</summary>{tables}</details></section>"""


def frames_verdict(frames: Mapping[str, Any]) -> list[str]:
    """Two sentences on the first horizon, of clips that turn where there are any: the decoder, and what is imagined.

    As in `verdict`, a claim is made where the interval of the difference does not hold 0.
    """
    suffix, where = ("_large_turns", f" after turns of more than {LARGE_TURN_DEGREES:g} degrees")
    if not frames["psnr" + suffix]:
        suffix, where = "", ""
    over = frames["psnr" + suffix][0]["over"]
    found = []
    for question, kind in (
        ("Do the features say what is to be seen?", TRUE),
        ("Are imagined frames better than a copy of the last one?", PREDICTION),
    ):
        told = []
        for base in (LAST_FRAME, MEAN_FRAME):
            figure = over[base][kind]
            low, high = figure["ci95"] or (figure["mean"],) * 2
            bounds = "" if figure["ci95"] is None else f" (95 % interval {low:.2f} to {high:.2f})"
            side = "above" if low > 0 else "below" if high < 0 else "not to be told from"
            told.append(f"{side} the {base}: {figure['mean']:+.2f} dB{bounds}")
        found.append(f"{question} One step ahead{where}, frames drawn from {_DRAWN[kind]} are {' and '.join(told)}.")
    return found


def _mean(figure: Mapping[str, Any], name: str) -> str:
    digits = 2 if name == "psnr" else 3
    low_high = figure["ci95"]
    bounds = "" if low_high is None else f"<small>{low_high[0]:.{digits}f} – {low_high[1]:.{digits}f}</small>"
    return f"{figure['mean']:.{digits}f}{bounds}"


_DRAWN = {TRUE: "true features", PREDICTION: "imagined features"}
_DECODED = "Rows below the frames are drawn by the decoder from features, the first of them from the true ones."
_NEAREST = """Without a decoder, rows below the frames show the nearest real frames: of all steps of these clips, the
one whose features have the smallest mean square difference."""


def _clips_section(clips: Sequence[ClipPictures], images: Mapping[str, str], chosen: str, is_decoded: bool) -> str:
    if not clips:
        return ""
    figures = ""
    for i, clip in enumerate(clips):
        title, names = html.escape(clip.title), "".join(f"<span>{html.escape(name)}</span>" for name in clip.film)
        film = image_tag(images[f"clip-{i}.webp"], f"film of {clip.title}: {', '.join(clip.film)}", "webp")
        colours = image_tag(images[f"clip-{i}-colours.png"], f"{clip.title}, as colours")
        figures += f"""<figure><div class="film"><div>{names}</div>{film}</div>
{image_tag(images[f"clip-{i}.png"], clip.title)}
<details><summary>features as colours</summary>{colours}</details><figcaption>{title}</figcaption></figure>"""
    return f"""<section><h2>Clips</h2><p class="facts">{html.escape(chosen)}
{_DECODED if is_decoded else _NEAREST} Framed in
blue: the context, which the model sees; in films the strip below is blue meanwhile, orange where frames are imagined.
Under each step: the action that led to it, and the turn of the other clip whose actions the row "{OTHER}" was given;
mirrored: left for right (mouse, yaw, a and d). Colours are the first three principal components of the true features
of these clips: equal colours mean similar features.</p>{figures}</section>"""


def _table(horizons: Sequence[Mapping[str, Any]]) -> str:
    headings = {
        "error": "error",
        "persistence": "persistence",
        "shuffled_actions": "shuffled actions",
        "error_over_persistence": "error / persistence",
        "shuffled_over_error": "shuffled / error",
        "win_rate": "win rate",
        "win_rate_large_turns": "win rate, large turns",
    }
    head = "<tr><th>horizon</th>" + "".join(f"<th>{h}</th>" for h in headings.values()) + "</tr>"
    body = ""
    for figures in horizons:
        cells = "".join(f"<td>{_with_interval(figures, name)}</td>" for name in headings)
        body += f"<tr><th>{figures['horizon']}</th>{cells}</tr>"
    return f"<table>{head}{body}</table>"


def _interval(figures: Mapping[str, Any], name: str) -> Sequence[float] | None:
    return None if figures["ci95"] is None else figures["ci95"][name]


def _with_interval(figures: Mapping[str, Any], name: str) -> str:
    if figures[name] is None:
        return "–"
    interval = _interval(figures, name)
    bounds = "" if interval is None else f"<small>{interval[0]:.4f} – {interval[1]:.4f}</small>"
    return f"{figures[name]:.4f}{bounds}"


def verdict(metrics: Mapping[str, Any]) -> list[str]:
    """Two sentences computed from the figures: does the model beat persistence, and does it use its actions?

    A claim is made where the 95 % interval is on one side of the neutral value (1 for the ratio, 0.5 for the win
    rate); without intervals by the figure itself, and it is said so.
    """
    horizons = metrics["horizons"]
    beats = [_side(h, "error_over_persistence", 1.0) for h in horizons]
    wins = [_side(h, "win_rate", 0.5) for h in horizons]
    first, last = horizons[0], horizons[-1]
    examples = "; ".join(
        f"at horizon {h['horizon']} its error is {_quote(h, 'error_over_persistence')} times persistence's"
        for h in ([first] if first is last else [first, last])
    )
    persistence = f"Does it beat persistence? {_answer(beats, [-1, 1], horizons)} {examples[0].upper()}{examples[1:]}."
    large = ""
    if first["win_rate_large_turns"] is not None:
        large = f", and in {_quote(first, 'win_rate_large_turns')} of those whose turns differ clearly"
    actions = (
        f"Does it use its actions? {_answer(wins, [1, -1], horizons)} At horizon {first['horizon']} the true action "
        f"gives the smaller error in {_quote(first, 'win_rate')} of the pairs (chance 0.5){large}; with another clip's "
        f"actions the error is {_quote(first, 'shuffled_over_error')} times as large."
    )
    return [persistence, actions]


def _side(figures: Mapping[str, Any], name: str, neutral: float) -> int | None:
    """-1 below, 1 above, 0 undecided (the interval holds `neutral`); None where there is no figure."""
    if figures[name] is None:
        return None
    interval = _interval(figures, name)
    low, high = (figures[name], figures[name]) if interval is None else interval
    return 1 if low > neutral else -1 if high < neutral else 0


def _answer(sides: Sequence[int | None], good_and_bad: Sequence[int], horizons: Sequence[Mapping[str, Any]]) -> str:
    good, bad = ([h["horizon"] for h, s in zip(horizons, sides, strict=True) if s == side] for side in good_and_bad)
    if len(good) == len(horizons):
        return "Yes, at every horizon."
    if len(bad) == len(horizons):
        return "No: at every horizon it does worse."
    if not good and not bad:
        return "No difference can be told at any horizon."
    words = [f"{text} {_list(found)}" for text, found in (("better at", good), ("worse at", bad)) if found]
    rest = "; no difference can be told elsewhere" if len(good) + len(bad) < len(horizons) else ""
    return f"In part: {' and '.join(words)}{rest}."


def _list(horizons: Sequence[int]) -> str:
    return ("horizon " if len(horizons) == 1 else "horizons ") + ", ".join(str(h) for h in horizons)


def _quote(figures: Mapping[str, Any], name: str) -> str:
    if figures[name] is None:
        return "an unknown number of"
    interval = _interval(figures, name)
    bounds = "" if interval is None else f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})"
    return f"{figures[name]:.3f}{bounds}"


def retrieval_sentence(retrieval: Mapping[str, Any]) -> str:
    """How specific predictions one step ahead are (docs/evaluation.md, "Retrieval")."""
    return (
        f"Retrieval: among some {retrieval['group']} clips a prediction is nearest to its own clip's target in "
        f"{_quote(retrieval, 'top1')} of the cases, the last features of the context in "
        f"{_quote(retrieval, 'persistence_top1')}, chance in {retrieval['chance']:.3f}."
    )


def notes(metrics: Mapping[str, Any]) -> list[str]:
    """What a reader must know before trusting the verdict."""
    found = ["One training run: these intervals leave out how much runs differ (examples/run_seeds.py tells it)."]
    if metrics["sessions"] < 2:
        found.append("All clips are of one session: there are no intervals, and other sessions may differ.")
    elif metrics["interval_unit"] == "session":
        few = f", and {metrics['sessions']} sessions are few" if metrics["sessions"] < FEW_PLAYERS else ""
        found.append(
            f"Intervals are over sessions, because {metrics['players']} players are too few (fewer than "
            f"{FEW_PLAYERS}): they leave out how players differ, and come out too narrow{few}."
        )
    if metrics["future_states"] == "recorded":
        found.append(
            "The action space does not hold the turns, so rollouts were given the recorded states, which show the "
            "true turn whatever the actions: the figures for shuffled actions come out too mild."
        )
    if metrics["encoding"] == "clip":
        found.append(
            "The encoder saw each clip as a whole, so context features already know the future: these errors do not "
            "measure prediction."
        )
    return found
