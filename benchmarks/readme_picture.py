"""The picture of the README: what happened, what is imagined, and what is imagined with turns the other way.

    python benchmarks/readme_picture.py --model demo/model --decoder demo/decoder --dataset demo/clips \
        --output docs/imagined.png

Of the validation clips that turn one way at all steps shown, by more than 10 degrees at the first two, the one in
the middle of their total turns is shown (or --clip): a rule, so that nobody has picked the best one.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from matplotlib.figure import Figure
from transformers import AutoModel, AutoProcessor

import vjepa_ac_hf  # noqa: F401 (registers the model with AutoModel and AutoProcessor)
from vjepa_ac_hf import ACTION_COLUMNS
from vjepa_ac_hf.evaluation.decoding import load_decoder, mirror_actions

CONTEXT, STEPS, YAW = 2, 4, ACTION_COLUMNS.index("yaw_delta")
ROWS = ("what happened", "imagined:\nthe actions taken", "imagined:\nturns mirrored")


def choose_clip(turns: np.ndarray) -> int:
    """Row of `turns` (clips, imagined steps), degrees, by the rule above."""
    one_way = (np.abs(np.sign(turns).sum(axis=1)) == turns.shape[1]) & (np.abs(turns[:, :2]) > 10).all(axis=1)
    rows = np.flatnonzero(one_way)
    if not len(rows):
        raise SystemExit("no validation clip turns one way all the time; choose one with --clip")
    return int(rows[np.argsort(np.abs(turns[rows].sum(axis=1)), kind="stable")[len(rows) // 2]])


@torch.no_grad()
def rows_of_frames(model: Any, processor: Any, decoder: Any, clip: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """First frames of tubelets (3 rows, C + STEPS, Y, X, 3) in [0, 1], and the turns between them, degrees."""
    taken = torch.tensor(np.asarray(clip["actions"]))[None, : CONTEXT + STEPS - 1]
    mirrored = torch.cat([taken[:, : CONTEXT - 1], mirror_actions(taken)[:, CONTEXT - 1 :]], dim=1)
    seen = processor(videos=[clip["video"]], states=[clip["states"]])
    features = model.encode(seen["pixel_values_videos"])
    true = processor.prepare_frames([clip["video"]])[0, :: processor.tubelet_size].movedim(1, 3).numpy() / 255
    true = true[: CONTEXT + STEPS]
    found = [true]
    for raw in (taken, mirrored):
        actions = processor(actions=raw)["actions"]
        states = processor.integrate_states(seen["states"][:, :CONTEXT], actions)
        imagined = decoder(features=model.rollout(features[:, :CONTEXT], actions, states)).frames[0]
        later = imagined[:: processor.tubelet_size].movedim(1, 3).numpy()
        found.append(np.concatenate([true[:CONTEXT], later]))
    return np.stack(found), taken[0, :, YAW].numpy()


def draw(frames: np.ndarray, turns: np.ndarray, output: Path) -> None:
    steps = frames.shape[1]
    height, width = frames.shape[2:4]
    figure = Figure(figsize=(1.15 + 1.0 * steps, 0.32 + 3.05 * height / width))
    axes = figure.subplots(3, steps, squeeze=False)
    for row in range(3):
        for step in range(steps):
            panel = axes[row, step]
            panel.set_xticks([])
            panel.set_yticks([])
            if row and step < CONTEXT:  # the same for all
                panel.axis("off")
            else:
                panel.imshow(frames[row, step], interpolation="bicubic", vmin=0, vmax=1)
            if row == 0:
                turn = round(float(turns[step - 1]))
                side = " right" if turn > 0 else " left" if turn < 0 else ""
                panel.set_title("seen" if step < CONTEXT else f"{abs(turn)}°{side}", fontsize=8, pad=3)
        first = axes[row, 0 if row == 0 else CONTEXT]
        place = (-0.08, 0.5)
        first.text(*place, ROWS[row], transform=first.transAxes, fontsize=8, ha="right", va="center")
    figure.subplots_adjust(left=1.1 / (1.15 + steps), right=0.995, bottom=0.01, top=0.92, wspace=0.03, hspace=0.03)
    figure.savefig(output, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or repository of a world model")
    parser.add_argument("--decoder", required=True, help="folder or repository of a frame decoder over its encoder")
    parser.add_argument("--dataset", required=True, help="folder or repository of clips")
    parser.add_argument("--output", required=True, type=Path, help="PNG file")
    parser.add_argument("--clip", type=int, help="row of the validation split (default: by the rule)")
    arguments = parser.parse_args()
    model, processor = AutoModel.from_pretrained(arguments.model).eval(), AutoProcessor.from_pretrained(arguments.model)
    decoder = load_decoder(arguments.decoder, model)
    clips = load_dataset(arguments.dataset, split="validation")
    turns = np.array(clips["actions"])[:, CONTEXT - 1 :, YAW][:, :STEPS]
    row = choose_clip(turns) if arguments.clip is None else arguments.clip
    draw(*rows_of_frames(model, processor, decoder, clips[row]), arguments.output)
    print(f"clip {row} of {len(clips)}: {clips[row]['recording_id']}, tick {clips[row]['start_tick']}")


if __name__ == "__main__":
    main()
