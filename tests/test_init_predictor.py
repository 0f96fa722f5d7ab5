"""`--init_predictor`: a robot's predictor under VPT's actions and states, by the command line and by hand."""

import json

import pytest
import torch
from helpers_training import TINY, command, predictor_weights, write_workspace

from vjepa_ac_hf import VJEPA2ACConfig, VJEPA2ACModel
from vjepa_ac_hf.training.preflight import check_same_run
from vjepa_ac_hf.training.presets import check_initial_predictor, init_predictor

NEW = ("predictor.action_embed.", "predictor.state_embed.")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = write_workspace(tmp_path_factory.mktemp("init"), train=4, validation=0)
    torch.manual_seed(5)
    robot = VJEPA2ACModel(VJEPA2ACConfig(**TINY, action_dim=7, state_dim=7, loss_type="l1"))
    robot.save_pretrained(folder / "robot", max_shard_size="100kB")  # several files, as large models have
    assert len(list((folder / "robot").glob("*.safetensors"))) > 1
    return folder


def test_blocks_and_frame_projections_are_kept(workspace, train_here):
    """With a learning rate of 0 a run ends with what it began with."""
    flags = (f"--init_predictor={workspace / 'robot'}", "--max_steps=1", "--learning_rate=0", "--eval_every=0")
    train_here(command(workspace, workspace / "tuned", *flags))
    train_here(command(workspace, workspace / "new", *flags[1:]))
    robot = {
        f"predictor.{k}": v
        for k, v in VJEPA2ACModel.from_pretrained(workspace / "robot").predictor.state_dict().items()
    }
    tuned, new = predictor_weights(workspace / "tuned"), predictor_weights(workspace / "new")
    assert tuned.keys() == robot.keys()
    for name, tensor in tuned.items():
        if name.startswith(NEW):  # as in a run from nothing: VPT's 13 columns and 2 states
            assert torch.equal(tensor, new[name]) and tensor.shape[-1] in (13, 2, 48)
        else:
            assert torch.equal(tensor, robot[name]), name
    assert not torch.equal(tuned["predictor.layers.0.mlp.fc1.weight"], new["predictor.layers.0.mlp.fc1.weight"])
    arguments = json.loads((workspace / "tuned" / "training_args.json").read_text())["arguments"]
    assert arguments["init_predictor"] == "robot"  # published: no folder of the machine


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pred_hidden_size": 96}, "its pred_hidden_size is 48, the model's is 96"),
        ({"pred_num_hidden_layers": 3}, "its pred_num_hidden_layers is 2, the model's is 3"),
        ({"pred_num_attention_heads": 4}, "its pred_num_attention_heads is 2, the model's is 4"),
        ({"frame_size": [32, 64]}, r"its grid is \(2, 2\), the model's is \(2, 4\)"),
        ({"encoder_config": TINY["encoder_config"] | {"hidden_size": 64}}, "its feature_size is 48, the model's is 64"),
        ({"normalize_features": False}, "its normalize_features is True, the model's is False"),
    ],
)
def test_another_geometry_is_refused_before_weights_are_read(workspace, tmp_path, values, message):
    (tmp_path / "robot").mkdir()
    (tmp_path / "robot" / "config.json").write_text((workspace / "robot" / "config.json").read_text())  # no weights
    with pytest.raises(ValueError, match=message):
        check_initial_predictor(VJEPA2ACConfig(**{**TINY, **values}), tmp_path / "robot")


def test_folders_that_hold_no_predictor_are_refused(workspace, tmp_path):
    model = VJEPA2ACModel(VJEPA2ACConfig(**TINY))
    with pytest.raises(ValueError, match="lacks config.json; expected a folder with a saved VJEPA2ACModel"):
        init_predictor(model, tmp_path)
    (tmp_path / "config.json").write_text((workspace / "robot" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"(\d+) of \1 weights are missing, such as predictor\."):
        init_predictor(model, tmp_path)


def test_a_run_goes_on_after_the_model_has_got_new_fields(tmp_path):
    """Checkpoints of earlier versions say nothing of fields that came later: these had their defaults."""
    current = {"seed": 0, "model": json.loads(VJEPA2ACConfig(**TINY).to_json_string())}
    earlier = json.loads(json.dumps(current))
    for name in ("frame_size", "hierarchical_features"):
        del earlier["model"][name]
    check_same_run(earlier, current, tmp_path, VJEPA2ACConfig)
    with pytest.raises(ValueError, match="model.hierarchical_features: False then, True now"):
        check_same_run(
            earlier, current | {"model": current["model"] | {"hierarchical_features": True}}, tmp_path, VJEPA2ACConfig
        )
