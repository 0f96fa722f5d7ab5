"""The folder a training run leaves, as the Hub wants it: model, processor, code, model card."""

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

from ..modeling_vjepa2_ac import VJEPA2ACModel
from ..processing_vjepa2_ac import VJEPA2ACProcessor


def model_card(template: Path, model: VJEPA2ACModel, dataset: str, **fields: Any) -> ModelCard:
    """A model card from a Jinja template; `fields` are the template's (see model_cards/)."""
    data = ModelCardData(
        library_name="transformers",
        license="apache-2.0",
        tags=["vjepa2", "world-model", "action-conditioned", "vpt", "vjepa-ac-hf"],
        datasets=None if Path(dataset).exists() else [dataset],
    )
    predictor = sum(p.numel() for p in model.predictor.parameters())
    encoder = sum(p.numel() for p in model.encoder.parameters())
    return ModelCard.from_template(
        data,
        template_path=str(template),
        config=model.config,
        dataset=dataset,
        encoder_parameters=encoder,
        predictor_parameters=predictor,
        **fields,
    )


def save_final_model(folder: Path, model: VJEPA2ACModel, processor: VJEPA2ACProcessor, card: ModelCard) -> None:
    """Write config.json, model.safetensors, processor_config.json, README.md and the code; each file appears whole."""
    temporary = folder / ".final.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    card.save(temporary / "README.md")
    for path in sorted(temporary.iterdir()):
        os.replace(path, folder / path.name)
    temporary.rmdir()


def prepare_repository(repo_id: str, private: bool) -> None:
    """Create the repository if it is not there: without a token or write access this fails before training does."""
    HfApi().create_repo(repo_id, private=private, exist_ok=True)


def push_folder(folder: Path, repo_id: str) -> None:
    """Upload the final model and the run's metrics, not the checkpoints."""
    HfApi().upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        ignore_patterns=["checkpoints/**", ".*", "**/.*", "*.tmp", "tensorboard/**"],
        commit_message="Upload model",
    )
