"""Results that survive a kill, folders of one run's settings, success rates and summaries, by hand."""

import json
import logging

import pytest

pytest.importorskip("gymnasium")

from vjepa_ac_hf.envs.episodes import ResultLines, success_rate, summarize, table
from vjepa_ac_hf.evaluation.figures import wilson
from vjepa_ac_hf.records import claim_folder


def episode(agent: str, seed: int, success: bool, **more) -> dict:
    values = {"steps": 3, "start_degrees": 40.0, "final_degrees": 10.0, "return": 1.0, "ended": ""}
    return {"agent": agent, "seed": seed, "success": success, **values, **more}


def test_a_folder_belongs_to_its_settings(tmp_path):
    folder = tmp_path / "a" / "b"
    claim_folder(folder, {"seed": 0, "hold": 1})
    claim_folder(folder, {"seed": 0, "hold": 1})
    expected = r"settings.json: made with other arguments \(seed: found 0, expected 1; hold: found 1, expected 2\)"
    with pytest.raises(ValueError, match=expected + "; choose another --output"):
        claim_folder(folder, {"seed": 1, "hold": 2})
    (folder / "settings.json").write_text('{"seed": 0}')  # written before there was `hold`
    claim_folder(folder, {"seed": 0, "hold": 1}, defaults={"hold": 1})
    assert json.loads((folder / "settings.json").read_text()) == {"seed": 0, "hold": 1}
    (folder / "settings.json").write_text('{"seed": 0}')
    with pytest.raises(ValueError, match=r"\(hold: found None, expected 1\)"):
        claim_folder(folder, {"seed": 0, "hold": 1})


def test_a_killed_run_loses_the_line_it_was_writing_and_no_other(tmp_path, caplog):
    path = tmp_path / "episodes.jsonl"
    with ResultLines(path, key=("agent", "seed")) as results:
        for seed in range(3):
            results.add({"agent": "a", "seed": seed, "x": 0.1})
            assert len(path.read_text().splitlines()) == seed + 1  # there at once
    with open(path, "a") as file:
        file.write('{"agent": "a", "se')
    whole = path.read_text()
    with caplog.at_level(logging.WARNING):
        results = ResultLines(path, key=("agent", "seed"))
    assert "episodes.jsonl: 1 lines of what was not saved are dropped" in caplog.text
    assert path.read_text() == whole[: whole.rindex("\n") + 1] == "".join(f"{json.dumps(x)}\n" for x in results.lines)
    assert [line["seed"] for line in results.lines] == [0, 1, 2]
    assert ("a", 2) in results and ("a", 3) not in results
    with results:
        results.add({"agent": "a", "seed": 3, "x": 0.5})
    assert ("a", 3) in results and json.loads(path.read_text().splitlines()[3]) == {"agent": "a", "seed": 3, "x": 0.5}
    assert [line["seed"] for line in results.select([("a", 3), ("a", 1), ("b", 0)])] == [1, 3]
    assert not [file for file in tmp_path.iterdir() if file != path]


def test_lines_that_do_not_count_leave_the_file(tmp_path):
    path = tmp_path / "training.jsonl"
    assert ResultLines(path).lines == [] and not path.exists()
    path.write_text('{"step": 8}\n{"step": 16}\n{"step": 24}\n')
    assert ResultLines(path, counts=lambda line: line["step"] <= 16).lines == [{"step": 8}, {"step": 16}]
    assert path.read_text() == '{"step": 8}\n{"step": 16}\n'


def test_figures_by_agent_by_hand():
    finals = (2.0, 10.0, 40.0, 60.0)
    own = [episode("planner", i, i == 0, final_degrees=f, steps=i + 1) for i, f in enumerate(finals)]
    own[3] |= {"ended": "teleport", "return": -3.0}
    found = summarize([*own, episode("oracle", 0, True, ended="ticks")], ("oracle", "random", "planner"))
    assert list(found) == ["oracle", "planner"]
    assert found["oracle"]["success_rate"] == 1 and found["oracle"]["ended_early"] == 0
    planner = found["planner"]
    assert planner.pop("success_rate_ci95") == pytest.approx([0.0456, 0.6994], abs=1e-4)
    assert planner == {
        **{"episodes": 4, "success_rate": 0.25, "steps": 2.5, "start_degrees": 40.0, "final_degrees": 28.0},
        **{"final_degrees_median": 25.0, "return": 0.0, "ended_early": 1},
    }
    assert success_rate([]) == {"episodes": 0, "success_rate": None, "success_rate_ci95": None}
    rows = table(summarize(own, ["planner"])).splitlines()
    assert rows == ["planner   25.0 % (4.6 to 69.9) of 4, 40.0 -> 28.0 degrees"]


@pytest.mark.parametrize(("successes", "low", "high"), [(0, 0.0, 0.2775), (5, 0.2366, 0.7634), (10, 0.7225, 1.0)])
def test_wilson(successes, low, high):
    """Newcombe, Statistics in Medicine 17, 1998, has the formula; ten trials, by hand."""
    assert wilson(successes, 10) == pytest.approx([low, high], abs=1e-4)
