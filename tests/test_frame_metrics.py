"""PSNR and SSIM against loops over pixels, their means by horizon against loops over rows, and the metrics' classes."""

import numpy as np
import pytest
import torch

from vjepa_ac_hf.evaluation.figures import resample_weights
from vjepa_ac_hf.evaluation.frame_figures import PSNR_OF_ROUNDING, aggregate_frames, psnr, ssim
from vjepa_ac_hf.evaluation.frame_metrics import PSNRMetric, SSIMMetric


def pictures(count=3, height=16, width=20, noise=0.2):
    """Smooth random pictures in [0, 1] and the same with noise."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 5, 5, generator=generator)
    true = torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear")
    return (true + noise * torch.randn(true.shape, generator=generator)).clamp(0, 1), true


def brute_ssim(told, true):
    """Wang et al. 2004, equation 13, over every window of 11 x 11 that lies within the frame, channel by channel."""
    weights = np.array([[np.exp(-(y * y + x * x) / (2 * 1.5**2)) for x in range(-5, 6)] for y in range(-5, 6)])
    weights /= weights.sum()
    found = []
    for a, b in zip(told, true, strict=True):
        for y in range(a.shape[0] - 10):
            for x in range(a.shape[1] - 10):
                p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
                mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
                var_p, var_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
                both = (weights * (p - mean_p) * (q - mean_q)).sum()
                above = (2 * mean_p * mean_q + 0.01**2) * (2 * both + 0.03**2)
                found.append(above / ((mean_p**2 + mean_q**2 + 0.01**2) * (var_p + var_q + 0.03**2)))
    return np.mean(found)


def test_psnr_is_the_definition():
    told, true = pictures()
    expected = [10 * np.log10(1 / np.mean((a - b) ** 2)) for a, b in zip(told.numpy(), true.numpy(), strict=True)]
    np.testing.assert_allclose(psnr(told, true).numpy(), expected, rtol=1e-5)
    # Of a picture that is off by 0.1 everywhere: 20 dB. Of equal ones: what rounding to bytes leaves open.
    assert float(psnr(torch.full((3, 4, 4), 0.6), torch.full((3, 4, 4), 0.5))) == pytest.approx(20, abs=1e-4)
    assert float(psnr(true[0], true[0])) == pytest.approx(PSNR_OF_ROUNDING)
    rounding = np.random.default_rng(0).uniform(-0.5, 0.5, 1_000_000) / 255
    assert pytest.approx(10 * np.log10(1 / np.mean(rounding**2)), abs=0.02) == PSNR_OF_ROUNDING


def test_ssim_is_the_definition():
    told, true = pictures(count=2)
    expected = [brute_ssim(a, b) for a, b in zip(told.double().numpy(), true.double().numpy(), strict=True)]
    np.testing.assert_allclose(ssim(told, true).numpy(), expected, rtol=1e-3)
    assert max(expected) < 0.9
    np.testing.assert_allclose(ssim(true, true).numpy(), 1, rtol=1e-5)


def test_leading_dimensions_are_kept_and_many_frames_are_taken_in_parts():
    told, true = pictures(count=130)
    for figure in (psnr, ssim):
        whole = figure(told.unflatten(0, (13, 10)), true.unflatten(0, (13, 10)))
        assert whole.shape == (13, 10)
        torch.testing.assert_close(whole[12, 9], figure(told[129], true[129]), rtol=1e-4, atol=1e-5)


def test_frames_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"one shape .*\(1, 3, 16, 16\) and \(1, 3, 16, 20\)"):
        psnr(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 20))
    with pytest.raises(ValueError, match=r"at least 11 x 11 pixels, found \(16, 8\)"):
        ssim(torch.zeros(1, 3, 16, 8), torch.zeros(1, 3, 16, 8))


KINDS = ["decoded", "mean frame", "last frame"]


def rows(count=90, sessions=6):
    rng = np.random.default_rng(1)
    session = rng.integers(0, sessions, count)
    return {
        "session_id": [f"s{i}" for i in session],
        "player_id": [f"p{i // 2}" for i in session],  # three players: intervals are over sessions
        "horizon": rng.integers(1, 4, count),
        "values": rng.normal(20, 2, (count, 3)) + session[:, None] + [3, 0, 1],
    }


def test_means_differences_and_intervals_are_those_of_loops_over_rows():
    table = rows()
    found = aggregate_frames(table, kinds=KINDS, baselines=["mean frame", "last frame"], draws=200, seed=3)
    assert [h["horizon"] for h in found] == [1, 2, 3]
    weights = resample_weights(6, 200, torch.Generator().manual_seed(3))
    for horizon in found:
        here = [i for i in range(90) if table["horizon"][i] == horizon["horizon"]]
        assert horizon["rows"] == len(here)
        for name, base in (("decoded", None), ("decoded", "last frame"), ("last frame", "mean frame")):
            values = [table["values"][i][KINDS.index(name)] for i in here]
            if base is not None:
                values = [v - table["values"][i][KINDS.index(base)] for i, v in zip(here, values, strict=True)]
            figure = horizon["kinds"][name] if base is None else horizon["over"][base][name]
            assert figure["mean"] == pytest.approx(np.mean(values))
            drawn = []
            for draw in weights:
                times = [draw[int(table["session_id"][i][1:])] for i in here]
                drawn.append(np.average(values, weights=times))
            assert figure["ci95"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist())
        assert set(horizon["over"]["mean frame"]) == {"decoded", "last frame"}


def test_one_session_gives_no_interval():
    table = rows(sessions=1)
    found = aggregate_frames(table, kinds=KINDS)
    assert all(h["kinds"]["decoded"]["ci95"] is None for h in found)


@pytest.mark.parametrize("metric", [PSNRMetric, SSIMMetric])
def test_the_metrics_equal_the_function(metric):
    table, counted = rows(), metric()
    for start in range(0, 90, 40):
        counted.add_batch(**{name: list(values[start : start + 40]) for name, values in table.items()})
    found = counted.compute(kinds=KINDS, baselines=["mean frame"], draws=50, bootstrap_seed=2)
    expected = aggregate_frames(table, kinds=KINDS, baselines=["mean frame"], draws=50, seed=2)
    assert found == {"interval_unit": "session", "horizons": expected}


def test_rows_that_do_not_fit_are_refused():
    table = rows()
    with pytest.raises(ValueError, match=r"rows of 2 kinds \['a', 'b'\], found \(90, 3\)"):
        aggregate_frames(table, kinds=["a", "b"])
    table["values"][3, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        aggregate_frames(table, kinds=KINDS)
