"""Validation during training, over all processes: losses, errors by horizon, use of the actions, retrieval.

The rollouts are those of examples/evaluate.py (docs/evaluation.md, "During training"). Letters: B batch, T steps,
C context steps, H horizons, N frame tokens a step, D encoder width, A action columns.
"""

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..evaluation import probes, rollouts
from ..evaluation.clips import read_records
from ..evaluation.figures import BOOTSTRAP_DRAWS, aggregate_rows, table_rows, unit_counts
from ..loading.clips import ClipCollator
from ..loading.loader import worker_options
from ..loading.streaming import ClipRows
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor

logger = logging.getLogger(__name__)

CONTEXT_STEPS = 2
SHUFFLES = 1
SHUFFLE_SEED = 0

_LOSSES = ("loss", "teacher_forcing_loss", "rollout_loss", "error", "persistence")
_ERRORS = ("error", "persistence", "shuffled", "error_mse", "persistence_mse", "shuffled_mse")
_ROLLOUT = "rollout/"  # keeps the columns of `_ERRORS` apart from those of teacher forcing
_RETRIEVAL = ("hit", "persistence_hit")
# Names in metrics.jsonl of the figures by horizon.
_BY_HORIZON = {
    "error": "error",
    "persistence": "persistence",
    "error_over_persistence": "persistence_ratio",
    "shuffled_over_error": "shuffled_ratio",
    "win_rate": "win_rate",
}


class ValidationSet:
    """The clips to validate on, this process's share of them, and which clips are compared with which.

    Shares are whole retrieval groups, so that candidates lie on one process; partners are drawn for all clips at once.
    Neither depends on the number of processes or the batch size.

    Args:
        clips: rows for `ClipCollator`: `source`, or `source` with cached features.
        source: the clips with their videos, left encoded.
        processor: makes the tensors.
        accelerator: its process number and device.
        batch_size, num_workers, prefetch_factor: of the loader.

    Raises:
        ValueError: fewer than two clips, or clips of another length (the message names the first).
    """

    def __init__(
        self,
        clips: Any,
        source: Dataset | ClipRows,
        processor: VJEPA2ACProcessor,
        accelerator: Accelerator,
        *,
        batch_size: int,
        num_workers: int = 0,
        prefetch_factor: int = 2,
    ):
        self.source, self.processor, self.batch_size = source, processor, batch_size
        self.records = read_records(source, processor)
        inputs = processor(actions=self.records.actions, states=self.records.states)
        self.actions, self.states = inputs["actions"], inputs["states"]
        steps = self.states.shape[1]
        self.context_steps = min(CONTEXT_STEPS, steps - 1)
        self.horizon = steps - self.context_steps
        self.units = unit_counts(self.records.sessions, self.records.players)
        self.integrate_states = rollouts.state_integrator(processor)
        self.partners = rollouts.derangements(len(self), SHUFFLES, torch.Generator().manual_seed(SHUFFLE_SEED))
        self.column_groups = probes.column_groups(processor.action_space)
        self.groups = probes.retrieval_groups(len(self), probes.RETRIEVAL_GROUP)
        self.horizons: list[dict[str, Any]] = []  # figures by horizon of the last validation, for pictures
        self.announced: set[str] = set()  # warnings that were given

        self.share = self.groups[accelerator.process_index :: accelerator.num_processes]
        rows = [row for group in self.share for row in group]
        self.batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        self._loader = DataLoader(
            clips,
            batch_sampler=self.batches,
            collate_fn=ClipCollator(processor),
            pin_memory=accelerator.device.type == "cuda",
            # Every pass draws a seed for its workers, not to be taken from the model's generator.
            generator=torch.Generator(),
            **worker_options(num_workers, prefetch_factor),
        )

    @property
    def identity(self) -> str:
        """Of these clips and no others: figures on other ones are not compared with theirs."""
        return hashlib.sha256("\n".join(self.records.names).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.records.names)

    def __iter__(self) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Row numbers and batches of this process."""
        return zip(self.batches, self._loader, strict=True)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """In eval mode meanwhile; then in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def validate(model: VJEPA2ACModel, clips: ValidationSet, accelerator: Accelerator) -> dict[str, Any]:
    """Figures over the clips of all processes, every clip once; the same on every process.

    The model's mode and the random generators are left as they were. A sharded model must be whole meanwhile
    (`whole_parameters`): processes run different numbers of batches.

    Returns:
        Flat names and numbers, as metrics.jsonl has them (docs/evaluation.md, "During training"). A figure without data
        or of values that are not finite is None, and `validation_null_reason` says why.
    """
    with evaluating(model):
        columns = _measure(model, clips, accelerator)
    seen = columns.pop("seen")
    if not bool((seen == 1).all()):
        wrong = int((seen != 1).nonzero()[0])
        raise RuntimeError(f"{clips.records.names[wrong]} was validated {int(seen[wrong])} times instead of once")
    losses = {n: columns[n].double().mean().item() for n in _LOSSES}
    figures: dict[str, Any] = {"validation_clips": len(clips), **{f"validation_{n}": v for n, v in clips.units.items()}}
    figures |= {f"validation_{n}": v for n, v in losses.items()}
    ratio = losses["error"] / losses["persistence"] if losses["persistence"] else None
    figures["validation_error_over_persistence"] = ratio
    figures |= _horizon_figures(clips, columns)
    figures |= _sensitivity_figures(clips, columns)
    candidates = np.concatenate([np.full(len(group), len(group)) for group in clips.groups])
    found = probes.aggregate_retrieval({**{n: columns[n].numpy() for n in _RETRIEVAL}, "candidates": candidates})
    figures |= {f"validation_retrieval_{name}": found[name] for name in ("top1", "persistence_top1", "chance")}
    return _explain_nulls(clips, columns, figures, accelerator.is_main_process)


def _measure(model: VJEPA2ACModel, clips: ValidationSet, accelerator: Accelerator) -> dict[str, Tensor]:
    """Every column `(clips, ...)` of all clips: each process fills its own rows, which are 0 on the others."""
    by_horizon = [f"{group}/{n}" for group in clips.column_groups for n in ("differs", "change", "exchanged_error")]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("seen", *_LOSSES, *_RETRIEVAL), ())
    shapes |= dict.fromkeys((*(_ROLLOUT + n for n in _ERRORS), *by_horizon), (clips.horizon,))
    shapes |= dict.fromkeys((_ROLLOUT + n for n in _ERRORS if "shuffled" in n), (SHUFFLES, clips.horizon))
    columns = {name: torch.zeros(len(clips), *shape) for name, shape in shapes.items()}
    retrieval = probes.Retrieval(clips.share, clips.context_steps)
    total, quiet = len(clips.batches), not accelerator.is_main_process
    for rows, batch in tqdm(clips, total=total, desc="validating", unit="batch", leave=False, disable=quiet):
        with accelerator.autocast():
            values = _measure_batch(model, clips, rows, batch, accelerator.device, retrieval)
        for name, value in values.items():
            columns[name][rows] = value
        columns["seen"][rows] += 1
    own = [row for group in clips.share for row in group]
    for name in _RETRIEVAL:
        columns[name][own] = torch.tensor(retrieval.rows[name])
    # Sums of one number and zeros are exact: the figures do not depend on the number of processes.
    return {name: accelerator.reduce(c.to(accelerator.device), reduction="sum").cpu() for name, c in columns.items()}


def _measure_batch(
    model: VJEPA2ACModel,
    clips: ValidationSet,
    rows: list[int],
    batch: dict[str, Any],
    device: torch.device,
    retrieval: probes.Retrieval,
) -> dict[str, Tensor]:
    """Columns of a batch; what is retrieved goes to `retrieval`.

    A clip is encoded once. The rollouts: its own actions, a partner's, and a partner's columns group by group.
    """
    inputs = {k: v.to(device) for k, v in batch.items() if k != "clips"}
    assert torch.equal(batch["actions"], clips.actions[rows]), "cached clips are in another order than their source"
    features = inputs["features"] if "features" in inputs else model.encode(inputs["pixel_values_videos"])
    output = model(features=features, actions=inputs["actions"], states=inputs["states"])
    target = output.target_features.float()
    values = {
        **{name: output[name].float().cpu() for name in ("loss", "teacher_forcing_loss", "rollout_loss")},
        "error": (output.predicted_features.float() - target[:, 1:]).abs().mean(dim=(1, 2, 3)).cpu(),
        "persistence": (target[:, :-1] - target[:, 1:]).abs().mean(dim=(1, 2, 3)).cpu(),
    }
    rollout = {"context_steps": clips.context_steps, "integrate_states": clips.integrate_states}
    states = clips.states[rows]
    choices = rollouts.action_choices(clips.actions, rows, clips.partners, clips.context_steps, clips.horizon)
    errors, prediction = rollouts.batch_errors(model, target, choices, states, **rollout)
    values |= {f"{_ROLLOUT}{name}": value for name, value in errors.items()}
    for group, places in clips.column_groups.items():
        changes = probes.sensitivity_errors(
            *(model, target, prediction, choices[0], choices[1], states, places), **rollout
        )
        values |= {f"{group}/{name}": value for name, value in changes.items()}
    retrieval.add(target, prediction)
    return values


def _horizon_figures(clips: ValidationSet, columns: dict[str, Tensor]) -> dict[str, Any]:
    """Figures by horizon as examples/evaluate.py has them; all None at a horizon with a value that is not finite."""
    errors = {name: columns[_ROLLOUT + name] for name in _ERRORS}
    table = rollouts.rollout_table(
        errors,
        clips.partners,
        sessions=clips.records.sessions,
        players=clips.records.players,
        context_steps=clips.context_steps,
        integrate_states=clips.integrate_states,
        yaw_deltas=clips.records.yaw_deltas,
    )
    finite = torch.stack([e.isfinite().flatten(0, -2).all(dim=0) for e in errors.values()]).all(dim=0)
    # One session gives no intervals, which `aggregate_rows` would warn of at every validation.
    draws = BOOTSTRAP_DRAWS if clips.units["sessions"] > 1 else 0
    clips.horizons = aggregate_rows(table_rows(table), draws=draws)
    figures: dict[str, Any] = {}
    for h, known in zip(clips.horizons, finite.tolist(), strict=True):
        if not known:  # comparisons with NaN are false: win rates would come out as if pairs had been lost
            h.update(dict.fromkeys([*_BY_HORIZON, "shuffled_actions", "win_rate_large_turns", "ci95"]))
        figures |= {f"validation_{name}_h{h['horizon']}": h[key] for key, name in _BY_HORIZON.items()}
    return figures


def _sensitivity_figures(clips: ValidationSet, columns: dict[str, Tensor]) -> dict[str, Any]:
    own = {name: columns[_ROLLOUT + name].flatten().numpy() for name in ("error", "persistence")}
    figures: dict[str, Any] = {}
    for group in clips.column_groups:
        changes = {n: columns[f"{group}/{n}"].flatten().numpy() for n in ("differs", "change", "exchanged_error")}
        rows: dict[str, Any] = {"group": [group] * len(own["error"]), **own, **changes}
        found = probes.aggregate_sensitivity(rows)[group]
        figures[f"validation_sensitivity_{group}"] = found["sensitivity"]
        figures[f"validation_shuffled_ratio_{group}"] = found["exchanged_over_error"]
        figures[f"validation_sensitivity_{group}_pairs"] = found["pairs"]
    return figures


def _explain_nulls(
    clips: ValidationSet, columns: dict[str, Tensor], figures: dict[str, Any], announce: bool
) -> dict[str, Any]:
    """`figures` with None for what is not finite, and with the reasons where there is None."""
    figures = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in figures.items()}
    # A loss is its batch's: only the other columns tell which clip it was.
    measured = [v.reshape(len(clips), -1) for name, v in columns.items() if not name.endswith("loss")]
    bad = ~torch.cat(measured, dim=1).isfinite().all(dim=1)
    alike = [g for g in clips.column_groups if figures[f"validation_sensitivity_{g}_pairs"] == 0]
    causes: dict[str, list[str]] = {}
    for name in (name for name, value in figures.items() if value is None):
        group = name.removeprefix("validation_sensitivity_").removeprefix("validation_shuffled_ratio_")
        if group in alike:
            cause = f"no clip's {group} columns differ from its partner's"
        elif bad.any():
            first = clips.records.names[int(bad.nonzero()[0])]
            cause = f"values of {int(bad.sum())} of {len(clips)} clips are not finite, first of {first}"
        else:
            cause = "the error to divide by is 0"
        causes.setdefault(cause, []).append(name)
    if causes:
        reason = "; ".join(f"{cause} ({', '.join(names)})" for cause, names in causes.items())
        figures["validation_null_reason"] = reason
        if announce and reason not in clips.announced:
            clips.announced.add(reason)
            logger.warning("validation figures without a value: %s", reason)
    return figures
