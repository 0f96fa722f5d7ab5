"""The figures of frames (`frame_figures`) as metrics of the library `evaluate`.

Rows are added batch by batch, by any number of processes; nothing is downloaded.
"""

from collections.abc import Sequence
from typing import Any

from datasets import Features, Value
from datasets import Sequence as ListOf

from .figures import BOOTSTRAP_DRAWS, interval_unit
from .frame_figures import aggregate_frames
from .metrics import evaluate  # the library, checked not to be a script of that name


class _FrameMetric(evaluate.Metric):
    """A metric over rows of one figure of frames, a number a kind of frame."""

    description = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="Wang et al., Image quality assessment, IEEE Transactions on Image Processing 13(4), 2004",
            inputs_description=aggregate_frames.__doc__ or "",
            features=Features(
                {
                    "session_id": Value("string"),
                    "player_id": Value("string"),
                    "horizon": Value("int64"),
                    "values": ListOf(Value("float64")),
                }
            ),
        )

    def _compute(
        self,
        *,
        kinds: Sequence[str],
        baselines: Sequence[str] = (),
        draws: int = BOOTSTRAP_DRAWS,
        bootstrap_seed: int = 0,
        **rows: Any,
    ) -> dict[str, Any]:
        return {
            "interval_unit": interval_unit(rows["player_id"]),
            "horizons": aggregate_frames(rows, kinds=kinds, baselines=baselines, draws=draws, seed=bootstrap_seed),
        }


class PSNRMetric(_FrameMetric):
    """`aggregate_frames` of `psnr`: rows `session_id`, `player_id`, `horizon`, `values` (dB, a number a kind).

    `compute(kinds=["decoded", "mean frame", "last frame"], baselines=["mean frame", "last frame"])` gives
    `interval_unit` and `horizons`.
    """

    description = "Peak signal-to-noise ratio of frames in dB, next to baselines, by horizon."


class SSIMMetric(_FrameMetric):
    """`aggregate_frames` of `ssim`, as `PSNRMetric` has PSNR."""

    description = "Structural similarity of frames, next to baselines, by horizon."


__all__ = ["PSNRMetric", "SSIMMetric"]
