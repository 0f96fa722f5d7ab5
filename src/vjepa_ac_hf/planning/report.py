"""What a plan expects beside what then happens: pictures of episodes, and the page of them (docs/planning.md)."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..actions_vjepa2_ac import ACTION_COLUMNS
from ..pages import PAGE_STYLE, image_tag, new_figure

YAW = ACTION_COLUMNS.index("yaw_delta")


@dataclass
class Story:
    """An episode of a planner, frame by frame.

    Attributes:
        goal: `(Y, X, 3)`, uint8.
        seen: frames `(Y, X, 3)`, uint8: at the beginning, and after each step.
        degrees: to the goal, for each of them.
        expected: after each step, what its plan had expected to see: `(Y, X, 3)` in [0, 1], of any size.
        actions: of each step, raw `(38,)`.
    """

    goal: np.ndarray
    seen: list[np.ndarray] = field(default_factory=list)
    degrees: list[float] = field(default_factory=list)
    expected: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)


def story_png(story: Story) -> bytes:
    """By step: the frame that was seen, below it the one that the plan had expected; the goal at the end."""
    if not len(story.seen) - 1 == len(story.expected) == len(story.actions) == len(story.degrees) - 1:
        raise ValueError(
            f"a story has one frame and distance more than steps, found {len(story.seen)} frames, {len(story.degrees)} "
            f"distances, {len(story.expected)} expected frames and {len(story.actions)} actions"
        )
    columns = len(story.seen) + 1
    height, width = story.goal.shape[:2]
    figure = new_figure(1.5 * columns + 0.6, 2 * 1.5 * height / width + 1.1)
    grid = figure.subplots(2, columns, squeeze=False)
    pictures: list[list[Any]] = [[*story.seen, story.goal], [None, *story.expected, None]]
    for row, (axes_row, images) in enumerate(zip(grid, pictures, strict=True)):
        for axes, image in zip(axes_row, images, strict=True):
            axes.set(xticks=[], yticks=[])
            if image is None:
                axes.axis("off")
            else:
                axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, width, 0, height))
        axes_row[row].set_ylabel(("what happens", "what the plan\nexpected")[row], fontsize=8)
    for step, degrees in enumerate(story.degrees):
        grid[0][step].set_title(f"{'step ' + str(step) if step else 'start'}: {degrees:.1f}° to go", fontsize=8)
    for step, action in enumerate(story.actions):
        grid[1][step + 1].set_xlabel(f"turn {action[YAW]:+.1f}°", fontsize=8)
    grid[0][-1].set_title("goal", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def planning_page(title: str, agents: Mapping[str, Mapping[str, Any]], files: Mapping[str, Path]) -> str:
    """The page of a planning run, without outside resources.

    Args:
        title: what was planned with.
        agents: figures by agent (`envs.episodes.summarize`).
        files: PNGs by caption; one of them is of all episodes.
    """
    names = {
        "success_rate": "success rate",
        "episodes": "episodes",
        "steps": "steps",
        "start_degrees": "degrees at the start",
        "final_degrees": "degrees at the end",
    }
    head = "".join(f"<th>{name}</th>" for name in ("agent", *names.values()))
    rows = "".join(
        f"<tr><th>{html.escape(agent)}</th>{''.join(f'<td>{_cell(figures, name)}</td>' for name in names)}</tr>"
        for agent, figures in agents.items()
    )
    shown = "".join(
        f"<figure>{image_tag(base64.b64encode(file.read_bytes()).decode(), caption)}"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, file in files.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{PAGE_STYLE}</style></head><body><main><h1>{html.escape(title)}</h1>
<section><h2>Episodes</h2><div class="scroll"><table><tr>{head}</tr>{rows}</table></div></section>
<section><h2>What the plan expects, and what happens</h2><p class="facts">Expected frames are drawn by a decoder from
the features that the chosen action was to lead to. The first successes and the first failures of the
planner.</p>{shown}</section></main></body></html>
"""


def _cell(figures: Mapping[str, Any], name: str) -> str:
    if name == "success_rate":
        low, high = figures["success_rate_ci95"]
        return f"{100 * figures[name]:.1f} %<small>{100 * low:.1f} – {100 * high:.1f}</small>"
    return f"{figures[name]:.0f}" if name == "episodes" else f"{figures[name]:.1f}"


def first_of_both(successes: Mapping[Any, bool], most: int) -> Sequence[Any]:
    """The first `most` keys whose value is true and the first `most` whose value is false, in their order."""
    kept = {outcome: [key for key, won in successes.items() if won == outcome][:most] for outcome in (True, False)}
    return [key for key in successes if key in kept[successes[key]]]
