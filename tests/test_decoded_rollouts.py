"""evaluate.py --decoder: PSNR of decoded rollouts against loops over clips, rows of frames, other encoders."""

import numpy as np
import pytest
import torch
from helpers_clips import write_clips
from helpers_training import evaluation_program
from test_modeling import tiny_model
from transformers import AutoModel

from vjepa_ac_hf import ACTION_COLUMNS, ActionStatistics, VJEPA2ACForFrameDecoding, VJEPA2ACProcessor
from vjepa_ac_hf.evaluation.decoding import load_decoder, mirror_actions
from vjepa_ac_hf.loading.clips import decode_clip, load_clips

SMALL = {"head_hidden_size": 32, "head_num_hidden_layers": 1, "head_num_attention_heads": 2}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoded")
    write_clips(folder / "clips", train=0, validation=6)
    world = tiny_model(action_space="vpt-13", action_dim=None)
    statistics = ActionStatistics().update(np.random.default_rng(0).normal(0, 8, (50, 38)))
    processor = VJEPA2ACProcessor(resolution=32, action_statistics=statistics.to_dict())
    torch.manual_seed(2)
    decoder = VJEPA2ACForFrameDecoding.from_world_model(world, **SMALL)
    for saved, name in ((world, "world"), (decoder, "decoder"), (processor, "world"), (processor, "decoder")):
        saved.save_pretrained(folder / name)
    return folder


@pytest.fixture
def evaluate(monkeypatch, workspace):
    return evaluation_program(monkeypatch, workspace, 2)


def decibels(told, true):
    return 10 * np.log10(1 / max(float(((told - true) ** 2).mean()), 1 / (12 * 255**2)))


def test_frames_of_rollouts_are_those_of_loops_over_clips(evaluate, workspace, tmp_path):
    metrics = evaluate(tmp_path, "--decoder", workspace / "decoder")
    world = AutoModel.from_pretrained(workspace / "world").eval()
    decoder = AutoModel.from_pretrained(workspace / "decoder").eval()
    processor = VJEPA2ACProcessor.from_pretrained(workspace / "world")
    rows = list(load_clips(str(workspace / "clips"), "validation"))
    videos = [decode_clip(row["video"], "clip", 16) for row in rows]
    mean = torch.stack(videos).double().mean(dim=(0, 1)).numpy() / 255
    found: dict[str, list] = {}
    turned = []
    for row, video in zip(rows, videos, strict=True):
        true = video.numpy() / 255
        raw = np.array(row["actions"])
        other_way = raw.copy()
        for column in ("mouse_dx", "yaw_delta"):
            other_way[1:, ACTION_COLUMNS.index(column)] *= -1
        a, d = ACTION_COLUMNS.index("key.a"), ACTION_COLUMNS.index("key.d")
        other_way[1:, a], other_way[1:, d] = raw[1:, d], raw[1:, a]
        with torch.no_grad():
            features = world.encode(processor(videos=video)["pixel_values_videos"])
            told = {"true features": decoder(features=features[:, 2:]).frames}
            for kind, actions in (("prediction", raw), ("prediction, mirrored actions", other_way)):
                inputs = processor(actions=actions[None], states=np.array(row["states"])[None, :2])
                states = processor.integrate_states(inputs["states"], inputs["actions"])
                imagined = world.rollout(features[:, :2], inputs["actions"], states)
                told[kind] = decoder(features=imagined).frames
            told["persistence"] = decoder(features=features[:, 1:2]).frames.repeat(1, 6, 1, 1, 1)
        told = {kind: frames[0].numpy() for kind, frames in told.items()}
        told |= {"last frame": np.stack([true[3]] * 12), "mean frame": np.stack([mean] * 12)}
        for kind, frames in told.items():
            of = [np.mean([decibels(frames[2 * h + i], true[4 + 2 * h + i]) for i in (0, 1)]) for h in range(6)]
            found.setdefault(kind, []).append(of)
        turn = np.cumsum(raw[1:, ACTION_COLUMNS.index("yaw_delta")])
        turned.append(np.abs((turn + 180) % 360 - 180) > 10)
    turned = np.array(turned)
    assert turned.any(axis=0).all() and not turned.all()
    for kind, values in found.items():
        values = np.array(values)
        for h, (every, large) in enumerate(
            zip(metrics["frames"]["psnr"], metrics["frames"]["psnr_large_turns"], strict=True)
        ):
            assert every["rows"] == 6 and large["rows"] == turned[:, h].sum()
            assert every["kinds"][kind]["mean"] == pytest.approx(values[:, h].mean(), rel=1e-3), kind
            assert large["kinds"][kind]["mean"] == pytest.approx(values[turned[:, h], h].mean(), rel=1e-3), kind
    first = metrics["frames"]["psnr"][0]
    gain = np.array(found["prediction"])[:, 0] - np.array(found["last frame"])[:, 0]
    assert first["over"]["last frame"]["prediction"]["mean"] == pytest.approx(gain.mean(), abs=1e-2)
    assert first["over"]["last frame"]["prediction"]["ci95"] is not None
    others = [h["kinds"]["prediction, other clip's actions"]["mean"] for h in metrics["frames"]["psnr"]]
    assert all(
        o != pytest.approx(h["kinds"]["prediction"]["mean"], rel=1e-9)
        for o, h in zip(others, metrics["frames"]["psnr"], strict=True)
    )

    page = (tmp_path / "report.html").read_text()
    assert "<h2>Frames</h2>" in page and f"{first['kinds']['prediction']['mean']:.2f}<small>" in page
    assert "drawn by the decoder" in page and "nearest real frames" not in page
    assert (tmp_path / "frames.png").read_bytes()[:4] == b"\x89PNG" and page.count("data:image/webp") == 2
    large = metrics["frames"]["psnr_large_turns"][0]["over"]
    for sentence, kind in (("Do the features say", "true features"), ("Are imagined frames better", "prediction")):
        told = page.split(sentence)[1].split("</p>")[0]
        for base in ("last frame", "mean frame"):
            figure = large[base][kind]
            low, high = figure["ci95"] or [figure["mean"]] * 2
            side = "above" if low > 0 else "below" if high < 0 else "not to be told from"
            assert f"{side} the {base}: {figure['mean']:+.2f} dB" in told
            assert (f"{low:.2f} to {high:.2f}" in told) == (figure["ci95"] is not None)
    assert metrics["decoder"] == str(workspace / "decoder")


def test_without_a_decoder_nothing_is_drawn(evaluate, tmp_path):
    metrics = evaluate(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "frames" not in metrics and "decoder" not in metrics
    assert "nearest real frames" in page and "drawn by the decoder" not in page and "<h2>Frames</h2>" not in page
    assert page.count("data:image/webp") == 2 and not (tmp_path / "frames.png").exists()


def test_rows_are_the_first_frames_of_the_tubelets_and_films_have_all(workspace):
    from vjepa_ac_hf.evaluation.pictures import picture_clips

    world = AutoModel.from_pretrained(workspace / "world").eval()
    decoder = load_decoder(str(workspace / "decoder"), world)
    features = torch.randn(1, 8, 4, 48, generator=torch.Generator().manual_seed(0))
    actions = torch.randn(2, 7, 13, generator=torch.Generator().manual_seed(1))
    states = torch.zeros(2, 8, 2)
    (pictures,) = picture_clips(
        *(world, features, torch.zeros(1, 16, 3, 32, 32, dtype=torch.uint8)),
        **dict(shown=[0], others=[1], names=["a", "b"], actions=actions, raw_actions=torch.zeros(2, 7, 38)),
        **dict(states=states, context_steps=2, horizon=3, integrate_states=None),
        **dict(decoder=decoder, mirrored=-actions),
    )
    with torch.no_grad():
        imagined = world.rollout(features[:, :2], torch.cat([actions[:1, :1], -actions[:1, 1:4]], dim=1), states[:1])
        expected = {
            "true features": decoder(features=features[:, :5]),
            "prediction, mirrored actions": decoder(features=imagined),
        }
        expected["persistence"] = decoder(features=features[:, 1:2].expand(-1, 3, -1, -1))
    for name, output in expected.items():
        assert torch.equal(pictures.rows[name], output.frames[0, ::2].permute(0, 2, 3, 1)), name
    film = pictures.film["prediction, mirrored actions"]
    assert film.shape == (10, 32, 32, 3) and not film[:4].any()  # the context's frames, here black
    told = 255 * expected["prediction, mirrored actions"].frames[0].permute(0, 2, 3, 1)
    torch.testing.assert_close(film[4:].float(), told, atol=0.501, rtol=0)
    assert list(pictures.rows)[-2:] == ["prediction, mirrored actions", "persistence"]


def test_mirrored_twice_is_the_same():
    actions = torch.randn(3, 7, 38, generator=torch.Generator().manual_seed(0))
    once = mirror_actions(actions)
    assert torch.equal(mirror_actions(once), actions)
    changed = (once != actions).flatten(0, 1).any(dim=0)
    names = [c for c, different in zip(ACTION_COLUMNS, changed.tolist(), strict=True) if different]
    assert sorted(names) == ["key.a", "key.d", "mouse_dx", "yaw_delta"]
    assert torch.equal(once[..., ACTION_COLUMNS.index("yaw_delta")], -actions[..., ACTION_COLUMNS.index("yaw_delta")])


def test_decoders_of_other_encoders_are_refused(workspace, tmp_path):
    world = AutoModel.from_pretrained(workspace / "world")
    other = tiny_model(action_space="vpt-13", action_dim=None)
    for parameter in other.encoder.parameters():
        parameter.data += 0.01
    VJEPA2ACForFrameDecoding.from_world_model(other, **SMALL).save_pretrained(tmp_path / "weights")
    with pytest.raises(
        ValueError, match=r"weights: the decoder was trained on another encoder, checksum \w{8}, the model's \w{8}"
    ):
        load_decoder(str(tmp_path / "weights"), world)
    wide = tiny_model(frame_size=[32, 48])
    VJEPA2ACForFrameDecoding.from_world_model(wide, **SMALL).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"wide: the decoder's grid is \(2, 3\), the model's \(2, 2\)"):
        load_decoder(str(tmp_path / "wide"), world)
