"""Trackers and validation pictures: real TensorBoard files of a run that was interrupted, through the real program."""

import importlib.util
import json
import logging
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from helpers_training import command, metrics, write_workspace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_validation import folder, make_model, validation_set  # noqa: F401 (a fixture)

from vjepa_ac_hf import VJEPA2ACForFrameDecoding
from vjepa_ac_hf.loading.clips import decode_clip
from vjepa_ac_hf.pages import new_figure
from vjepa_ac_hf.training import pictures, trackers
from vjepa_ac_hf.training.validation import validate


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("trackers"))


@pytest.mark.parametrize("more", [(), ("--dry_run",)])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "tensorbord",
            "--report_to takes names among tensorboard, trackio, wandb, .*found 'tensorbord' .unknown: tensorbord",
        ),
        ("wandb, wandb", "each once, found 'wandb, wandb' .one is named twice"),
        ("tensorboard,wandb", r"wandb not installed; pip install 'vjepa-ac-hf\[trackers\]', or pip install wandb$"),
    ],
)
def test_trackers_that_cannot_be_are_named_first(workspace, train_here, monkeypatch, names, message, more):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    output = workspace / "no_tracker"
    with pytest.raises(ValueError, match=message):
        train_here(command(workspace, output, f"--report_to={names}", "--dataset=nowhere", *more))
    assert not output.exists()


def test_configurations_are_flat():
    nested = {"a": 1, "b": {"c": {"d": None, "e": Path("x/y")}, "f": [1, {"g": 2}]}, "h": True, "i": {}}
    flat = {"a": 1, "b/c/d": None, "b/c/e": "x/y", "b/f": '[1, {"g": 2}]', "h": True}
    assert trackers.flatten_config(nested) == flat


@pytest.fixture(scope="module")
def tracked(workspace, train_program):
    """A run of 4 steps whose last checkpoint is lost, and its continuation from step 2 to 6."""
    output = workspace / "tracked"
    flags = ["--report_to=tensorboard", "--checkpoint_every=2", "--eval_every=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        runs = []
        for steps in (4, 6):
            patch.setattr(sys, "argv", command(workspace, output, *flags, f"--max_steps={steps}"))
            train_program.main()
            runs.append((output / "trackers.json").read_text())
            if steps == 4:
                shutil.rmtree(output / "checkpoints" / "step-00000004")
    assert runs[0] == runs[1]  # the name of the run that Trackio and Weights & Biases continue
    return output


def test_a_continued_run_is_one_run_without_repeated_steps(tracked):
    events = EventAccumulator(str(tracked / "tensorboard" / "vjepa-ac"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    rows = metrics(tracked)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "learning_rate", "validation_error_over_persistence", "validation_shuffled_ratio_h6"):
        logged = [(e.step, e.value) for e in events.Scalars(name)]
        assert logged == [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in rows if name in r], name
    tags = [f"pictures/clip_{number}{colours}" for number in (0, 1) for colours in ("", "_colours")]
    tags.append("pictures/errors_by_horizon")
    assert sorted(events.Tags()["images"]) == tags
    assert [e.step for e in events.Images(tags[0])] == [2, 4, 6]


def test_the_file_shows_what_the_tracker_shows(tracked):
    """The curves are on top, as they were logged; below them the clips."""
    assert sorted(p.name for p in (tracked / "pictures").iterdir()) == [f"step-0000000{i}.png" for i in (2, 4, 6)]
    whole = matplotlib.image.imread(tracked / "pictures" / "step-00000006.png")[..., :3]
    events = EventAccumulator(str(tracked / "tensorboard" / "vjepa-ac"), size_guidance={"images": 0})
    events.Reload()
    top = 0
    for name in ("errors_by_horizon", "clip_0", "clip_0_colours", "clip_1", "clip_1_colours"):
        logged = events.Images(f"pictures/{name}")[-1]
        assert logged.step == 6
        path = tracked / "logged.png"
        path.write_bytes(logged.encoded_image_string)
        image = matplotlib.image.imread(path)[..., :3]
        np.testing.assert_array_equal(whole[top : top + len(image), : image.shape[1]], image)
        assert (whole[top : top + len(image), image.shape[1] :] == 1).all()
        top += len(image)
    assert top == len(whole)


def test_the_configuration_is_logged(tracked):
    found = [json.dumps(p.read_text()) for p in (tracked / "tensorboard").rglob("hparams.yml")]
    assert len(found) == 2  # one for each start
    for text in found:
        assert "model/encoder_config/hidden_size: 48" in text and "learning_rate: 0.001" in text


def test_trackers_are_finished_when_training_fails(workspace, train_here, monkeypatch):
    finished = []
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: finished.append(self.writer.close()))
    output = workspace / "failed"
    flags = ["--learning_rate=1e30", "--warmup_steps=0", "--max_grad_norm=1e30", "--report_to=tensorboard"]
    with pytest.raises(FloatingPointError):
        train_here(command(workspace, output, *flags, "--no-log_pictures"))
    assert len(finished) == 1 and not (output / "pictures").exists()


def test_a_failed_run_of_wandb_is_marked_as_failed():
    calls = []
    run = SimpleNamespace(finish=lambda exit_code=0: calls.append(exit_code))
    tracker = SimpleNamespace(name="wandb", tracker=run, finish=run.finish)
    accelerator = SimpleNamespace(is_main_process=True, trackers=[tracker])
    with trackers.closing_trackers(accelerator):
        pass
    accelerator.trackers = [tracker]
    with pytest.raises(KeyboardInterrupt), trackers.closing_trackers(accelerator):
        raise KeyboardInterrupt
    assert calls == [0, 1] and accelerator.trackers == []


def test_pictures_show_the_first_and_last_clip_and_disturb_nothing(folder, tmp_path, monkeypatch):  # noqa: F811
    accelerator, model = Accelerator(cpu=True), make_model().train()
    clips = validation_set(folder, accelerator)
    validate(model, clips, accelerator)
    shown = []
    draw = pictures.clip_figure
    monkeypatch.setattr(pictures, "clip_figure", lambda clip, *colours: (shown.append(clip), draw(clip, *colours))[1])
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    encode, modes = model.encode, []
    monkeypatch.setattr(model, "encode", lambda pixels: (modes.append(model.training), encode(pixels))[1])
    pictures.log_pictures(model, clips, accelerator, tmp_path, 7)
    assert modes == [False]
    assert torch.equal(torch.get_rng_state(), before[0]) and model.training
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["step-00000007.png"]
    names = clips.records.names
    for clip, number in zip(shown[::2], (0, len(clips) - 1), strict=True):  # as frames and as colours
        partner = int(clips.partners[0, number])
        assert clip.title == f"{names[number]}, other actions from {names[partner]}"
        assert clip.frames.shape == (8, 3, 32, 32) and len(clip.rows["prediction"]) == clips.horizon
        same = torch.equal(clip.colours["prediction"], clip.colours["prediction, other clip's actions"])
        assert not same and clip.colours["persistence"][0].equal(clip.colours["true features"][1])


def test_pictures_are_drawn_by_the_decoder_that_is_given(folder, tmp_path, monkeypatch):  # noqa: F811
    accelerator, model = Accelerator(cpu=True), make_model()
    small = {"head_hidden_size": 16, "head_num_hidden_layers": 1, "head_num_attention_heads": 2}
    decoder = VJEPA2ACForFrameDecoding.from_world_model(model, **small).eval()
    clips, shown = validation_set(folder, accelerator), []
    validate(model, clips, accelerator)
    monkeypatch.setattr(pictures, "clip_figure", lambda clip, *colours: (shown.append(clip), new_figure(1, 1))[1])
    pictures.log_pictures(model, clips, accelerator, tmp_path, 7, decoder)
    video = decode_clip(clips.source[0]["video"], "clip", 16)
    with torch.no_grad():
        features = model.encode(clips.processor(videos=[video])["pixel_values_videos"])
        expected = decoder(features=features).frames[0, ::2].permute(0, 2, 3, 1)
    torch.testing.assert_close(shown[0].rows["true features"], expected)


def test_pictures_without_matplotlib(monkeypatch, caplog):
    assert [pictures.check_pictures(w, r) for w in (None, True, False) for r in ("", "wandb")] == [
        *(False, True),
        *(True, True),
        *(False, False),
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert not pictures.check_pictures(None, "wandb") and not pictures.check_pictures(None, "")
    assert caplog.text.count("pip install 'vjepa-ac-hf[report]'; this run makes none") == 1
    with pytest.raises(ImportError, match=r"--log_pictures: validation pictures need matplotlib"):
        pictures.check_pictures(True, "")
