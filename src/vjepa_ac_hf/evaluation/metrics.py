"""The figures of docs/evaluation.md as metrics of the library `evaluate`: rows added batch by batch, by any number of
processes."""

import importlib.util
import sys
from typing import Any

from datasets import Features, Value
from datasets import Sequence as ListOf

from .controllability_figures import controllability_figures
from .figures import BOOTSTRAP_DRAWS, VALUE_COLUMNS, aggregate_rows, unit_counts
from .probes import RETRIEVAL_COLUMNS, SENSITIVITY_COLUMNS, aggregate_retrieval, aggregate_sensitivity


def _check_evaluate_is_the_library() -> None:
    """Raise an ImportError where `import evaluate` would run another file of that name.

    A script's own folder comes first on Python's path, and `examples/evaluate.py` is such a script.
    """
    loaded = sys.modules.get("evaluate")
    spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec("evaluate")
    if spec is None or spec.submodule_search_locations is None:
        found = "nothing" if spec is None else f"the file {spec.origin}"
        raise ImportError(
            f"`import evaluate` must find the library of Hugging Face (pip install evaluate), but finds {found}. "
            "If that is a script, take its folder off sys.path before importing."
        )


_check_evaluate_is_the_library()
import evaluate  # noqa: E402 (only after the check: importing another file would run it)

_DESCRIPTION = """\
Errors of predicted features by horizon, next to persistence and to shuffled actions, with win rates and bootstrap
intervals over players (sessions where there are fewer than ten)."""

_INPUTS = """
Args:
    session_id, player_id (list of str): session and player of the clip; intervals resample players, sessions where
        there are fewer than ten players.
    horizon (list of int): steps after the context, from 1.
    error, persistence, shuffled_actions (list of float): mean absolute differences to the target.
    error_mse, persistence_mse, shuffled_actions_mse (list of float): mean square differences.
    wins, pairs, wins_large_turns, pairs_large_turns (list of float): won pairs (a tie is a half) and pairs.
    draws (int): bootstrap draws. bootstrap_seed (int): their seed.
Returns:
    clips, sessions, players (int), interval_unit (str), horizons (list of dict): the figures of each horizon.
"""

_CITATION = "Assran et al., V-JEPA 2, arXiv 2506.09985"


class LatentPredictionMetric(evaluate.Metric):
    """`aggregate_rows` as a metric: one row a clip and horizon (`table_rows` makes them), from several processes too.

    ```python
    metric = LatentPredictionMetric(num_process=world_size, process_id=rank, experiment_id="run-7")
    metric.add_batch(**table_rows(table))
    result = metric.compute(bootstrap_seed=0)  # on process 0, None on the others
    ```

    Several processes need a cache folder (`cache_dir`) that all of them see.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=Features(
                {
                    "session_id": Value("string"),
                    "player_id": Value("string"),
                    "horizon": Value("int64"),
                    **{name: Value("float64") for name in VALUE_COLUMNS},
                }
            ),
        )

    def _compute(self, *, draws: int = BOOTSTRAP_DRAWS, bootstrap_seed: int = 0, **rows: Any) -> dict[str, Any]:
        return {
            "clips": rows["horizon"].count(rows["horizon"][0]),
            **unit_counts(rows["session_id"], rows["player_id"]),
            "horizons": aggregate_rows(rows, draws=draws, seed=bootstrap_seed),
        }


class ActionSensitivityMetric(evaluate.Metric):
    """`aggregate_sensitivity` as a metric: one row a clip, horizon and column group, from several processes too.

    `compute()` gives `{"groups": {group: figures}}` on process 0 and None on the others; see `LatentPredictionMetric`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="How much predictions change when a group of action columns is exchanged with another clip's.",
            citation=_CITATION,
            inputs_description=aggregate_sensitivity.__doc__ or "",
            features=Features(
                {"group": Value("string"), **{name: Value("float64") for name in SENSITIVITY_COLUMNS}},
            ),
        )

    def _compute(self, **rows: Any) -> dict[str, Any]:
        return {"groups": aggregate_sensitivity(rows)}


class RetrievalMetric(evaluate.Metric):
    """`aggregate_retrieval` as a metric: one row a clip, from several processes too; see `LatentPredictionMetric`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="How often a prediction is nearest to its own target among those of a group of clips.",
            citation=_CITATION,
            inputs_description=aggregate_retrieval.__doc__ or "",
            features=Features({name: Value("float64") for name in RETRIEVAL_COLUMNS}),
        )

    def _compute(self, **rows: Any) -> dict[str, Any]:
        return aggregate_retrieval(rows)


class ControllabilityMetric(evaluate.Metric):
    """`controllability_figures` as a metric: one row a clip, horizon and kind, from several processes too; see
    `LatentPredictionMetric`."""

    def _info(self) -> evaluate.MetricInfo:
        names = {name: Value("string") for name in ("session_id", "player_id", "kind")}
        actions = {name: ListOf(Value("float64")) for name in ("told", "given", "before")}
        return evaluate.MetricInfo(
            description="Whether the actions that rollouts were given can be read from them, with ceilings and floors.",
            citation="Guo et al., MineWorld, arXiv 2504.08388; Baker et al., Video PreTraining, arXiv 2206.11795",
            inputs_description=controllability_figures.__doc__ or "",
            features=Features({**names, "horizon": Value("int64"), **actions}),
        )

    def _compute(
        self,
        *,
        columns: list[str],
        ticks_per_action: float,
        draws: int = BOOTSTRAP_DRAWS,
        bootstrap_seed: int = 0,
        **rows: Any,
    ) -> dict[str, Any]:
        return controllability_figures(rows, columns, ticks_per_action, draws=draws, seed=bootstrap_seed)
