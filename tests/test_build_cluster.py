"""Builds on clusters: Slurm's commands are fake and really run what is submitted; Ray is real where it is installed."""

import os
import shutil
import signal
import time
from dataclasses import replace
from importlib.util import find_spec

import fake_slurm
import pytest
from helpers_build import assert_same_files, contents, fork_build, make_shards, status_of

pytest.importorskip("datatrove")

from vjepa_ac_hf.building import cluster
from vjepa_ac_hf.building.cluster import BuildTasks, ClusterSettings, FinishBuild
from vjepa_ac_hf.building.tasks import BuildError, build_task, current_plan_key, read_plan, unfinished, write_plan
from vjepa_ac_hf.recordings.splits import SplitOptions

NUM_SHARDS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("cluster"), NUM_SHARDS, recordings=2, ticks=130)


def arguments_of(shards, output, *options):
    flags = ("--resolution", 32, "--validation_players", "silly-s1")
    return ["--shards", f"{shards}/*.tar", "--output", output, *flags, *options]


@pytest.fixture(scope="module")
def undisturbed(shards):
    output = shards.parent / "undisturbed"
    assert status_of(fork_build(arguments_of(shards, output))) == 0
    return contents(output)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    for name, value in fake_slurm.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.2)
    return tmp_path / "slurm"


def run(arguments, folder, seconds=60):
    log = folder / "log"
    code = status_of(fork_build(arguments, log=log), seconds)
    return code, log.read_text()


@pytest.fixture
def planned(shards, undisturbed, tmp_path, slurm, monkeypatch):
    """A folder with a plan and held jobs, nothing built."""
    monkeypatch.setenv("FAKE_SLURM_HOLD", "1")
    output = tmp_path / "built"
    flags = ("--executor", "slurm", "--partition", "cpu", "--time", "2:00:00", "--mem_per_cpu_gb", 3, "--no_wait")
    flags += ("--max_concurrent", 2, "--slurm_setup", "module load python", "source env/bin/activate")
    flags += ("--slurm_args", "account=vpt", "nice=10")
    code, out = run(arguments_of(shards, output, *flags), tmp_path)
    assert code == 0 and "submitted 3 tasks as vpt-" in out and "not finished yet" in out, out
    return output, arguments_of(shards, output, *flags)


def test_submitted_jobs(planned, slurm, tmp_path):
    output, arguments = planned
    build, finish = fake_slurm.jobs_of(slurm)
    expected = {"array": "0-2%2", "partition": "cpu", "time": "2:00:00", "mem-per-cpu": "3G", "cpus-per-task": "1"}
    expected |= {"account": "vpt", "nice": "10"}
    assert {name: build["options"][name] for name in expected} == expected
    assert "qos" not in build["options"]
    assert finish["options"]["array"] == "0-0" and finish["options"]["dependency"] == f"afterany:{build['id']}"
    assert finish["name"] == f"{build['name']}-finish"
    lines = [line.strip() for line in build["script"].splitlines()]
    assert lines.index("module load python") < lines.index("source env/bin/activate") < lines.index("set -xe")
    assert f"launch_pickled_pipeline {output}/.build/slurm/" in build["script"]
    # Started again, it finds its jobs instead of submitting others.
    code, out = run(arguments, tmp_path)
    assert code == 0 and "already in the queue: 1 2" in out
    assert len(fake_slurm.jobs_of(slurm)) == 2


def test_tasks_in_any_order_and_twice(planned, undisturbed):
    output, _ = planned
    plan = read_plan(output)
    indices = [task.index for task in unfinished(plan.tasks, output)]
    assert sorted(indices) == [0, 1, 2]
    sizes = [plan.tasks[index].num_bytes for index in indices]
    assert sizes == sorted(sizes, reverse=True)
    step = BuildTasks(str(output), plan.key, indices)
    for rank in (2, 0, 0):
        list(step.run(None, rank, 3))
    missing = plan.tasks[indices[1]].name
    with pytest.raises(BuildError, match=f"1 of 3 shards are not built: {missing}; what is finished stays"):
        list(FinishBuild(str(output)).run())
    assert not (output / "README.md").exists()
    list(step.run(None, 1, 3))
    list(FinishBuild(str(output)).run())
    shutil.rmtree(output / ".build" / "slurm")
    assert_same_files(output, undisturbed)


def test_tasks_of_a_plan_that_was_replaced_touch_nothing(planned, shards, undisturbed):
    output, _ = planned
    old = current_plan_key(output)
    assert status_of(fork_build(arguments_of(shards, output, "--clip_stride", 30))) == 0
    before = contents(output)
    with pytest.raises(BuildError, match=f"built with other shards or options by now.* started for {old[:12]}"):
        list(BuildTasks(str(output), old, [0, 1, 2]).run(None, 0, 3))
    assert contents(output) == before


def test_a_plan_that_is_replaced_while_a_task_is_built(planned, shards):
    output, _ = planned
    plan = read_plan(output)

    def replace_plan(recordings, clips):
        write_plan(replace(plan, split=SplitOptions(validation_fraction=0.5)), output)

    with pytest.raises(BuildError, match="built with other shards or options by now"):
        build_task(plan.tasks[0], output, plan.key, replace_plan)
    assert not list((output / "data").iterdir()) and not list(output.rglob("*.tmp"))


def test_files_that_have_changed_since_the_plan_are_refused(planned, shards):
    output, _ = planned
    shard = shards / "shard-000001.tar"
    stat = shard.stat()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    try:
        with pytest.raises(BuildError, match=r"shard-000001\.tar has changed since the build was planned"):
            list(BuildTasks(str(output), current_plan_key(output), [1]).run())
    finally:
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_code_that_differs_from_the_planner_s_is_refused(planned, monkeypatch):
    output, _ = planned
    monkeypatch.setattr("vjepa_ac_hf.building.tasks._code_hash", lambda: "another version")
    with pytest.raises(BuildError, match=r"shard-00000\d\.tar was planned by other code than that installed here"):
        list(BuildTasks(str(output), current_plan_key(output), [0]).run())


@pytest.mark.parametrize(
    ("variables", "flags", "code", "message"),
    [
        ({"FAKE_SLURM": "down"}, ["--partition", "cpu"], 1, "squeue does not answer"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, ["--partition", "cpu"], 1, "start it outside of a job array"),
        ({"PATH": "/nowhere"}, ["--partition", "cpu"], 1, "needs Slurm's commands on PATH, not found: sbatch, squeue"),
        ({}, [], 2, "--executor slurm needs --partition"),
        ({}, ["--partition", "cpu", "--slurm_args", "account"], 1, "must be NAME=VALUE, found 'account'"),
        ({}, ["--partition", "cpu", "--time", "90"], 1, "must be [days-]hours:minutes:seconds, found '90'"),
        ({}, ["--partition", "cpu", "--no_wait", "--push_to_hub", "a/b"], 2, "push later, with --finish"),
    ],
)
def test_what_cannot_be_submitted(shards, slurm, tmp_path, monkeypatch, variables, flags, code, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found, out = run(arguments_of(shards, tmp_path / "built", "--executor", "slurm", *flags), tmp_path)
    assert found == code and message in out.splitlines()[-1], out
    assert not fake_slurm.jobs_of(slurm)


def test_time_limit_in_seconds():
    assert ClusterSettings(time="1-02:03:04").seconds == 93784
    assert ClusterSettings().seconds == 86400


@pytest.mark.slow
def test_killed_array_task_is_submitted_again(shards, undisturbed, slurm, tmp_path):
    output = tmp_path / "built"
    arguments = arguments_of(shards, output, "--executor", "slurm", "--partition", "cpu", "--max_concurrent", 2)
    log = tmp_path / "log"
    process = fork_build(arguments, log=log)
    deadline = time.monotonic() + 200
    while not (writing := list(output.glob(".build/*.parquet.*.tmp"))):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)
    os.kill(int(writing[0].name.split("-")[-1].removesuffix(".tmp")), signal.SIGKILL)
    assert status_of(process, 200) == 1
    message = log.read_text().splitlines()[-1]
    assert "error: 1 of 3 shards are not built: shard-" in message
    build, finish = fake_slurm.jobs_of(slurm)
    assert sorted(map(bool, build["codes"].values())) == [False, False, True] and finish["codes"] == {"0": 1}
    logs = "".join(file.read_text() for file in output.glob(".build/slurm/*/finish/slurm_logs/*.out"))
    assert "1 of 3 shards are not built: shard-" in logs

    assert run(arguments, tmp_path, 200)[0] == 0
    again = fake_slurm.jobs_of(slurm)[2:]
    assert [job["options"]["array"] for job in again] == ["0-0%2", "0-0"]
    assert [job["codes"] for job in again] == [{"0": 0}, {"0": 0}]
    shutil.rmtree(output / ".build" / "slurm")
    assert_same_files(output, undisturbed)


@pytest.mark.slow
def test_ray_on_this_machine(shards, undisturbed, tmp_path):
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    output = tmp_path / "built"
    ray = ("--executor", "ray", "--mem_per_cpu_gb", 1)
    code, out = run(arguments_of(shards, output, *ray), tmp_path, 300)
    assert code == 0, out
    shutil.rmtree(output / ".build" / "ray")
    assert_same_files(output, undisturbed)
