"""Frozen goals: what the package's manifests hold, the game that must be theirs, results that must not be mixed."""

import json
import math
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vizdoom")

from vjepa_ac_hf.envs import GoalViewWrapper, raw_action
from vjepa_ac_hf.envs.agents import load_policy
from vjepa_ac_hf.envs.episodes import summarize
from vjepa_ac_hf.envs.manifests import FOLDER, RECIPES, content_digest, draw_manifest, load_manifest, manifest_text

PROGRAM = runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "plan_vizdoom.py"))
NAMES = ("view-easy-v1", "view-hard-v1", "walk-v1")
# Frozen: other goals are another version, never the same name.
DIGESTS = {
    "view-easy-v1": "ade3acb20ea1c786a4c44b5e314cda3ded56913c81f71a7ce55c637a9a82631c",
    "view-hard-v1": "458e1b4afa79898e17ed552056b6fafe8cc8dc32630c1a09f7748764333591f2",
    "walk-v1": "8ee2ec89537dc51fc4afb01700ea1938dc630be49cefc3fdfd3d958a95f7c134",
}


def run(monkeypatch, output, *flags):
    monkeypatch.setattr(sys, "argv", ["plan_vizdoom.py", "--output", str(output), *map(str, flags)])
    PROGRAM["main"]()
    return json.loads((output / "summary.json").read_text())


def write(path, content, **changes):
    """A manifest file, with a hash that fits."""
    content = {**content, **changes}
    path.write_text(manifest_text({**content, "sha256": content_digest(content)}))
    return path


@pytest.fixture
def content():
    """The easy manifest's first two episodes, as a manifest of its own."""
    whole = json.loads((FOLDER / "view-easy-v1.json").read_text())
    return {**whole, "name": "two-v1", "episodes": whole["episodes"][:2]}


def test_the_manifests_are_those_of_the_names():
    assert sorted(RECIPES) == sorted(NAMES) == sorted(PROGRAM["MANIFESTS"]) == sorted(f.stem for f in FOLDER.iterdir())
    assert {name: load_manifest(name).sha256 for name in NAMES} == DIGESTS


@pytest.mark.parametrize("name", NAMES)
def test_every_goal_is_as_far_as_it_should_be(name):
    """From the poses alone, by arithmetic of its own: not what drew them."""
    manifest = load_manifest(name)
    assert len(manifest.episodes) == 100 == len(set(manifest.seeds))
    for episode in manifest.episodes:
        (x, y, _, yaw, pitch), (goal_x, goal_y, _, goal_yaw, goal_pitch) = episode["start"], episode["goal"]
        apart = abs((goal_yaw - yaw + 180) % 360 - 180)
        assert pitch == goal_pitch == 0 and episode["degrees"] == pytest.approx(apart, abs=0.01)
        moved = math.dist((x, y), (goal_x, goal_y))
        turns, keys = [move[0] for move in episode["oracle"]], {key for move in episode["oracle"] for key in move[1:]}
        # The engine rounds turns to 0.01 degrees or so a tick.
        assert abs(sum(turns)) == pytest.approx(apart, abs=0.2 * len(turns))
        if name == "walk-v1":
            assert moved >= 128 > 2 * manifest.task["tolerance_units"] - 1 and keys == {"key.w"}
        else:
            assert moved < 1e-3 and not keys and manifest.task["tolerance_units"] is None
        low, high = {"view-easy-v1": (9.9, 90), "view-hard-v1": (60, 120), "walk-v1": (9.9, 80)}[name]
        assert low <= apart <= high
        assert len(turns) + manifest.task["hold"] - 1 <= manifest.task["max_steps"]


@pytest.mark.parametrize("name", NAMES)
def test_drawing_again_gives_the_same_episodes(name):
    drawn, frozen = draw_manifest(name, episodes=3), load_manifest(name)
    assert drawn["episodes"] == frozen.episodes[:3]
    assert drawn["task"] == frozen.task and drawn["name"] == name.replace("-v1", f"-{frozen.seeds[0]}-3-v1")


def test_goals_that_do_not_count_are_left_out(monkeypatch):
    """A recipe of goals of which some are too near, and an oracle that does not stay."""
    recipe = RECIPES["view-easy-v1"]
    monkeypatch.setitem(RECIPES, "view-easy-v1", {**recipe, "degrees": [30.0, 90.0]})
    drawn = draw_manifest("view-easy-v1", episodes=3)
    assert all(e["degrees"] > 30 for e in drawn["episodes"])
    assert drawn["drawn"]["left_out"]["distance"] == drawn["episodes"][-1]["seed"] - 2 > 0
    # An oracle that turns on never stays.
    held = {**recipe, "goals": {**recipe["goals"], "steps": [2, 2]}, "task": {**recipe["task"], "max_steps": 3}}
    monkeypatch.setitem(RECIPES, "view-easy-v1", held)
    monkeypatch.setattr("vjepa_ac_hf.envs.manifests.raw_action", lambda: raw_action(turn=20))
    monkeypatch.setattr("vjepa_ac_hf.envs.manifests._TOO_MANY", 1)
    with pytest.raises(RuntimeError, match="2 seeds had 0 goals, 1 are wanted"):
        draw_manifest("view-easy-v1", episodes=1)
    # As if everybody were near: nothing is left to do.
    near = GoalViewWrapper._progress
    monkeypatch.setattr(GoalViewWrapper, "_progress", lambda *a: {**near(*a), "goal_degrees": 5.0, "success": False})
    with pytest.raises(RuntimeError, match="2 seeds had 0 goals, 1 are wanted"):
        draw_manifest("view-easy-v1", episodes=1)


def test_a_manifest_from_end_to_end(content, tmp_path, monkeypatch):
    """All rows but the planner, with a policy by an adapter of five lines that turns to the right."""
    (tmp_path / "mine.py").write_text(
        "from vjepa_ac_hf.envs import raw_action\n\n\n"
        "def turner(seed):\n    return lambda seen, info: raw_action(turn=10 if not info['success'] else 0)\n\n\n"
        "def turns(seed):\n    return lambda seen, info: raw_action(turn=10)\n"
    )
    path = write(tmp_path / "two.json", content)
    flags = ("--manifest", path, "--policy", f"{tmp_path / 'mine.py'}:turns")
    summary = run(monkeypatch, tmp_path / "out", *flags)
    manifest = load_manifest(path)
    assert {k: summary["settings"][k] for k in manifest.identity} == manifest.identity
    assert set(summary["agents"]) == {"random", "still", "oracle", "policy"}
    rates = {agent: row["success_rate"] for agent, row in summary["agents"].items()}
    assert rates["oracle"] == 1 and rates["still"] == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()]
    assert {line["manifest"] for line in lines} == {manifest.sha256}
    for line in (line for line in lines if line["agent"] == "policy" and not line["success"]):
        start, goal = (
            next(e[n][3] for e in content["episodes"] if e["seed"] == line["seed"]) for n in ("start", "goal")
        )
        apart = abs((start + 10 * line["steps"] - goal + 180) % 360 - 180)
        assert line["final_degrees"] == pytest.approx(apart, abs=0.5)
    # What an agent must not know is not told.
    with pytest.raises(KeyError, match="success"):
        run(monkeypatch, tmp_path / "out2", "--manifest", path, "--policy", f"{tmp_path / 'mine.py'}:turner")
    # Other code under the same name is another policy.
    with open(tmp_path / "mine.py", "a") as file:
        file.write("# changed\n")
    with pytest.raises(ValueError, match=r"policy_file: found \w{8}, expected \w{8}"):
        run(monkeypatch, tmp_path / "out", *flags)


def test_results_of_two_manifests_are_not_mixed(content, tmp_path, monkeypatch):
    one = write(tmp_path / "one.json", content)
    two = write(tmp_path / "two.json", content, episodes=content["episodes"][:1])
    flags = ("--agents", "still")
    run(monkeypatch, tmp_path / "out", "--manifest", one, *flags)
    digests = [load_manifest(path).sha256 for path in (one, two)]
    with pytest.raises(ValueError, match=f"manifest_sha256: found {digests[0]}, expected {digests[1]}"):
        run(monkeypatch, tmp_path / "out", "--manifest", two, *flags)
    with pytest.raises(ValueError, match="max_steps: found 8, expected 6"):
        run(monkeypatch, tmp_path / "out", "--episodes", 2, *flags)
    lines = [json.loads(line) for line in (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()]
    with pytest.raises(ValueError, match="two manifests do not belong into one table: found a, b"):
        summarize([{**lines[0], "manifest": "b"}, {**lines[1], "manifest": "a"}], ["still"])


def test_flags_that_contradict_a_manifest(content, tmp_path, monkeypatch):
    path = write(tmp_path / "two.json", content)
    with pytest.raises(ValueError, match=r"flags contradict the manifest two-v1: episodes 3 \(the manifest's is 2\), "):
        run(monkeypatch, tmp_path / "out", "--manifest", path, "--episodes", 3, "--hold", 1)
    with pytest.raises(ValueError, match=r"tolerance_degrees 4.0 \(the manifest's is 5.0\)"):
        run(monkeypatch, tmp_path / "out", "--manifest", path, "--tolerance_degrees", 4)
    assert not (tmp_path / "out").exists()
    run(monkeypatch, tmp_path / "out", "--manifest", path, "--hold", 2, "--max_steps", 8, "--agents", "still")


def test_files_that_are_no_manifest(content, tmp_path):
    good = write(tmp_path / "good.json", content)
    known = load_manifest(good).sha256
    text = good.read_text()
    cases = {
        "hash": (text.replace('"hold": 2', '"hold": 1'), f"sha256 is {known}, that of its content is [0-9a-f]{{64}}"),
        "episode": (text.replace('"seed": 1,', '"seed": 5,'), f"sha256 is {known}, that of its content is"),
        "format": (text.replace('"format": 1', '"format": 2'), "of format 2, this version reads format 1"),
        "list": ("[]", "of format 'list', this version reads format 1"),
        "no JSON": (text[:-40], "no JSON"),
        "parts": (json.dumps({"format": 1}), r"lacks \['drawn', 'episodes', 'name', 'sha256', 'task', 'version'\]"),
    }
    for name, (changed, message) in cases.items():
        (tmp_path / f"{name}.json").write_text(changed)
        with pytest.raises(ValueError, match=message):
            load_manifest(tmp_path / f"{name}.json")
    with pytest.raises(ValueError, match="name 'two-v1' is not of version 2"):
        load_manifest(write(tmp_path / "version.json", content, version=2))
    with pytest.raises(ValueError, match=r"no manifest 'view-easy-v9': neither one of \['view-easy-v1', .*nor a file"):
        load_manifest("view-easy-v9")


@pytest.mark.parametrize("part", ["start", "goal", "goal_sha256", "heading"])
def test_a_game_that_is_not_the_manifests(content, tmp_path, part):
    """A pose, a picture, a heading that this game does not give for the seed."""
    first = dict(content["episodes"][0])
    if part == "goal_sha256":
        first[part] = "0" * 16
    elif part == "heading":
        first[part] += 1
    else:
        first[part] = [first[part][0] + 0.01, *first[part][1:]]
    manifest = load_manifest(write(tmp_path / "other.json", content, episodes=[first]))
    env = manifest.make_environment()
    named = {"heading": "start"}.get(part, part)
    with pytest.raises(ValueError, match=rf"seed 0: the game is not the manifest's \({named}: found .*, expected"):
        manifest.begin(env, 0)
    with pytest.raises(ValueError, match="no episode of seed 9"):
        manifest.begin(env, 9)
    env.close()


def test_an_episode_begins_where_the_manifest_says(content, tmp_path):
    manifest = load_manifest(write(tmp_path / "two.json", content))
    env = manifest.make_environment()
    for seed in (1, 0, 1):  # whatever was played before
        seen, info = manifest.begin(env, seed)
        episode = next(e for e in content["episodes"] if e["seed"] == seed)
        assert [*info["position"], *seen["state"]] == pytest.approx(episode["start"], abs=1e-3)
        assert info["goal_degrees"] == pytest.approx(episode["degrees"], abs=0.01)
        goal = seen["goal"]
        for move in episode["oracle"]:
            seen, _, _, _, info = env.step(raw_action(turn=move[0]))
        np.testing.assert_array_equal(seen["frame"], goal)
        assert info["goal_degrees"] == 0
    env.close()


def test_policies_that_are_not_there(tmp_path):
    (tmp_path / "some.py").write_text("x = 1\n")
    for name, message in {
        "random": "a policy is 'module:function' or 'FILE.py:function', found 'random'",
        "no_such_module_here:agent": "there is no module no_such_module_here",
        f"{tmp_path}/none.py:agent": "there is no file",
        f"{tmp_path}/some.py:agent": "has no function 'agent', found None",
        f"{tmp_path}/some.py:x": "has no function 'x', found 1",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_policy(name)
    agent, checksum = load_policy("vjepa_ac_hf.envs.agents:still")
    assert agent(0)({}, {}).sum() == 1 and len(checksum) == 8


def test_making_a_manifest_by_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", f"x --make_manifest view-hard-v1 --seed 7 --episodes 2 --output {tmp_path}/m".split()
    )
    PROGRAM["main"]()
    manifest = load_manifest(tmp_path / "m" / "view-hard-7-2-v1.json")
    assert len(manifest.episodes) == 2 and all(60 <= e["degrees"] <= 120 for e in manifest.episodes)
    shutil.rmtree(tmp_path / "m")
