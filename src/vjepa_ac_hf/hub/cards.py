"""What the Hub is told of a model beside its weights: the card, its figures as the Hub lists them (`model-index`), and
records of the run. All figures are of the very weights beside them, and nothing names a folder of the machine."""

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_encoder_vjepa2_ac import EncoderFields
from ..configuration_vjepa2_ac import VJEPA2ACConfig
from ..evaluation.controllability import card_figures
from ..evaluation.runs import card_rows, count, folder_of
from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor
from ..records import tensor_digests, tensors_of, versions, weights_digest
from ..training.health import SPEED
from .upload import read_json

# Figures of a horizon that a card names: key in metrics.json (docs/evaluation.md), type of the metric, name, and how
# training's own validation calls it in its rows.
_FIGURES = (
    ("error", "mae", "mean absolute difference", "error"),
    ("error_over_persistence", "ratio", "error over persistence", "persistence_ratio"),
    ("shuffled_over_error", "ratio", "error with shuffled actions over error", "shuffled_ratio"),
)
# What figures were measured on, as metrics.json names it (metrics.jsonl: with validation_ before).
_COUNTS = ("clips", "sessions", "players", "interval_unit")
RETRIEVAL = "retrieval top-1"
PICTURE = "clip-0.png"  # of an evaluation with a decoder: its first clip as frames
_ERROR = re.compile(r"validation_error_h(\d+)")
_SENSITIVITY = re.compile(r"validation_sensitivity_(\w+?)(?<!_pairs)")
# Arguments of training that others need to train the same; the rest is the machine's, and may name its folders.
_PUBLISHED = (
    *("dataset", "action_space", "action_stats", "resize_mode", "streaming", "shuffle_buffer", "cache_dtype"),
    *("model_config", "encoder", "frame_size", "init_predictor", "auto_steps", "loss_type", "max_steps"),
    *("per_device_batch_size", "gradient_accumulation_steps", "global_batch_size"),
    *("learning_rate", "start_learning_rate", "final_learning_rate", "warmup_steps", "decay_steps"),
    *("weight_decay", "max_grad_norm", "ema_decay", "mixed_precision", "seed"),
    *("eval_every", "eval_clips", "clip_rule", "hub_model_id", "hub_private"),
)


@dataclass(frozen=True)
class RunDescription:
    """What a card says of a run, but for the step it is written at."""

    template: Path  # of the card, in Jinja (model_cards/model_card.md)
    repo_id: str  # ORG/NAME, or the name of the folder of a model that is not pushed
    config: VJEPA2ACConfig
    processor: VJEPA2ACProcessor
    parameters: dict[str, int]  # number of them in `encoder` and `predictor`
    # `arguments` (those that others need), `encoder` (where its weights come from), `clips_per_step`, `num_processes`,
    # `versions`.
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
        per_process = arguments.per_device_batch_size * arguments.gradient_accumulation_steps
        training = {
            "arguments": published_arguments(vars(arguments)),
            "encoder": "random weights" if encoder == "random" else public_name(encoder),
            "clips_per_step": per_process * num_processes,
            "num_processes": num_processes,
            "versions": versions(),
        }
        parts = {"encoder": model.encoder, "predictor": model.predictor}
        parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        repo_id = arguments.hub_model_id or Path(arguments.output_dir).name
        return cls(template, repo_id, cast(VJEPA2ACConfig, model.config), processor, parameters, training)

    @classmethod
    def of_folder(cls, template: Path, folder: Path, repo_id: str) -> "RunDescription":
        """Of a model that a run has left; `training` has its step, digest and time too.

        Raises:
            ValueError: the folder holds no model of `examples/train.py` (names the file that is missing), or other
                weights than training_args.json says.
        """
        for name in ("config.json", "model.safetensors", "training_args.json"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing: the folder holds no model of examples/train.py")
        training = json.loads((folder / "training_args.json").read_text())
        parameters, digests = {"encoder": 0, "predictor": 0}, dict[str, str]()
        for name, tensor in tensors_of(folder / "model.safetensors"):
            parameters[name.split(".")[0]] += tensor.numel()
            digests |= tensor_digests([(name, tensor)])
        weights = weights_digest(digests)
        if training.setdefault("weights_sha256", weights) != weights:
            raise ValueError(
                f"{folder}: model.safetensors has the digest {weights}, training_args.json (step {training['step']}) "
                f"says {training['weights_sha256']}: training was killed while it saved; start its command again"
            )
        training.setdefault("made", (folder / "model.safetensors").stat().st_mtime_ns)
        training["arguments"] = published_arguments(training["arguments"])
        training["encoder"] = public_name(training["encoder"])
        config, processor = VJEPA2ACConfig.from_pretrained(folder), VJEPA2ACProcessor.from_pretrained(folder)
        return cls(template, repo_id, config, processor, parameters, training)

    @property
    def dataset(self) -> str:
        return self.training["arguments"]["dataset"]

    def texts(self, output_dir: Path, step: int, weights: str) -> dict[str, bytes]:
        """The files beside the model of a step, by their names in the repository.

        README.md, training_args.json, metrics.jsonl up to the step, and evaluation/metrics.json if that in `output_dir`
        is of these weights (`weights_digest`). The same weights have the same files, whenever they were saved: the Hub
        takes them once. `step` counts optimizer steps done.
        """
        path = output_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        logged = {line: json.loads(line) for line in lines if line.endswith("\n")}  # the last may be cut off
        logged = {line: row for line, row in logged.items() if row["step"] <= step}
        evaluation, runs = read_evaluation(output_dir, weights), read_runs(output_dir, weights)
        training = {**self.training, "step": step, "weights_sha256": weights}
        training.pop("made", None)
        picture = output_dir / "evaluation" / PICTURE
        has_picture = "frames" in (evaluation or {}) and picture.is_file()
        texts = {"README.md": str(self.card(step, weights, [*logged.values()], evaluation, runs, has_picture))}
        texts["training_args.json"] = json.dumps(training, indent=2) + "\n"
        if logged:
            texts["metrics.jsonl"] = "".join(logged)
        if evaluation is not None:
            public = public_evaluation(evaluation, self.repo_id)
            texts["evaluation/metrics.json"] = json.dumps(public, indent=2, allow_nan=False) + "\n"
        if runs is not None:
            texts["evaluation/runs.json"] = json.dumps(runs, indent=2, allow_nan=False) + "\n"
        pictures = {f"evaluation/{PICTURE}": picture.read_bytes()} if has_picture else {}
        return {name: text.encode() for name, text in texts.items()} | pictures

    def card(
        self,
        step: int,
        weights: str,
        rows: Sequence[Mapping[str, Any]],
        evaluation: Mapping[str, Any] | None = None,
        runs: Mapping[str, Any] | None = None,
        has_picture: bool = False,
    ) -> ModelCard:
        """The card of the model of a step.

        Args:
            step, weights: optimizer steps done, digest of the model's weights.
            rows: of metrics.jsonl up to the step; if the last validation was at this step, its figures are the results
                where there is no evaluation.
            evaluation: metrics.json of `examples/evaluate.py`, of these weights.
            runs: runs.json of `examples/run_seeds.py`, of which these weights are one run's.
            has_picture: whether evaluation/clip-0.png goes with it.

        Raises:
            ValueError: an evaluation without figures.
        """
        logged = rows[-1] if rows else {}
        validations = [row for row in rows if any(name.startswith("validation_") for name in row)]
        validated = validations[-1] if validations else {}
        figures: dict[str, Any]
        if evaluation is None:
            own = validated if validated.get("step") == step else {}
            figures = {name: own.get(f"validation_{name}") for name in _COUNTS}
            figures |= {"dataset": self.dataset, "horizons": horizons(own)}
            headlines = validation_headlines(own)
        elif not evaluation.get("horizons"):
            raise ValueError("the evaluation has no horizons: expected metrics.json of examples/evaluate.py")
        else:
            keys = ("horizon", *(key for key, *_ in _FIGURES))
            named = [{key: row.get(key) for key in keys} for row in evaluation["horizons"]]
            figures = {**evaluation, "dataset": public_name(evaluation["dataset"]), "horizons": named}
            top = evaluation.get("retrieval", {}).get("top1")
            headlines = [] if top is None else [("accuracy", RETRIEVAL, top)]
        figures |= {"step": step, "weights_sha256": weights}
        arguments, model_name = self.training["arguments"], self.repo_id.split("/")[-1]
        data = ModelCardData(
            library_name="transformers",
            license="apache-2.0",
            tags=["vjepa2", "world-model", "action-conditioned", "vpt", "vjepa-ac-hf"],
            datasets=[self.dataset] if is_repository_name(self.dataset) else None,
            base_model=self.training["encoder"] if is_repository_name(self.training["encoder"]) else None,
            eval_results=model_index(figures, headlines) or None,
            model_name=model_name,
        )
        return ModelCard.from_template(
            data,
            template_path=str(self.template),
            model_name=model_name,
            run=self,
            is_v21=EncoderFields.of(self.config.encoder_config).is_v21,
            step=step,
            weights=weights,
            metrics={k: v for k, v in logged.items() if is_figure(k, v)},
            logged_at=logged.get("step"),
            validated_at=validated.get("step"),
            headlines=[(name, value) for _, name, value in headlines],
            is_evaluated=evaluation is not None,
            runs=None if runs is None else card_rows(runs, weights, [key for key, *_ in _FIGURES]),
            runs_count=count(1 if runs is None else runs["runs"]),
            picture=f"evaluation/{PICTURE}" if has_picture else None,
            controllability=card_figures((evaluation or {}).get("controllability")),
            figures=figures,
            arguments=json.dumps(arguments, indent=2),
        )


def is_repository_name(name: str) -> bool:
    """A name like facebook/vjepa2-vitl-fpc64-256, and no folder of that name."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def public_name(name: str) -> str:
    """A repository's name as it is; of a path the last part."""
    return name if is_repository_name(name) else Path(name).name


def public_evaluation(evaluation: Mapping[str, Any], model: str) -> dict[str, Any]:
    """What others may see of a `metrics.json`: no command, names for paths, and `model` as the model's name."""
    public = {k: v for k, v in evaluation.items() if k != "command"} | {"model": model}
    heads = [name for name in ("dataset", "decoder", "inverse_dynamics") if name in public]
    return public | {name: public_name(str(public[name])) for name in heads}


def published_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What others need of the arguments of a training, with names for paths."""
    published = {name: arguments[name] for name in _PUBLISHED if name in arguments}
    for name in ("dataset", "action_stats", "model_config", "encoder", "init_predictor"):
        if published.get(name) is not None:
            published[name] = public_name(str(published[name]))
    return published


def read_evaluation(folder: Path, weights: str) -> dict[str, Any] | None:
    """The evaluation that lies with a run (`evaluation/metrics.json`), if it is of these weights."""
    evaluation = read_json(folder / "evaluation" / "metrics.json")
    return evaluation if evaluation.get("weights_sha256") == weights else None


def read_runs(folder: Path, weights: str) -> dict[str, Any] | None:
    """Figures over runs that lie with a run (`evaluation/runs.json`), if these weights are one of theirs."""
    runs = read_json(folder / "evaluation" / "runs.json")
    return runs if runs and folder_of(runs, weights) is not None else None


def is_figure(name: str, value: Any) -> bool:
    """Whether a logged value is for the list on the card: finite, of training; no speed, nothing of a validation."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return is_number and name not in SPEED | {"step", "learning_rate"} and not name.startswith("validation_")


def horizons(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of a row of metrics.jsonl by horizon, as metrics.json calls them; empty without a validation."""
    found = sorted(int(match[1]) for match in map(_ERROR.fullmatch, row) if match)
    return [{"horizon": h, **{key: row.get(f"validation_{own}_h{h}") for key, _, _, own in _FIGURES}} for h in found]


def validation_headlines(row: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """What a card names of training's own validation beside the horizons: type of the metric, name, value."""
    numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}
    groups = [(match[1], numbers[match[0]]) for match in map(_SENSITIVITY.fullmatch, numbers) if match]
    found = [("ratio", f"sensitivity to actions, {group}", value) for group, value in groups]
    top = numbers.get("validation_retrieval_top1")
    return found if top is None else [*found, ("accuracy", RETRIEVAL, top)]


def model_index(figures: Mapping[str, Any], headlines: Sequence[tuple[str, str, float]]) -> list[EvalResult]:
    """The figures of a card as the Hub lists them, by horizon, then `headlines`; without those that are None."""
    dataset, names = figures["dataset"], ("context_steps", *_COUNTS, "step", "weights_sha256")
    arguments = {k: figures[k] for k in names if figures.get(k) is not None}
    arguments |= {f"clip_{k}": v for k, v in figures.get("clip_set", {}).items() if k != "clips" and v is not None}
    found = [
        (kind, f"{name}, horizon {row['horizon']}", row[key], {"horizon": row["horizon"]} | arguments)
        for row in figures["horizons"]
        for key, kind, name, _ in _FIGURES
    ]
    found += [(kind, name, value, arguments) for kind, name, value in headlines]
    return [
        EvalResult(
            task_type="other",
            task_name="Prediction of features from actions",
            dataset_type=dataset if is_repository_name(dataset) else "vpt_tubelets",
            dataset_name=dataset.split("/")[-1],
            dataset_split=figures.get("split", "validation"),
            metric_type=kind,
            metric_name=name,
            metric_value=round(float(value), 6),
            metric_args=of,
        )
        for kind, name, value, of in found
        if value is not None
    ]
