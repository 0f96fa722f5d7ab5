"""Model cards: what a model is, how it was trained, and its figures as the Hub lists them (`model-index`)."""

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from ..configuration_encoder_vjepa2_ac import EncoderFields
from ..configuration_vjepa2_ac import VJEPA2ACConfig
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from ..records import versions
from ..training.health import SPEED
from ..training.run_log import jsonable

# Figures of a horizon in metrics.json (docs/evaluation.md) that a card names: key, type of the metric, name.
_HORIZON_FIGURES = (
    ("error", "mae", "mean absolute difference"),
    ("persistence", "mae", "mean absolute difference of persistence"),
    ("error_over_persistence", "ratio", "error over persistence"),
    ("shuffled_over_error", "ratio", "error with shuffled actions over error"),
    ("win_rate", "accuracy", "win rate of the true action"),
    ("win_rate_large_turns", "accuracy", "win rate of the true action, large turns"),
)
# What figures were measured on, as metrics.json names it (metrics.jsonl: with validation_ before).
_COUNTS = ("clips", "sessions", "players", "interval_unit")
_HEADLINES = ("error", "error_over_persistence", "shuffled_over_error")
# Training's own validation (docs/evaluation.md, "During training") has them in its rows under these names, by horizon.
_VALIDATION_FIGURE = re.compile(r"validation_(error|persistence|persistence_ratio|shuffled_ratio|win_rate)_h(\d+)")
_SENSITIVITY = re.compile(r"validation_sensitivity_(\w+?)(?<!_pairs)")
_VALIDATION_NAMES = {"persistence_ratio": "error_over_persistence", "shuffled_ratio": "shuffled_over_error"}


@dataclass(frozen=True)
class RunDescription:
    """What a card says of a run, but for the step it is written at.

    Attributes:
        template: of the card, in Jinja (model_cards/model_card.md).
        repo_id: ORG/NAME, or the folder of a model that is not pushed.
        config, processor: the model's.
        parameters: number of parameters of `encoder` and `predictor`.
        training: `arguments`, `encoder` (where its weights come from), `clips_per_step`, `num_processes`, `versions`.
    """

    template: Path
    repo_id: str
    config: VJEPA2ACConfig
    processor: VJEPA2ACProcessor
    parameters: dict[str, int]
    training: dict[str, Any]

    @classmethod
    def of_run(
        cls,
        template: Path,
        arguments: argparse.Namespace,
        model: VJEPA2ACModel,
        processor: VJEPA2ACProcessor,
        encoder: str,
        num_processes: int,
    ) -> "RunDescription":
        """Of a run that begins; `model` is whole, not in shards."""
        parts = {"encoder": model.encoder, "predictor": model.predictor}
        per_process = arguments.per_device_batch_size * arguments.gradient_accumulation_steps
        training = {
            "arguments": jsonable(vars(arguments)),
            "encoder": "random weights" if encoder == "random" else encoder,
            "clips_per_step": per_process * num_processes,
            "num_processes": num_processes,
            "versions": versions(),
        }
        parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        repo_id = arguments.hub_model_id or str(arguments.output_dir)
        config = cast(VJEPA2ACConfig, model.config)
        return cls(template, repo_id, config, processor, parameters, training)

    @classmethod
    def of_folder(cls, template: Path, folder: Path, repo_id: str) -> "RunDescription":
        """Of a model that a run has left.

        Raises:
            ValueError: the folder holds no model of `examples/train.py`; names the file that is missing.
        """
        for name in ("config.json", "model.safetensors", "training_args.json"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing: the folder holds no model of examples/train.py")
        parameters = {"encoder": 0, "predictor": 0}
        with safe_open(folder / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = name.split(".")[0]
                parameters[part] = parameters.get(part, 0) + math.prod(file.get_slice(name).get_shape())
        config, processor = VJEPA2ACConfig.from_pretrained(folder), VJEPA2ACProcessor.from_pretrained(folder)
        training = json.loads((folder / "training_args.json").read_text())
        return cls(template, repo_id, config, processor, parameters, training)

    @property
    def dataset(self) -> str:
        return self.training["arguments"]["dataset"]

    def training_args(self, step: int) -> dict[str, Any]:
        """The content of training_args.json."""
        return {**self.training, "step": step}

    def card(self, step: int, metrics: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> ModelCard:
        """The card of the model of a step.

        Args:
            step: optimizer steps done.
            metrics: last row of metrics.jsonl; its validation figures are the results where there is no evaluation.
            evaluation: metrics.json of `examples/evaluate.py`.

        Raises:
            ValueError: an evaluation without figures.
        """
        model_name = self.repo_id.rstrip("/").split("/")[-1]
        if evaluation is None:
            counts = {name: metrics.get(f"validation_{name}") for name in _COUNTS}
            figures = {
                **counts,
                "dataset": self.dataset,
                "split": "validation",
                "horizons": validation_horizons(metrics),
            }
            headlines = validation_headlines(metrics)
        else:
            headlines = []
            figures = {**evaluation, "horizons": [horizon_figures(row) for row in evaluation.get("horizons", ())]}
            if not figures["horizons"]:
                raise ValueError("the evaluation has no horizons: expected metrics.json of examples/evaluate.py")
        is_repository = not Path(self.dataset).exists()
        data = ModelCardData(
            library_name="transformers",
            license="apache-2.0",
            tags=["vjepa2", "world-model", "action-conditioned", "vpt", "vjepa-ac-hf"],
            datasets=[self.dataset] if is_repository else None,
            base_model=self.training["encoder"] if is_repository_name(self.training["encoder"]) else None,
            eval_results=model_index(figures, headlines) or None,
            model_name=model_name,
        )
        arguments = self.training["arguments"]
        return ModelCard.from_template(
            data,
            template_path=str(self.template),
            model_name=model_name,
            repo_id=self.repo_id,
            config=self.config,
            processor=self.processor,
            is_v21=EncoderFields.of(self.config.encoder_config).is_v21,
            dataset=self.dataset,
            encoder=self.training["encoder"],
            encoder_parameters=self.parameters["encoder"],
            predictor_parameters=self.parameters["predictor"],
            step=step,
            max_steps=arguments["max_steps"],
            clips_per_step=self.training["clips_per_step"],
            recipe={k: arguments[k] for k in ("learning_rate", "weight_decay", "mixed_precision", "seed")},
            metrics={k: v for k, v in metrics.items() if is_figure(k, v)},
            headlines=[(name, value) for _, name, value in headlines],
            is_evaluated=evaluation is not None,
            figures=figures,
            arguments=json.dumps(arguments, indent=2),
            versions=", ".join(f"{k} {v}" for k, v in self.training["versions"].items()),
        )


def is_repository_name(name: str) -> bool:
    """A name like facebook/vjepa2-vitl-fpc64-256, and no folder of that name."""
    return name.count("/") == 1 and " " not in name and not name.startswith(("/", ".")) and not Path(name).exists()


def is_figure(name: str, value: Any) -> bool:
    """Whether a logged value is for the list on the card: finite, of training; no speed, nothing of a validation."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return is_number and name not in SPEED | {"step", "learning_rate"} and not name.startswith("validation_")


def validation_headlines(metrics: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """What a card names of training's own validation beside the horizons: type of the metric, name, value."""
    found = []
    for key, value in metrics.items():
        if isinstance(value, (int, float)) and math.isfinite(value):
            if match := _SENSITIVITY.fullmatch(key):
                found.append(("ratio", f"sensitivity to actions, {match[1]}", value))
            elif key == "validation_retrieval_top1":
                found.append(("accuracy", "retrieval top-1", value))
    return found


def horizon_figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """A horizon of metrics.json with its ratios; a figure that could not be measured is None."""

    def ratio(over: str, under: str) -> float | None:
        return row[over] / row[under] if row.get(over) is not None and row.get(under) else None

    ratios = {
        "error_over_persistence": ratio("error", "persistence"),
        "shuffled_over_error": ratio("shuffled_actions", "error"),
    }
    return {**dict.fromkeys(key for key, _, _ in _HORIZON_FIGURES), **ratios, **row}


def validation_horizons(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same from a row of metrics.jsonl; empty where nothing was validated."""
    rows: dict[int, dict[str, Any]] = {}
    for name, value in metrics.items():
        if match := _VALIDATION_FIGURE.fullmatch(name):
            key, horizon = _VALIDATION_NAMES.get(match[1], match[1]), int(match[2])
            rows.setdefault(horizon, {"horizon": horizon})[key] = value
    missing = dict.fromkeys(key for key, _, _ in _HORIZON_FIGURES)
    return [{**missing, **rows[horizon]} for horizon in sorted(rows)]


def model_index(figures: Mapping[str, Any], headlines: Sequence[tuple[str, str, float]] = ()) -> list[EvalResult]:
    """The headline figures as the Hub lists them; those that could not be measured are left out.

    Error, error over persistence and shuffled over error of every horizon, then `headlines`; all else stays in
    metrics.jsonl and evaluation/metrics.json.
    """
    dataset, split = str(figures.get("dataset") or "unknown"), figures.get("split") or "validation"
    arguments = {k: figures[k] for k in ("context_steps", *_COUNTS) if figures.get(k) is not None}
    results = []
    for row in figures["horizons"]:
        for key, kind, name in _HORIZON_FIGURES:
            if key in _HEADLINES and row.get(key) is not None:
                metric = (kind, f"{name}, horizon {row['horizon']}")
                results.append(_result(dataset, split, metric, row[key], {"horizon": row["horizon"], **arguments}))
    results += [_result(dataset, split, (kind, name), value, arguments) for kind, name, value in headlines]
    return results


def _result(dataset: str, split: str, metric: tuple[str, str], value: float, arguments: dict) -> EvalResult:
    return EvalResult(
        task_type="other",
        task_name="Prediction of features from actions",
        dataset_type=dataset if is_repository_name(dataset) else "vpt_tubelets",
        dataset_name=dataset.rstrip("/").split("/")[-1],
        dataset_split=split,
        metric_type=metric[0],
        metric_name=metric[1],
        metric_value=round(float(value), 6),
        metric_args=arguments,
    )
