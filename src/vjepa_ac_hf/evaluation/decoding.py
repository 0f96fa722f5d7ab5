"""How well frames can be told from features, and from imagined ones (docs/applications.md, "Frames")."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..actions_vjepa2_ac import ACTION_COLUMNS, wrap_degrees
from ..loading.clips import decode_clip
from ..modeling_heads_decoding_vjepa2_ac import VJEPA2ACForFrameDecoding
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from .clips import ClipRecords, check_head_fits
from .figures import LARGE_TURN_DEGREES
from .frame_figures import FRAME_FIGURES, aggregate_frames, require_torchmetrics
from .pictures import LAST_FRAME, MEAN_FRAME, MIRRORED, OTHER, PERSISTENCE, PREDICTION, TRUE
from .rollouts import StateIntegrator, roll_out, with_future

KINDS = ("decoded", MEAN_FRAME, LAST_FRAME)
ROLLOUT_KINDS = (TRUE, PREDICTION, OTHER, MIRRORED, PERSISTENCE, LAST_FRAME, MEAN_FRAME)


@torch.no_grad()
def evaluate_decoder(
    model: Any, batches: Iterable[dict[str, Any]], processor: VJEPA2ACProcessor, accelerator: Accelerator
) -> dict[str, Any]:
    """Loss, PSNR and SSIM of decoded true features over the clips of all processes, on each of them.

    The rows are tubelets but for each clip's first, which has no frame before it to copy. Beside what is decoded stand
    the mean frame of these clips and the last frame before the tubelet.

    Args:
        model: a `VJEPA2ACForFrameDecoding`, not wrapped.
        batches: of this process, with `frames` beside pixels or features (`ClipCollator(frames=True)`); gone through
            twice, the first time for the mean frame; every clip once over all processes.
        processor: gives the turns, where its action space holds them.
        accelerator: processes, device and precision.

    Returns:
        `clips`, `loss`, and `frames`: by `all` and `large_turns` (tubelets that more than `LARGE_TURN_DEGREES` of yaw
        led to; None where there are none or turns are not known) `rows` and by kind `psnr` and `ssim`.
    """
    mean = mean_frame(batches, model.config, accelerator)
    turn = processor.action_space.index("yaw_delta") if "yaw_delta" in processor.action_space else None
    tubelet = processor.tubelet_size
    training, parts = model.training, []
    model.eval()
    for batch in batches:
        frames = batch["frames"].to(accelerator.device)
        inputs = {k: batch[k].to(accelerator.device) for k in ("pixel_values_videos", "features") if k in batch}
        with accelerator.autocast():
            output = model(**inputs, labels=frames)
        true = as_unit(frames).unflatten(1, (-1, tubelet))
        told = {
            "decoded": output.frames.unflatten(1, (-1, tubelet))[:, 1:],
            MEAN_FRAME: mean.expand_as(true[:, 1:]),
            LAST_FRAME: true[:, :-1, -1:].expand_as(true[:, 1:]),
        }
        part: dict[str, Any] = {"loss": float(output.loss), "clips": len(frames)}
        for name, figure in FRAME_FIGURES.items():
            values = [figure(told[kind], true[:, 1:]).mean(dim=2).flatten() for kind in KINDS]
            part[name] = torch.stack(values, dim=1).double().cpu().numpy()
        actions = processor.denormalize_actions(batch["actions"].cpu())
        turned = actions[..., turn].abs().flatten().numpy() if turn is not None else np.zeros(len(part["psnr"]))
        parts.append({**part, "turned": turned})
    model.train(training)
    parts = gather_object(parts)
    clips = sum(p["clips"] for p in parts)
    rows = {k: np.concatenate([p[k] for p in parts]) for k in ("turned", *FRAME_FIGURES)}
    large = rows["turned"] > LARGE_TURN_DEGREES
    return {
        "clips": clips,
        "loss": sum(p["loss"] * p["clips"] for p in parts) / clips,
        "frames": {"all": _figures(rows, np.ones_like(large)), "large_turns": _figures(rows, large)},
    }


def _figures(rows: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, Any] | None:
    if not chosen.any():
        return None
    means = {name: rows[name][chosen].mean(axis=0).tolist() for name in FRAME_FIGURES}
    by_kind = {kind: {name: means[name][i] for name in means} for i, kind in enumerate(KINDS)}
    return {"rows": int(chosen.sum()), **by_kind}


def mean_frame(batches: Iterable[dict[str, Any]], config: Any, accelerator: Accelerator) -> Tensor:
    """Mean of all frames of all processes, `(3, Y, X)` in [0, 1], on the accelerator's device."""
    total = torch.zeros(3, *config.frame_shape, dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        frames = batch["frames"].cpu()
        total += frames.double().sum(dim=(0, 1))
        count += frames.shape[0] * frames.shape[1]
    total, count = (accelerator.reduce(t.to(accelerator.device), reduction="sum") for t in (total, count))
    return (total / count / 255).float()


def as_unit(frames: Tensor) -> Tensor:
    """uint8 frames as float32 in [0, 1]."""
    return frames.float() / 255


def load_decoder(name: str, model: VJEPA2ACModel) -> VJEPA2ACForFrameDecoding:
    """A saved decoder for a world model's features; it shares the model's encoder.

    Args:
        name: folder or Hub repository.
        model: the world model.

    Raises:
        ValueError: another kind of model, or a decoder over another encoder, with both values.
        ImportError: what the figures of its frames need is not installed.
    """
    require_torchmetrics()
    decoder = VJEPA2ACForFrameDecoding.from_pretrained(name)
    check_head_fits(decoder, model, f"{name}: the decoder")
    decoder.vjepa2_ac.encoder = model.encoder
    return decoder.to(model.device).eval()


def mirror_actions(actions: Tensor) -> Tensor:
    """Raw actions `(..., 38)` with left for right: mouse and yaw the other way, a and d exchanged."""
    mirrored = actions.clone()
    for column in ("mouse_dx", "yaw_delta"):
        mirrored[..., ACTION_COLUMNS.index(column)] *= -1
    left, right = (ACTION_COLUMNS.index(f"key.{key}") for key in "ad")
    mirrored[..., [left, right]] = actions[..., [right, left]]
    return mirrored


@torch.no_grad()
def evaluate_frames(
    model: VJEPA2ACModel,
    decoder: VJEPA2ACForFrameDecoding,
    processor: VJEPA2ACProcessor,
    dataset: Any,
    records: ClipRecords,
    *,
    partners: np.ndarray,
    context_steps: int,
    horizon: int,
    integrate_states: StateIntegrator | None,
    batch_size: int,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = list,
) -> dict[str, Any]:
    """PSNR and SSIM of decoded frames by horizon, for each of `ROLLOUT_KINDS` (docs/evaluation.md, "Frames").

    Args:
        model: a world model in eval mode.
        decoder: `load_decoder`'s.
        processor: makes frames, actions and states.
        dataset: rows with a column `video`, not decoded.
        records: the same clips' `read_records`.
        partners: `(clips,)`, the clip whose future actions each clip is given as other ones.
        context_steps: true steps C that the rollouts start from.
        horizon: steps H to predict.
        integrate_states: as in `roll_out`.
        batch_size: clips in a batch.
        seed: of the bootstrap.
        progress: wraps the batches' first rows.

    Returns:
        `psnr`, `ssim`, and of clips that have turned by more than `LARGE_TURN_DEGREES` since the context
        `psnr_large_turns` and `ssim_large_turns` (empty where there are none): what `aggregate_frames` returns, with
        `LAST_FRAME` and `MEAN_FRAME` as baselines.
    """
    C, last, tubelet = context_steps, context_steps + horizon, processor.tubelet_size
    inputs = processor(actions=records.actions, states=records.states)
    actions, states = inputs["actions"], inputs["states"]
    mirrored = processor.normalize_actions(mirror_actions(records.actions))
    starts = range(0, len(dataset), batch_size)
    clips = (dataset, records, processor)
    sums = [as_unit(frames).mean(dim=1).sum(dim=0) for _, frames in _clips(*clips, starts, batch_size)]
    mean = (torch.stack(sums).sum(dim=0) / len(dataset)).to(model.device)
    values: dict[str, list[Tensor]] = {name: [] for name in FRAME_FIGURES}
    for at, frames in _clips(*clips, progress(starts), batch_size):
        features = model.encode(processor.normalize_pixels(frames).to(model.device))
        imagined = {
            kind: roll_out(
                *(model, features, choice[:, : last - 1], states[at]),
                context_steps=C,
                integrate_states=integrate_states,
            )
            for kind, choice in (
                (PREDICTION, actions[at]),
                (OTHER, with_future(actions[at], actions[partners[at]], C)),
                (MIRRORED, with_future(actions[at], mirrored[at], C)),
            )
        }
        true = as_unit(frames.to(model.device)).unflatten(1, (-1, tubelet))
        target = true[:, C:last]
        shown = {TRUE: features[:, C:last], **imagined}
        told = {kind: decoder(features=f).frames.unflatten(1, (-1, tubelet)) for kind, f in shown.items()}
        persistence = decoder(features=features[:, C - 1 : C]).frames[:, None]
        told |= {PERSISTENCE: persistence.expand_as(target), MEAN_FRAME: mean.expand_as(target)}
        told |= {LAST_FRAME: true[:, C - 1 : C, -1:].expand_as(target)}
        for name, figure in FRAME_FIGURES.items():
            of = [figure(told[kind], target).mean(dim=2) for kind in ROLLOUT_KINDS]
            values[name].append(torch.stack(of, dim=-1).double().cpu())
    merged = {name: torch.cat(parts).flatten(0, 1).numpy() for name, parts in values.items()}
    return _by_horizon(merged, records, context_steps, horizon, seed)


def _by_horizon(
    values: dict[str, np.ndarray], records: ClipRecords, context_steps: int, horizon: int, seed: int
) -> dict[str, Any]:
    """What `evaluate_frames` returns, of each figure's `(clips * H, kinds)` numbers."""
    yaw_deltas = records.yaw_deltas[:, context_steps - 1 : context_steps - 1 + horizon]
    turns = wrap_degrees(yaw_deltas.double().cumsum(dim=1)).abs().flatten().numpy()
    clips = len(records.names)
    options: dict[str, Any] = {"kinds": ROLLOUT_KINDS, "baselines": (LAST_FRAME, MEAN_FRAME), "seed": seed}
    result: dict[str, Any] = {}
    for suffix, chosen in (("", np.ones_like(turns, dtype=bool)), ("_large_turns", turns > LARGE_TURN_DEGREES)):
        rows = {
            "session_id": np.repeat(np.asarray(records.sessions), horizon)[chosen],
            "player_id": np.repeat(np.asarray(records.players), horizon)[chosen],
            "horizon": np.tile(np.arange(1, horizon + 1), clips)[chosen],
        }
        for name, numbers in values.items():
            found = aggregate_frames({**rows, "values": numbers[chosen]}, **options) if chosen.any() else []
            result[name + suffix] = found
    return result


def _clips(
    dataset: Any, records: ClipRecords, processor: VJEPA2ACProcessor, starts: Iterable[int], batch_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Places and frames `(B, frames, 3, Y, X)`, uint8, of a data set's clips, batch by batch."""
    for start in starts:
        at = slice(start, min(start + batch_size, len(dataset)))
        videos = zip(dataset[start : at.stop]["video"], records.names[at], strict=True)
        yield at, processor.prepare_frames([decode_clip(v, name, processor.frames_per_clip) for v, name in videos])
