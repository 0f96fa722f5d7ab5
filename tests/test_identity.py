"""What must be equal where a run is continued, and what need not: contents, not paths; the best checkpoint; the end."""

import json
import shutil

import pytest
import torch
from helpers_clips import write_clips
from helpers_training import command, losses, predictor_weights, run, write_workspace
from hub_server import HubServer

from vjepa_ac_hf import VJEPA2ACConfig, VJEPA2ACModel, VJEPA2ACProcessor
from vjepa_ac_hf.loading.clips import load_clips
from vjepa_ac_hf.training import checkpoints
from vjepa_ac_hf.training.arguments import parse_arguments
from vjepa_ac_hf.training.preflight import check_same_run, run_identity
from vjepa_ac_hf.training.presets import build_config
from vjepa_ac_hf.training.run_log import jsonable


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("identity"))


def identity(workspace, *flags, processes=1, seed=0, sizes=None, statistics=None, dataset="clips"):
    """Of a run with these flags, as JSON gives it back from a checkpoint."""
    arguments = parse_arguments("", command(workspace, workspace / "out", *flags)[1:])
    torch.manual_seed(seed)
    model = VJEPA2ACModel(build_config(str(workspace / "tiny.json"), action_space="vpt-13", **(sizes or {})))
    statistics = statistics or json.loads((workspace / dataset / "action_stats.json").read_text())
    processor = VJEPA2ACProcessor(resolution=32, action_space="vpt-13", action_statistics=statistics)
    clips = load_clips(str(workspace / dataset), "train", streaming=arguments.streaming)
    frozen = {"encoder": model.encoder}
    return json.loads(json.dumps(run_identity(arguments, processes, model, processor, clips, frozen)))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        *(({"flags": [f"--{n}=0.25"]}, n) for n in ("learning_rate", "weight_decay", "max_grad_norm")),
        *(({"flags": [f"--{n}=1e-5"]}, n) for n in ("start_learning_rate", "final_learning_rate")),
        *(({"flags": [f"--{n}=2"]}, n) for n in ("seed", "per_device_batch_size", "gradient_accumulation_steps")),
        ({"flags": ["--mixed_precision=bf16"]}, "mixed_precision"),
        ({"flags": ["--streaming"]}, "streaming"),
        ({"flags": ["--cache_features=c", "--cache_dtype=int8"]}, "cache_dtype"),
        ({"processes": 2}, "num_processes"),
        ({"seed": 1}, "encoder_weights"),
        ({"sizes": {"pred_hidden_size": 96}}, "model.pred_hidden_size"),
        ({"sizes": {"loss_type": "l1"}}, "model.loss_type"),
        ({"sizes": {"auto_steps": 1}}, "model.auto_steps"),
        ({"dataset": "other"}, "clips"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_a_step_depends_on_is_not_free(workspace, tmp_path, change, field):
    if not (workspace / "other").exists():
        write_clips(workspace / "other", train=23, validation=0)
        shutil.copy(workspace / "clips" / "action_stats.json", workspace / "other")
    flags = change.pop("flags", [])
    changed = identity(workspace, *flags, **change)
    with pytest.raises(ValueError, match=rf"[( ]{field}: .* then, .* now"):
        check_same_run(identity(workspace), changed, tmp_path, VJEPA2ACConfig)


def test_actions_must_be_the_same(workspace, tmp_path):
    known = identity(workspace)
    other = json.loads(json.dumps(known))
    other["action_statistics"]["std"][2] *= 2
    with pytest.raises(ValueError, match=r"action_statistics\.std: "):
        check_same_run(known, other, tmp_path)
    other = json.loads(json.dumps(known))
    other["model"]["action_space"][1] = "key.w"
    with pytest.raises(ValueError, match=r"model\.action_space: "):
        check_same_run(known, other, tmp_path)


def test_paths_speed_and_what_is_shown_are_free(workspace, tmp_path):
    shutil.copytree(workspace / "clips", workspace / "copy")
    flags = [f"--dataset={workspace / 'copy'}", "--output_dir=x", "--num_workers=3", "--prefetch_factor=4", "--compile"]
    flags += ["--max_steps=20", "--warmup_steps=3", "--checkpoint_every=3", "--log_every=7", "--eval_every=5"]
    flags += ["--gradient_checkpointing", "--push_to_hub", "--hub_model_id=a/b", "--loader_timeout=9", "--mfu=0.2"]
    flags += ["--report_to=tensorboard", "--shuffle_buffer=9", "--hardware=h100", "--keep_checkpoints=9"]
    check_same_run(identity(workspace), identity(workspace, *flags, dataset="copy"), tmp_path, VJEPA2ACConfig)


def test_saving_and_pushing_a_model_do_not_make_another_of_it(workspace, tmp_path):
    """`save_pretrained` fills in classes, code and dtype."""
    arguments = parse_arguments("", command(workspace, workspace / "out")[1:])
    model = VJEPA2ACModel(build_config(str(workspace / "tiny.json"), action_space="vpt-13"))
    processor = VJEPA2ACProcessor(resolution=32, action_space="vpt-13")
    clips = load_clips(str(workspace / "clips"), "train")

    def now():
        return run_identity(arguments, 1, model, processor, clips, {"encoder": model.encoder})

    before = now()
    model.save_pretrained(tmp_path)
    model.config.architectures, model.config.auto_map = ["VJEPA2ACModel"], {"AutoModel": "modeling.X"}
    model.config.dtype = model.config.encoder_config.dtype = torch.float32
    assert now()["model"] != before["model"]
    check_same_run(before, now(), tmp_path, VJEPA2ACConfig)
    check_same_run(now(), before, tmp_path, VJEPA2ACConfig)


def test_checkpoints_of_before_there_was_a_list_go_on(workspace, tmp_path):
    """They hold all arguments, paths too, and neither the clips nor fields that the model has got since."""
    arguments = parse_arguments("", command(workspace, workspace / "elsewhere")[1:])
    known = identity(workspace)
    old = json.loads(json.dumps(jsonable(vars(arguments)), default=str))
    old["resize_mode"] = "crop"  # a flag's default then, the data set's own now
    old |= {name: known[name] for name in ("num_processes", "model", "encoder_weights", "action_statistics")}
    old["model"] = {k: v for k, v in old["model"].items() if k != "normalize_features"} | {"architectures": ["X"]}
    check_same_run(old, known, tmp_path, VJEPA2ACConfig)
    with pytest.raises(ValueError, match=r"\(model.normalize_features: None then, True now\)"):
        check_same_run(old, known, tmp_path)
    with pytest.raises(ValueError, match=r"\(weight_decay: 0.04 then, 0.1 now\)"):
        check_same_run(old, known | {"weight_decay": 0.1}, tmp_path, VJEPA2ACConfig)
    head = {"task": "inverse_dynamics", "head": {"head_hidden_size": 8, "model_type": "h"}, "encoder": "0abc"}
    now = {"task": "inverse_dynamics", "model": {"head_hidden_size": 8, "model_type": "h"}, "encoder_weights": "0abc"}
    check_same_run(head | {"model": "a/path", "seed": 3}, now | {"clips": "x"}, tmp_path)
    with pytest.raises(ValueError, match="encoder_weights: '0abc' then, 'other' now"):
        check_same_run(head, now | {"encoder_weights": "other"}, tmp_path)


def test_the_first_versions_checkpoints_are_refused_for_a_reason_of_their_own(tmp_path):
    first = tmp_path / "checkpoints" / "step-00000004"
    first.mkdir(parents=True)
    (first / "trainer_state.json").write_text('{"step": 4, "arguments": {}, "schedule": {}}')
    for resume in ("auto", str(first)):
        with pytest.raises(ValueError, match="step-00000004: written by version 0.1.0.*--resume never starts anew"):
            checkpoints.find_checkpoint(tmp_path / "checkpoints", resume)
    assert first.is_dir()


@pytest.fixture(scope="module")
def reference(workspace, train_program):
    """A run of eight steps, validated after four and eight."""
    output = workspace / "reference"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr("sys.argv", command(workspace, output))
        train_program.main()
    return output


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_of_the_data_set_and_a_push_go_on_with_the_same_bits(workspace, reference, train_here, tmp_path):
    shutil.copytree(workspace / "clips", tmp_path / "clips")
    shutil.copytree(reference, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000008")
    more = [f"--dataset={tmp_path / 'clips'}", "--push_to_hub", "--hub_strategy=later", "--hub_model_id=org/world"]
    train_here(command(workspace, tmp_path / "out", *more))
    assert losses(tmp_path / "out") == losses(reference)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000008")
    train_here(command(workspace, tmp_path / "out"))  # and back again
    assert losses(tmp_path / "out") == losses(reference)


def test_fewer_steps_than_are_done_are_refused_and_nothing_is_written(workspace, reference, train_here, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(reference, output)
    before = files(output)
    with pytest.raises(ValueError, match="step-00000008: step 8 is done, --max_steps is 6"):
        train_here(command(workspace, output, "--max_steps=6"))
    early = output / "checkpoints" / "step-00000004"
    with pytest.raises(ValueError, match="learning_rate: 0.001 then, 0.5 now"):  # newer ones are not set aside yet
        train_here(command(workspace, output, f"--resume={early}", "--learning_rate=0.5"))
    assert files(output) == before


def test_losses_on_other_clips_are_not_compared(workspace, reference, train_here, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    shutil.copytree(reference, output)
    best = json.loads((output / "checkpoints" / "best.json").read_text())
    monkeypatch.setattr(train_here.program, "validate", lambda *_: {"validation_loss": best["validation_loss"] + 1})
    train_here(command(workspace, output, "--max_steps=10", "--eval_every=2", "--warmup_steps=0"))
    assert json.loads((output / "checkpoints" / "best.json").read_text()) == best  # the same clips: 10 was worse
    assert "validation is on other clips" not in capsys.readouterr().out
    train_here(command(workspace, output, "--max_steps=12", "--eval_every=2", "--warmup_steps=0", "--eval_clips=3"))
    found = json.loads((output / "checkpoints" / "best.json").read_text())
    assert (found["step"], found["validation_loss"]) == (12, best["validation_loss"] + 1)
    assert f"the best checkpoint so far (step {best['step']}," in capsys.readouterr().out


def test_no_run_writes_where_it_reads_from(workspace, reference, train_here, tmp_path, monkeypatch):
    shutil.copytree(reference, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out" / "checkpoints")
    before = files(tmp_path / "out")
    places = (tmp_path / "out", tmp_path / "link", "..", tmp_path / "out" / "checkpoints" / "..")
    for place in places:
        flags = (f"--model_config={place}", f"--output_dir={tmp_path / 'out'}")
        with pytest.raises(
            ValueError, match=r"--output_dir .* is the folder of --model_config .*choose another folder"
        ):
            train_here(command(workspace, tmp_path / "out", *flags))
    with pytest.raises(ValueError, match="is the folder of --dataset"):
        train_here(command(workspace, workspace / "clips"))
    assert files(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["every_checkpoint", "end", "later"])
def test_two_processes_with_pushes_go_on(workspace, tmp_path, strategy):
    """What the first process prepares for the Hub is not known to the second one."""
    with HubServer() as server:
        variables = {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "hf")}
        variables |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        flags = ["--per_device_batch_size=2", "--push_to_hub", "--hub_model_id=org/world", f"--hub_strategy={strategy}"]
        run(command(workspace, tmp_path / "whole", *flags), processes=2, **variables)
        shutil.copytree(tmp_path / "whole", tmp_path / "parts")
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000008")
        result = run(command(workspace, tmp_path / "parts", *flags), processes=2, **variables)
        assert "continuing from" in result.stdout and "step-00000004" in result.stdout
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    weights = predictor_weights(tmp_path / "whole")
    for name, tensor in predictor_weights(tmp_path / "parts").items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-6, msg=name)
