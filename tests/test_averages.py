"""The average of the weights (`--ema_decay`), against sums written out from the weights of every step."""

import json
import shutil
import sys

import pytest
import torch
from accelerate.utils import set_seed
from helpers_training import assert_same_weights, command, metrics, predictor_weights, run, write_workspace
from safetensors.torch import load_file
from test_distributed import FSDP2
from torch import nn
from transformers import AutoModel, AutoProcessor

from vjepa_ac_hf import VJEPA2ACModel
from vjepa_ac_hf.hub import push
from vjepa_ac_hf.loading.clips import ClipCollator, load_clips
from vjepa_ac_hf.training import checkpoints
from vjepa_ac_hf.training.averages import WeightAverage
from vjepa_ac_hf.training.presets import build_config

STEPS, DECAY = 6, 0.3  # below the warm-up's 4/13 from step 3 on
FLAGS = (f"--max_steps={STEPS}", "--per_device_batch_size=2", "--gradient_accumulation_steps=2", "--eval_every=3")
FLAGS += ("--checkpoint_every=1", "--keep_checkpoints=9", "--learning_rate=0.01")
EMA = f"--ema_decay={DECAY}"
# What each of the weights w_0 (as initialised) .. w_6 counts, by hand: d_1 = 2/11, d_2 = 3/12, then 0.3.
KEPT = (2 / 11, 1 / 4, 0.3, 0.3, 0.3, 0.3)


def expected_average(weights: list[dict], steps: int) -> dict:
    """Closed form: w_n counts (1 - d_n) times all later d, w_0 the product of all d; float64."""
    shares = []
    for n in range(steps + 1):
        share = 1.0 if n == 0 else 1 - KEPT[n - 1]
        for later in KEPT[n:steps]:
            share *= later
        shares.append(share)
    assert sum(shares) == pytest.approx(1)
    return {k: sum(s * w[k].double() for s, w in zip(shares, weights, strict=False)) for k in weights[0]}


def saved(output, step, name="predictor"):
    return load_file(output / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("averages"))


def train(program, arguments, added=None):
    def adding(*arguments):
        *_, step, links, texts = arguments
        added[step] = {name: load_file(path) for name, path in links.items() if name.endswith(".safetensors")} | texts
        add(*arguments)

    add = push.add_snapshot
    with pytest.MonkeyPatch.context() as patch:
        if added is not None:
            patch.setattr(push, "add_snapshot", adding)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", arguments)
        program.main()


@pytest.fixture(scope="module")
def plain(workspace, train_program):
    train(train_program, command(workspace, workspace / "plain", *FLAGS))
    return workspace / "plain"


@pytest.fixture(scope="module")
def pushed():
    """Files that a run hands to the Hub, by step."""
    return {}


@pytest.fixture(scope="module")
def averaged(workspace, train_program, pushed):
    flags = (EMA, "--push_to_hub", "--hub_model_id=org/world", "--hub_strategy=later")
    train(train_program, command(workspace, workspace / "averaged", *FLAGS, *flags), pushed)
    return workspace / "averaged"


def test_the_model_is_the_average_of_the_weights_of_all_steps(workspace, plain, averaged):
    set_seed(0)
    first = VJEPA2ACModel(build_config(str(workspace / "tiny.json"), action_space="vpt-13")).predictor.state_dict()
    weights = [first, *(saved(plain, step) for step in range(1, STEPS + 1))]
    for step in range(1, STEPS + 1):
        found, expected = saved(averaged, step, "average"), expected_average(weights, step)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7, msg=f"{step} {name}")
        # The average changes nothing of the training.
        assert all(torch.equal(tensor, weights[step][name]) for name, tensor in saved(averaged, step).items())
    final = {f"predictor.{name}": tensor for name, tensor in found.items()}
    assert all(torch.equal(tensor, final[name]) for name, tensor in predictor_weights(averaged).items())
    assert max(float((final[f"predictor.{k}"] - w).abs().max()) for k, w in weights[-1].items()) > 1e-3
    assert_same_weights(averaged / "raw", plain)


def test_both_load_and_validation_is_the_averages(workspace, plain, averaged):
    clips = load_clips(str(workspace / "clips"), "validation")
    rows = {folder: metrics(folder)[-1] for folder in (plain, averaged)}
    assert rows[averaged]["validation_weights"] == "average" and "validation_weights" not in rows[plain]
    assert "validation_weights" not in metrics(averaged)[0]  # nothing was validated there
    losses = {}
    for folder, row in ((plain, rows[plain]), (averaged / "raw", rows[plain]), (averaged, rows[averaged])):
        model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
        batch = ClipCollator(processor, names=False)([clips[i] for i in range(len(clips))])
        with torch.no_grad():
            losses[folder] = float(model(**batch).teacher_forcing_loss)
        assert losses[folder] == pytest.approx(row["validation_teacher_forcing_loss"], rel=1e-5)
    assert abs(losses[averaged] / losses[plain] - 1) > 1e-4
    assert [row["loss"] for row in metrics(averaged)] == [row["loss"] for row in metrics(plain)]


def test_what_is_pushed_is_the_average_and_says_so(plain, averaged, pushed):
    assert sorted(pushed) == list(range(1, STEPS + 1))
    for step, files in pushed.items():
        final = step == STEPS
        found = files["model.safetensors" if final else "predictor.safetensors"]
        for name, tensor in saved(averaged, step, "average").items():
            assert torch.equal(found["predictor." * final + name], tensor)
        assert b"exponential moving average over training (decay 0.3)" in files["README.md"]
    assert "moving average" not in (plain / "README.md").read_text()
    assert json.loads((averaged / "training_args.json").read_text())["arguments"]["ema_decay"] == DECAY


def test_the_last_weights_of_another_run_do_not_stay_beside_a_model_without_an_average(
    workspace, plain, averaged, train_here, tmp_path
):
    output = tmp_path / "again"
    shutil.copytree(averaged, output, ignore=shutil.ignore_patterns("checkpoints", ".hub"))
    shutil.copytree(plain / "checkpoints", output / "checkpoints")
    train_here(command(workspace, output, *FLAGS))
    assert_same_weights(output, plain)
    assert not (output / "raw").exists()


@pytest.mark.parametrize("step", [1, 4])
def test_continued_is_the_same_bit_for_bit(workspace, averaged, train_here, tmp_path, step):
    output = tmp_path / "continued"
    shutil.copytree(averaged, output, ignore=shutil.ignore_patterns("raw", "model.safetensors", ".hub"))
    for late in range(step + 1, STEPS + 1):
        shutil.rmtree(output / "checkpoints" / f"step-{late:08d}")
    train_here(command(workspace, output, *FLAGS, EMA))
    assert_same_weights(output, averaged)
    assert_same_weights(output / "raw", averaged / "raw")
    for late in range(step + 1, STEPS + 1):
        found = saved(output, late, "average")
        assert all(torch.equal(found[name], tensor) for name, tensor in saved(averaged, late, "average").items())
    names = ("loss", "validation_loss", "validation_error")
    rows = [[[row.get(name) for name in names] for row in metrics(folder)] for folder in (output, averaged)]
    assert rows[0] == rows[1]


def test_another_decay_is_refused_on_resume(workspace, plain, averaged, train_here, tmp_path):
    for folder, flag, message in (
        (averaged, "--ema_decay=0.5", "ema_decay: 0.3 then, 0.5 now"),
        (averaged, "--ema_decay=0", "ema_decay: 0.3 then, 0.0 now"),
        (plain, EMA, "ema_decay: 0.0 then, 0.3 now"),
    ):
        with pytest.raises(ValueError, match=message):
            train_here(command(workspace, folder, *FLAGS, flag))
    # A checkpoint of before the flag has no average.
    older = tmp_path / "older"
    shutil.copytree(plain, older)
    newest = older / "checkpoints" / f"step-{STEPS:08d}"
    state = json.loads((newest / "trainer_state.json").read_text())
    del state["arguments"]["ema_decay"]
    (newest / "trainer_state.json").write_text(json.dumps(state))
    checkpoints.write_checksums(newest)
    with pytest.raises(ValueError, match="ema_decay: 0.0 then, 0.3 now"):
        train_here(command(workspace, older, *FLAGS, EMA))
    train_here(command(workspace, older, *FLAGS))
    assert_same_weights(older, plain)


def test_a_damaged_average_is_noticed(averaged, tmp_path):
    path = tmp_path / "checkpoint"
    shutil.copytree(averaged / "checkpoints" / "step-00000003", path)
    assert checkpoints.find_damage(path) is None
    (path / "average.safetensors").unlink()
    assert "average.safetensors" in checkpoints.find_damage(path)


@pytest.mark.parametrize("value", ["1", "-0.1", "nan"])
def test_decays_that_are_none_are_refused(workspace, train_here, capsys, value):
    with pytest.raises(SystemExit):
        train_here(command(workspace, workspace / "never", f"--ema_decay={value}"))
    assert "--ema_decay must be at least 0 and below 1" in capsys.readouterr().err


def test_exchanging_twice_puts_back_every_bit():
    torch.manual_seed(0)
    module = nn.Linear(7, 5)
    average = WeightAverage(module, 0.9)
    with torch.no_grad():
        module.weight.mul_(1 / 3)
    before = {k: v.clone() for k, v in module.state_dict().items()}, {k: v.clone() for k, v in average.tensors.items()}
    with pytest.raises(KeyError), average.applied():
        assert torch.equal(module.weight, before[1]["weight"]) and not torch.equal(module.weight, before[0]["weight"])
        raise KeyError
    for name in before[0]:
        assert torch.equal(module.state_dict()[name], before[0][name])
        assert torch.equal(average.tensors[name], before[1][name])


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "compiled"), [(FSDP2, False), ({}, False), ({}, True)])
def test_several_processes_and_compilation_have_the_same_average(workspace, tmp_path, fsdp, compiled):
    """Sharded, copied or compiled: as in one process, and a continued run as one that was not stopped."""
    flags = ("--max_steps=4", "--checkpoint_every=2", "--eval_every=2", EMA)
    one, several = tmp_path / "one", tmp_path / "several"
    run(command(workspace, one, *flags))
    processes = {"processes": 1} if compiled else {"processes": 2}
    flags += ("--compile",) if compiled else ("--per_device_batch_size=2",)
    run(command(workspace, several, *flags), **processes, **fsdp)
    names = ("validation_loss", "validation_error")
    for name in names:
        values = [[row[name] for row in metrics(folder) if name in row] for folder in (one, several)]
        assert values[0] and values[0] == pytest.approx(values[1], rel=1e-3)
    for folder in (several, several / "raw"):
        expected = predictor_weights(one / folder.relative_to(several))
        for name, tensor in predictor_weights(folder).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    if compiled:  # Inductor's kernels of a second start are not those of the first to the bit, average or not
        return
    again = tmp_path / "again"
    shutil.copytree(several, again)
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    run(command(workspace, again, *flags), **processes, **fsdp)
    assert_same_weights(again, several)
    assert_same_weights(again / "raw", several / "raw")
