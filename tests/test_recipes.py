"""Recipes, the command line, schedules, and the estimates of a dry run against independent counts."""

import json
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from helpers_training import load_program
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import VJEPA2Config

from vjepa_ac_hf import VJEPA2ACConfig, VJEPA2ACModel
from vjepa_ac_hf.training.arguments import build_parser, parse_arguments
from vjepa_ac_hf.training.dry_run import estimate
from vjepa_ac_hf.training.estimates import (
    encoder_flops,
    predictor_flops,
    step_flops,
    step_memory,
    training_hours,
)
from vjepa_ac_hf.training.optimization import build_optimizer, build_scheduler
from vjepa_ac_hf.training.preflight import startup_summary
from vjepa_ac_hf.training.presets import build_config

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
NEEDED = ["--dataset=clips", "--output_dir=out"]


def parse(*flags: str):
    return parse_arguments("", [*NEEDED, *flags])


def refusal(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as exit_status:
        parse(*flags)
    assert exit_status.value.code == 2
    return capsys.readouterr().err


def dry_run(train_program, monkeypatch, tmp_path, *flags: str) -> dict:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", "--dry_run", f"--dry_run_json={tmp_path / 'dry.json'}", *flags])
    train_program.main()
    return json.loads((tmp_path / "dry.json").read_text())


# ------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_full_size_recipes_copy_no_data_set(recipe):
    values = yaml.safe_load(recipe.read_text())
    assert values["streaming"] == (not recipe.stem.startswith("tiny")), "tiny ones cache features, which needs a copy"


def test_a_feature_cache_on_the_command_line_takes_the_place_of_a_recipes_stream(capsys, tmp_path):
    recipe = f"--config={ROOT / 'examples' / 'configs' / 'vitl16-vpt13.yaml'}"
    assert parse(recipe).streaming and not parse(recipe, "--cache_features=x").streaming
    assert "needs random access" in refusal(capsys, recipe, "--cache_features=x", "--streaming")
    both = tmp_path / "both.yaml"
    both.write_text("streaming: true\ncache_features: x\n")
    assert "needs random access" in refusal(capsys, f"--config={both}")


def encoder_parameters(width: int, layers: int, inner: int, patch: int = 16) -> int:
    """V-JEPA 2's encoder by hand: patches of 2 x 16 x 16 pixels, four projections, an MLP and two norms a layer."""
    layer = 4 * (width * width + width) + (width * inner + inner) + (inner * width + width) + 2 * 2 * width
    return layers * layer + (3 * 2 * patch * patch * width + width) + 2 * width


def predictor_parameters(actions: int, width: int, layers: int, feature_width: int) -> int:
    """V-JEPA 2-AC's predictor by hand: an MLP of four times the width, three embeddings, a norm and a head."""
    layer = 4 * (width * width + width) + (2 * 4 * width * width + 5 * width) + 2 * 2 * width
    embeddings = (feature_width + actions + 2 + 3) * width
    return layers * layer + embeddings + 2 * width + (width * feature_width + feature_width)


def test_there_are_the_recipes_that_the_documentation_names():
    names = {"tiny-vizdoom", "vitl16-vpt13", "vitl16-vpt38", "vitg16-vpt38", "vitl16-vpt13-l1"}
    names |= {"vitb16-v21-vpt13", "vitl16-v21-vpt13"}
    assert {path.stem for path in RECIPES} == names
    text = (ROOT / "docs" / "training.md").read_text()
    assert all(f"`{name}`" in text for name in names)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run_dry(train_program, monkeypatch, tmp_path, capsys, path):
    devices = 1 if path.stem == "tiny-vizdoom" else 8
    results = dry_run(train_program, monkeypatch, tmp_path, f"--config={path}", f"--hardware=h100x{devices}")
    expected = {
        "tiny-vizdoom": (predictor_parameters(38, 128, 3, 128), encoder_parameters(128, 1, 512, patch=8)),
        "vitl16-vpt13": (predictor_parameters(13, 1024, 24, 1024), encoder_parameters(1024, 24, 4096)),
        "vitl16-vpt38": (predictor_parameters(38, 1024, 24, 1024), encoder_parameters(1024, 24, 4096)),
        "vitl16-vpt13-l1": (predictor_parameters(13, 1024, 24, 1024), encoder_parameters(1024, 24, 4096)),
        "vitg16-vpt38": (predictor_parameters(38, 1024, 24, 1408), encoder_parameters(1408, 40, 6144)),
        # V-JEPA 2.1 beside: patches of single frames, two modality embeddings, four norms in place of one.
        "vitb16-v21-vpt13": (
            predictor_parameters(13, 1024, 24, 768),
            encoder_parameters(768, 12, 3072) + 768 * (3 * 16 * 16 + 1) + 2 * 768 + 3 * 2 * 768,
        ),
        "vitl16-v21-vpt13": (
            predictor_parameters(13, 1024, 24, 1024),
            encoder_parameters(1024, 24, 4096) + 1024 * (3 * 16 * 16 + 1) + 2 * 1024 + 3 * 2 * 1024,
        ),
    }
    found = (results["parameters"]["trainable"], results["parameters"]["frozen"])
    assert found == expected[path.stem]
    values = yaml.safe_load(path.read_text())
    assert results["steps"] == values["max_steps"] and results["clips_per_step"] == values["global_batch_size"]
    shown = capsys.readouterr().out
    assert f"{found[0]:,} trained" in shown and f"{results['hours']['estimate']:.1f}, estimate" in shown


def estimates_of(*flags: str) -> tuple[float, float, float]:
    """Gigabytes without and with gradient checkpointing, hours."""
    arguments = parse("--dry_run", *flags)
    config = build_config(arguments.model_config, action_space=arguments.action_space, loss_type=arguments.loss_type)
    with torch.device("meta"):
        results = estimate(arguments, config, VJEPA2ACModel(config))
    memory = results["memory_bytes_by_gradient_checkpointing"]
    return memory["false"]["total"] / 1e9, memory["true"]["total"] / 1e9, results["hours"]["estimate"]


HARDWARE_OF_THE_PAGE = (["--hardware=h100x8"], ["--hardware=h100x4"], ["--hardware_tflops=165", "--devices=1"])


def test_what_a_run_costs_is_the_dry_runs():
    page = (ROOT / "docs" / "cost.md").read_text()
    found = re.findall(
        r"^\| `([\w-]+)`(, features cached)? \| (\d+) GB \(estimated\) \| (\d+) GB \(estimated\) \| (.*) \|$",
        page,
        re.M,
    )
    assert len(found) == 3
    for name, cached, plain, checkpointed, cells in found:
        recipe = [f"--config={ROOT / 'examples' / 'configs' / name}.yaml", *(["--cache_features=x"] if cached else [])]
        hours = [tuple(map(int, re.findall(r"\d+", cell))) for cell in cells.split(" | ")]
        for hardware, told in zip(HARDWARE_OF_THE_PAGE, hours, strict=True):
            once = estimates_of(*recipe, *hardware)
            twice = estimates_of(*recipe, *hardware, "--gradient_checkpointing")
            assert [round(once[0]), round(once[1])] == [int(plain), int(checkpointed)], name
            assert (round(once[2]), round(twice[2])) == told, (name, hardware)


def test_what_a_short_run_on_one_small_gpu_costs():
    page = (ROOT / "docs" / "cost.md").read_text()
    command = re.search(r"    python examples/train.py ((?:(?!\n\n).)*?--max_steps.*?) \.\.\.\n", page, re.DOTALL)[1]
    flags = command.replace("\\", " ").replace("examples/configs", str(ROOT / "examples/configs")).split()
    told = re.search(r"\*\*(\d+) hours\*\*\s+there, or (\d+) with checkpointing, in (\d+) GB", page).groups()
    small = HARDWARE_OF_THE_PAGE[2]
    _, memory, hours = estimates_of(*flags, *small)
    without = estimates_of(*(flag for flag in flags if flag != "--gradient_checkpointing"), *small)[2]
    assert [round(without), round(hours), round(memory)] == list(map(int, told))


def test_the_sources_of_the_numbers():
    """The schedule of V-JEPA 2-AC, written out from its configuration: 300 iterations an epoch."""
    for path in RECIPES:
        values = yaml.safe_load(path.read_text())
        if path.stem == "tiny-vizdoom":
            continue
        assert values["max_steps"] == 315 * 300 and values["warmup_steps"] == values["decay_steps"] == 15 * 300
        assert (values["start_learning_rate"], values["learning_rate"]) == (7.5e-5, 4.25e-4)
        assert values["global_batch_size"] == 4 * 8 * 8 and values["weight_decay"] == 0.04


@pytest.mark.parametrize("steps", [2500, 100])
def test_what_the_demo_trains_with(monkeypatch, tmp_path, steps):
    """Recipe and flags together: the arguments that docs/LOG.md's figures of the demo were measured with."""
    demo = load_program("examples/demo.py")
    commands = []
    monkeypatch.setattr(demo, "run", lambda title, program, *flags, launcher=(): commands.append((program, flags)))
    monkeypatch.setattr(demo, "show_result", lambda report: None)
    monkeypatch.setattr(sys, "argv", ["demo.py", f"--output={tmp_path}", f"--max_steps={steps}", "--seed=3"])
    demo.main()
    flags = next(flags for program, flags in commands if program == "examples/train.py")
    (tmp_path / "clips").mkdir()
    monkeypatch.chdir(ROOT)
    found = parse_arguments("", [str(flag) for flag in flags])
    before = parse(
        *("--model_config=tiny-32px", "--encoder=random", "--action_space=vpt-38"),
        *(f"--dataset={tmp_path / 'clips'}", f"--output_dir={tmp_path / 'model'}", "--cache_dtype=float32"),
        *(f"--cache_features={tmp_path / 'features'}", "--num_workers=0", "--seed=3", f"--max_steps={steps}"),
        *("--per_device_batch_size=16", "--learning_rate=4e-3", f"--decay_steps={steps // 4}", "--loss_type=l1"),
        *("--auto_steps=1", "--eval_every=500", "--checkpoint_every=500"),
    )
    assert {**vars(found), "config": None} == {**vars(before), "config": None}
    # Decoder and inverse dynamics head are of that model, and the evaluation shows what they tell.
    found = [(program, dict(zip(flags[::2], flags[1::2], strict=True))) for program, flags in commands]
    heads = {flags["--task"]: flags for program, flags in found if program == "examples/train_head.py"}
    shown = dict(found)["examples/evaluate.py"]
    assert {flags["--model"] for flags in heads.values()} == {shown["--model"]} == {tmp_path / "model"}
    assert {f"--{name}": flags["--output_dir"] for name, flags in heads.items()} == {
        "--frame_decoding": shown["--decoder"],
        "--inverse_dynamics": shown["--inverse_dynamics"],
    }
    assert [heads[name]["--max_steps"] for name in ("frame_decoding", "inverse_dynamics")] == [600, 800]


def test_the_command_line_overrides_the_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rate: 1e-3\nmax_steps: 40\ngradient_checkpointing: true\nmixed_precision: no\n")
    arguments = parse(f"--config={path}", "--max_steps=60", "--no-gradient_checkpointing")
    assert (arguments.learning_rate, arguments.max_steps, arguments.warmup_steps) == (1e-3, 60, 3)
    assert arguments.gradient_checkpointing is False and arguments.mixed_precision == "no"
    assert parse(f"--config={path}").gradient_checkpointing is True


def test_the_recipe_may_hold_what_is_needed(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("dataset: here\noutput_dir: there\n")
    arguments = parse_arguments("", [f"--config={path}"])
    assert (arguments.dataset, arguments.output_dir) == ("here", Path("there"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 0.1", "recipe.yaml: unknown key 'learnig_rate'; did you mean 'learning_rate'?"),
        ("zzz: 1", "recipe.yaml: unknown key 'zzz'; known keys are ['action_space'"),
        ("max_steps: 1.5", "recipe.yaml: max_steps: found 1.5, expected a whole number"),
        ("max_steps: true", "recipe.yaml: max_steps: found True, expected a whole number"),
        ("learning_rate: fast", "recipe.yaml: learning_rate: found 'fast', expected a number"),
        ("streaming: 1", "recipe.yaml: streaming: found 1, expected true or false"),
        ("encoder: 3", "recipe.yaml: encoder: found 3, expected text"),
        ("loss_type: l2", "recipe.yaml: loss_type: found 'l2', expected one of ['mse', 'l1']"),
        ("max_steps:", "recipe.yaml: max_steps: found None, expected a whole number"),
        ("seed: 1\nseed: 2", "key 'seed' stands there twice"),
        ("- a", "recipe.yaml: expected keys and values, found list"),
        ("a: [", "recipe.yaml: not readable as YAML"),
        ("seed: !!python/object/apply:os.system [true]", "recipe.yaml: not readable as YAML"),
    ],
)
def test_recipes_with_mistakes_are_refused(tmp_path, capsys, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert message in refusal(capsys, f"--config={path}")


def test_a_recipe_that_is_not_there_is_named(tmp_path, capsys):
    assert f"--config {tmp_path / 'no.yaml'}: no such file" in refusal(capsys, f"--config={tmp_path / 'no.yaml'}")


# ------------------------------------------------------------------------------------------------- command line


def test_help_is_complete():
    parser = build_parser("")
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help, action.dest
        if action.option_strings and action.default not in (None, "", False, "==SUPPRESS=="):
            assert f"(default: {action.default})" in text, action.dest


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_step=3"], "unrecognized arguments: --max_step"),
        (["--start_learning_rate=1", "--learning_rate=0.5"], "--start_learning_rate 1.0 must be at most"),
        (["--learning_rate=-1"], "--learning_rate must be at least 0, found -1.0"),
        (["--learning_rate=nan"], "--learning_rate must be at least 0, found nan"),
        (["--mfu=40"], "--mfu is a share of the peak, at most 1, found 40.0"),
        (["--hardware=p100"], "--hardware p100: expected one of a100, h100, h200"),
        (["--global_batch_size=12", "--per_device_batch_size=8"], "12 is no multiple of --per_device_batch_size 8 x 1"),
        (
            ["--global_batch_size=16", "--per_device_batch_size=8", "--gradient_accumulation_steps=3"],
            "--global_batch_size 16, but --per_device_batch_size 8 x --gradient_accumulation_steps 3 x 1 processes",
        ),
    ],
)
def test_flags_with_mistakes_are_refused(capsys, flags, message):
    assert message in " ".join(refusal(capsys, *flags).split())


def test_precision_is_the_launchers_where_nothing_else_says(monkeypatch, tmp_path, capsys):
    needed = ("--dataset=d", "--output_dir=o")
    assert parse(*needed).mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # accelerate launch --mixed_precision, or its YAML file
    assert parse(*needed).mixed_precision == "bf16"
    assert parse(*needed, "--mixed_precision=no").mixed_precision == "no"
    (tmp_path / "recipe.yaml").write_text("mixed_precision: no\n")
    assert parse(*needed, f"--config={tmp_path / 'recipe.yaml'}").mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(SystemExit):
        parse(*needed)
    assert "accelerate launch is 'fp16', expected 'no' or 'bf16'" in capsys.readouterr().err


def test_of_several_processes_one_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert refusal(capsys, "--max_steps=0") == ""


def test_the_global_batch_is_kept_by_accumulation(monkeypatch):
    flags = ["--global_batch_size=256", "--per_device_batch_size=16"]
    assert parse(*flags).gradient_accumulation_steps == 16
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert parse(*flags).gradient_accumulation_steps == 2
    assert parse("--per_device_batch_size=4", "--gradient_accumulation_steps=3").global_batch_size == 96


# ------------------------------------------------------------------------------------------------- schedule


def test_schedule_is_the_written_out_formula():
    """V-JEPA 2-AC's: line up from start to peak, constant, line down to the end, each point on its straight line."""
    start, peak, end, steps, warmup, decay = 7.5e-5, 4.25e-4, 1e-6, 60, 12, 20
    optimizer = build_optimizer(torch.nn.Linear(2, 2), peak, 0.04)
    scheduler = build_scheduler(optimizer, steps, warmup, decay, start, end)
    for k in range(steps):
        if k + 1 <= warmup:
            expected = start * (1 - (k + 1) / warmup) + peak * (k + 1) / warmup
        elif steps - k <= decay:
            expected = end * (1 - (steps - k) / decay) + peak * (steps - k) / decay
        else:
            expected = peak
        assert scheduler.get_last_lr() == pytest.approx([expected, expected], rel=1e-12), k
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(end)


# ------------------------------------------------------------------------------------------------- estimates


def small_config(**values) -> VJEPA2ACConfig:
    encoder = {"crop_size": 64, "patch_size": 16, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"pred_hidden_size": 128, "pred_num_hidden_layers": 3, "pred_num_attention_heads": 4}
    return VJEPA2ACConfig(
        **{"encoder_config": encoder | {"mlp_ratio": 48 / 11}, **sizes, "action_space": "vpt-13", **values}
    )


def clip_inputs(config: VJEPA2ACConfig, batch: int, cached: bool = False) -> dict[str, torch.Tensor]:
    edge, encoder = config.encoder_config.crop_size, config.encoder_config
    inputs = {"actions": torch.randn(batch, 7, config.action_dim), "states": torch.randn(batch, 8, 2)}
    if cached:
        return inputs | {"features": torch.randn(batch, 8, config.grid_size**2, encoder.hidden_size)}
    return inputs | {"pixel_values_videos": torch.randn(batch, 16, 3, edge, edge)}


def counted(call) -> int:
    """Operations of products as PyTorch dispatches them; fused attention on a CPU has no count, products have."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("encoding", ["tubelet", "clip"])
@pytest.mark.parametrize("auto_steps", [1, 4])
def test_operations_are_those_that_pytorch_counts(encoding, auto_steps):
    config = small_config(encoding=encoding, auto_steps=auto_steps, pred_mlp_ratio=3.0)
    model, inputs = VJEPA2ACModel(config), clip_inputs(config, 2)
    assert counted(lambda: model.encode(inputs["pixel_values_videos"])) == encoder_flops(config, 2)
    flops = step_flops(config, 2)
    assert counted(lambda: model(**inputs)) == flops.encoder + flops.predictor_forward
    assert counted(lambda: model(**inputs).loss.backward()) == flops.model == flops.computed
    cached = clip_inputs(config, 2, cached=True)
    assert counted(lambda: model(**cached).loss.backward()) == step_flops(config, 2, cached_features=True).model
    assert predictor_flops(config, 6)[0] == 3 * flops.predictor_forward


def test_recomputed_operations_are_those_that_pytorch_counts():
    config = small_config(auto_steps=2)
    model, inputs = VJEPA2ACModel(config).train(), clip_inputs(config, 2)
    model.activation_checkpointing_enable()
    flops = step_flops(config, 2, gradient_checkpointing=True)
    assert counted(lambda: model(**inputs).loss.backward()) == flops.computed > flops.model


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations have made and that are still there, and the most at any time."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key, storage.nbytes())
        return output

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("auto_steps", "checkpointing", "cached"), [(1, False, False), (4, False, True), (3, True, False)]
)
def test_memory_is_what_a_step_on_a_cpu_holds(bf16, auto_steps, checkpointing, cached):
    """Bytes kept for the backward pass within 2 %; with working memory and gradients, the peak is no higher."""
    config, batch = small_config(auto_steps=auto_steps, pred_num_hidden_layers=6), 8
    model, inputs = VJEPA2ACModel(config).train(), clip_inputs(config, batch, cached)
    if checkpointing:
        model.activation_checkpointing_enable()
    trained = sum(p.numel() for p in model.predictor.parameters())
    frozen = sum(p.numel() for p in model.encoder.parameters())
    options = {"bf16": bf16, "gradient_checkpointing": checkpointing, "cached_features": cached, "device": "cpu"}
    memory = step_memory(config, frozen, trained, batch, **options)
    copies = memory.weights - 4 * (trained + frozen)  # autocast's
    with LiveBytes(model) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**inputs).loss
        kept = live.now
        loss.backward()
    # Checkpointed layers cast their weights anew: the copies are gone once the forward pass is over.
    assert memory.activations + (0 if checkpointing else copies) == pytest.approx(kept, rel=0.02)
    estimate = memory.activations + copies + memory.working + memory.gradients
    assert live.peak <= estimate < 1.8 * live.peak
    assert memory.optimizer == 8 * trained and memory.gradients == 4 * trained


def test_hours():
    """1e15 operations a step, 3,600 steps, 2 devices of 500 TFLOP/s at half their peak: two seconds a step."""
    assert training_hours(1e15, 3600, 2, 500.0, 0.5) == pytest.approx(2.0)


def test_hours_of_other_devices_and_precisions(train_program, monkeypatch, tmp_path, capsys):
    """Devices by number and peak; float32 has its own peak; what does not fit is said."""
    flags = ["--model_config=tiny", "--max_steps=100", "--mfu=0.5", "--per_device_batch_size=4"]
    results = dry_run(train_program, monkeypatch, tmp_path, *flags, "--hardware_tflops=2", "--devices=3")
    seconds = results["flops_per_step"]["computed"] * 100 / (3 * 2e12 * 0.5)
    assert results["hours"]["estimate"] == pytest.approx(seconds / 3600) and results["clips_per_step"] == 12
    float32 = dry_run(train_program, monkeypatch, tmp_path, *flags, "--hardware=a100")["hours"]
    bf16 = dry_run(train_program, monkeypatch, tmp_path, *flags, "--hardware=a100", "--mixed_precision=bf16")["hours"]
    assert (float32["tflops_of_a_device"], bf16["tflops_of_a_device"]) == (19.5, 312.0)
    assert "do not fit" not in capsys.readouterr().out
    dry_run(train_program, monkeypatch, tmp_path, "--per_device_batch_size=64", "--hardware=a100")
    assert "do not fit in the 80 GB of this device (a100): lower --per_device_batch_size" in capsys.readouterr().out
    with pytest.raises(ValueError, match="warmup_steps 90 and decay_steps 11 do not fit in max_steps 100"):
        dry_run(train_program, monkeypatch, tmp_path, *flags, "--warmup_steps=90", "--decay_steps=11")


def test_a_dry_run_with_data_counts_epochs_and_checks_them(train_program, monkeypatch, tmp_path):
    from helpers_clips import write_clips

    write_clips(tmp_path / "clips", train=6, validation=0, size=64)
    flags = ["--model_config=tiny", f"--dataset={tmp_path / 'clips'}", "--eval_every=0", "--max_steps=30"]
    results = dry_run(train_program, monkeypatch, tmp_path, *flags, "--per_device_batch_size=2")
    assert results["clips"] == 6 and results["epochs"] == pytest.approx(10.0) and results["hours"] is None
    assert results["tokens_per_step"] == {"predictor": 2 * (7 + 1) * 18, "encoder": 2 * 8 * 16}
    with pytest.raises(ValueError, match="smaller than the model's 256"):
        dry_run(train_program, monkeypatch, tmp_path, f"--dataset={tmp_path / 'clips'}", "--encoder=random")


# ------------------------------------------------------------------------------------------------- sizes


def test_vitg16_has_the_official_sizes():
    """V-JEPA 2's ViT-g: 1408 wide, 40 layers, 22 heads, an MLP of 48/11 times the width."""
    with torch.device("meta"):
        model = VJEPA2ACModel(build_config("vitg16", action_space="vpt-38"))
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder_parameters(1408, 40, 6144)
    assert (model.config.encoder_config.num_attention_heads, model.config.grid_size) == (22, 16)


def test_another_action_space_than_the_saved_model_is_refused(tmp_path):
    build_config("tiny", action_space="vpt-38").save_pretrained(tmp_path)
    assert build_config(str(tmp_path)).action_dim == 38
    with pytest.raises(
        ValueError, match=r"--action_space has 36 columns, the model of .*config.json has 38 \(differing: "
    ):
        build_config(str(tmp_path), action_space="vpt-36")


# ------------------------------------------------------------------------------------------------------ model files


SMALL_ENCODER = {"crop_size": 32, "patch_size": 16, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}


def model_file(tmp_path, values):
    path = tmp_path / "model.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def test_a_predictor_follows_the_encoder_where_a_file_gives_no_sizes(tmp_path):
    """`{"frames_per_clip": 8}` over an encoder of 0.4 million parameters made a predictor of 302 million."""
    sizes = ("pred_hidden_size", "pred_num_hidden_layers", "pred_num_attention_heads")

    def found(values, **overrides):
        config = build_config(model_file(tmp_path, values), **overrides)
        return tuple(getattr(config, name) for name in sizes)

    pretrained = VJEPA2Config(**SMALL_ENCODER)
    assert found({"frames_per_clip": 8}, encoder_config=pretrained) == (96, 3, 3)
    assert found({"encoder_config": SMALL_ENCODER}) == (96, 3, 3)
    assert found({"encoder_config": SMALL_ENCODER, "pred_hidden_size": 384}) == (384, 3, 6)
    assert found({"encoder_config": SMALL_ENCODER, "pred_num_hidden_layers": 1}) == (96, 1, 3)
    # The large ones are as they were: V-JEPA 2-AC's, for ViT-L and for ViT-g.
    assert found({"frames_per_clip": 8}) == (1024, 24, 16)
    giant = {"hidden_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 22, "mlp_ratio": 48 / 11}
    assert found({"encoder_config": giant}) == (1024, 24, 16)
    model = VJEPA2ACModel(build_config(model_file(tmp_path, {"frames_per_clip": 8}), encoder_config=pretrained))
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.predictor, model.encoder)]
    assert counts[0] < 2 * counts[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 96}, r"'hidden_size' is the encoder's: write it as \{\"encoder_config\": \{\"hidden_size\""),
        ({"crop_size": 64}, "'crop_size' is the encoder's"),
        (
            {"encoder_config": {"pred_hidden_size": 96}},
            "'pred_hidden_size' is the model's: write it beside encoder_config",
        ),
        ({"encoder_config": {"auto_steps": 1}}, "'auto_steps' is the model's"),
        ({"pred_hiden_size": 96}, "unknown key 'pred_hiden_size'; did you mean 'pred_hidden_size'"),
        ("{", "model.json: not readable as JSON"),
        ("[]", "model.json: expected an object"),
    ],
)
def test_keys_of_the_wrong_level_are_told_where_they_belong(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        build_config(model_file(tmp_path, values))


def test_a_large_predictor_over_a_small_encoder_is_warned_of(tmp_path, caplog):
    arguments = parse("--model_config=tiny", "--encoder=random", "--dataset=d", "--output_dir=o")
    for layers, warned in ((2, False), (40, True)):
        sizes = {"pred_hidden_size": 96, "pred_num_hidden_layers": layers, "pred_num_attention_heads": 3}
        encoder = SMALL_ENCODER | {"num_hidden_layers": 1}
        model = VJEPA2ACModel(build_config(model_file(tmp_path, {"encoder_config": encoder} | sizes)))
        caplog.clear()
        text = startup_summary(arguments, model, "random", ([0] * 100, None), 1)
        predictor, encoder = (sum(p.numel() for p in part.parameters()) for part in (model.predictor, model.encoder))
        assert f"predictor       {predictor:,} parameters, trained: {layers} layers of width 96" in text
        assert f"encoder         {encoder:,} parameters, frozen: 1 layers of width 96 (random)" in text
        assert (
            (f"{predictor / encoder:.0f} times as many as its encoder" in caplog.text)
            == warned
            == (predictor > 10 * encoder)
        )
