"""A build that is killed, anywhere and in any way, and started again gives the data set of an undisturbed one."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from helpers_build import SCRIPT, assert_same_files, contents, fork_build, make_shards, status_of

import vjepa_ac_hf.recordings.shards

NUM_SHARDS = 3
PHASES = ("planning", "first shard", "other shards", "merging")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("kill"), NUM_SHARDS, recordings=2, ticks=130)


def arguments_of(shards, output, *options):
    flags = ("--resolution", 32, "--validation_players", "silly-s1")
    return ["--shards", f"{shards}/*.tar", "--output", output, *flags, *options]


def markers(output):
    return len(list(output.glob(".build/task-*.json")))


@pytest.fixture(scope="module")
def undisturbed(shards):
    """Contents of an undisturbed build, and seconds that it takes."""
    output = shards.parent / "undisturbed"
    assert status_of(fork_build(arguments_of(shards, shards.parent / "cold"))) == 0
    begin = time.monotonic()
    process = fork_build(arguments_of(shards, output))
    assert status_of(process) == 0
    seconds = time.monotonic() - begin
    files = contents(output)
    kinds = Counter(Path(name).parent.name for name in files)
    assert kinds == {"data": NUM_SHARDS, ".build": NUM_SHARDS + 1, "listing": NUM_SHARDS, "": 3}
    return files, seconds


def phase_of(output):
    """How far a killed build came, by what it left."""
    if not (output / ".build/plan.ndjson").exists():
        return "planning"
    if markers(output) == 0:
        return "first shard"
    return "other shards" if markers(output) < NUM_SHARDS else "merging"


def kill_in(phase, arguments, output, delay):
    """Start a build and kill it `delay` seconds after it has come to `phase`. Returns the phase it was in."""
    process = fork_build(arguments)
    while PHASES.index(phase_of(output)) < PHASES.index(phase):
        time.sleep(0.0002)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    return phase_of(output) if status_of(process) == -signal.SIGKILL else "finished"


def test_killed_at_20_random_moments(shards, undisturbed, tmp_path):
    expected, seconds = undisturbed
    rng, kills = random.Random(20), Counter()
    for attempt in range(200):
        missing = [phase for phase in PHASES if not kills[phase]]
        if kills.total() >= 20 and not missing:
            break
        # Spread over the phases; where one is over sooner than it takes to kill it, sooner the next time.
        phase = missing[attempt % len(missing)] if missing and kills.total() >= 10 else PHASES[attempt % len(PHASES)]
        output = tmp_path / f"killed-{attempt}"
        at = kill_in(phase, arguments_of(shards, output), output, seconds * rng.random() ** 3 / len(PHASES))
        if at != "finished":
            kills[at] += 1
            assert status_of(fork_build(arguments_of(shards, output))) == 0
        assert_same_files(output, expected)
        shutil.rmtree(output)
    assert kills.total() >= 20 and set(kills) == set(PHASES), kills


def kill_at(step, *, torn):
    """Makes this process kill itself before its `step`-th change of the file system.

    Changes are renames, removals and syncs; with `torn`, writes too, of which half is done.
    """
    count = 0
    write_bytes = Path.write_bytes

    def counted(function):
        def wrapped(*args, **kwargs):
            nonlocal count
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*args, **kwargs)

        return wrapped

    def half(path, data):
        nonlocal count
        if count == step:
            write_bytes(path, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return write_bytes(path, data)

    for name in ("replace", "unlink", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    if torn:
        Path.write_bytes = half


def test_killed_before_every_change_of_the_file_system(shards, undisturbed, tmp_path):
    expected, _ = undisturbed
    for step in range(1000):
        output = tmp_path / f"step-{step}"
        code = status_of(fork_build(arguments_of(shards, output), lambda step=step: kill_at(step, torn=True)))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if (output / "README.md").exists():  # the last thing written: whoever sees a card has everything
            assert {name: data for name, data in contents(output).items() if name in expected} == expected
        assert status_of(fork_build(arguments_of(shards, output))) == 0
        assert_same_files(output, expected)
        shutil.rmtree(output)
    # Listings, plan, Parquet, markers and results are each written and renamed, Parquet synced.
    assert step >= 2 * (NUM_SHARDS + 1 + 2 * NUM_SHARDS + 3)


def test_killed_again_and_again_the_same_build_gets_on(shards, undisturbed, tmp_path):
    """No rerun repeats finished work: killed at every third step of its own, a build still comes to its end."""
    output, runs = tmp_path / "built", 0
    while (code := status_of(fork_build(arguments_of(shards, output), lambda: kill_at(6, torn=False)))) != 0:
        assert code == -signal.SIGKILL
        runs += 1
        assert runs < 100
    assert runs > 3
    assert_same_files(output, undisturbed[0])


def test_other_options_after_a_kill(shards, undisturbed, tmp_path):
    output = tmp_path / "built"
    process = fork_build(arguments_of(shards, output, "--clip_stride", 30))
    while markers(output) < 2:
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    status_of(process)
    assert status_of(fork_build(arguments_of(shards, output))) == 0
    assert_same_files(output, undisturbed[0])


def test_a_folder_that_is_built_anew_has_no_card(shards, undisturbed, tmp_path):
    output = tmp_path / "built"
    assert status_of(fork_build(arguments_of(shards, output, "--clip_stride", 30))) == 0
    process = fork_build(arguments_of(shards, output), lambda: kill_at(12, torn=False))
    assert status_of(process) == -signal.SIGKILL
    assert not [name for name in ("README.md", "report.json", "action_stats.json") if (output / name).exists()]
    assert status_of(fork_build(arguments_of(shards, output))) == 0
    assert_same_files(output, undisturbed[0])


def test_two_builds_of_one_folder_at_once(shards, undisturbed, tmp_path):
    output = tmp_path / "built"
    processes = [fork_build(arguments_of(shards, output)) for _ in range(2)]
    assert [status_of(process) for process in processes] == [0, 0]
    assert_same_files(output, undisturbed[0])


def test_damaged_markers_and_files_are_built_again(shards, undisturbed, tmp_path):
    output = tmp_path / "built"
    assert status_of(fork_build(arguments_of(shards, output))) == 0
    marker, other = sorted(output.glob(".build/task-*.json"))[:2]
    marker.write_bytes(marker.read_bytes()[:-20])
    other.write_bytes(b"")
    first = sorted(output.glob("data/train-*.parquet"))[-1]
    first.write_bytes(first.read_bytes()[:-1])
    assert status_of(fork_build(arguments_of(shards, output))) == 0
    assert_same_files(output, undisturbed[0])


def test_no_room_for_files_ends_clearly_and_goes_on_later(shards, undisturbed, tmp_path):
    """A limit of the file size stands for a full disk: the same place in the code, errno EFBIG for ENOSPC."""
    output, log = tmp_path / "built", tmp_path / "log"
    smallest = min(len(data) for name, data in undisturbed[0].items() if name.endswith(".parquet"))

    def prepare():
        resource.setrlimit(resource.RLIMIT_FSIZE, (smallest - 1, smallest - 1))

    assert status_of(fork_build(arguments_of(shards, output), prepare, log)) == 1
    message = log.read_text().splitlines()[-1]
    assert "error: 3 of 3 shards are not built: shard-" in message
    assert message.count("no space left, free some") == 1  # the others were not even tried
    assert "what is finished stays" in message and "Traceback" not in log.read_text()
    assert not list(output.rglob("*.tmp")) and not (output / "README.md").exists()
    assert status_of(fork_build(arguments_of(shards, output))) == 0
    assert_same_files(output, undisturbed[0])


@pytest.mark.parametrize("when", ["listing", "building"])
def test_a_file_system_that_fails_rejects_no_recording(shards, undisturbed, tmp_path, when):
    """EIO, as a network file system gives when its server does not answer, for one shard of three."""
    output, log = tmp_path / "built", tmp_path / "log"

    def prepare():
        name = {"listing": "_open_file", "building": "_read_member"}[when]
        right = getattr(vjepa_ac_hf.recordings.shards, name)

        def failing(source, *args):
            if "shard-000001" in str(getattr(source, "name", source)):
                raise OSError(errno.EIO, "Input/output error")
            return right(source, *args)

        setattr(vjepa_ac_hf.recordings.shards, name, failing)

    assert status_of(fork_build(arguments_of(shards, output), prepare, log)) == 1
    message = log.read_text().splitlines()[-1]
    assert f"[Errno 5] Input/output error: '{shards}/shard-000001.tar'" in message, message
    assert markers(output) == {"listing": 0, "building": NUM_SHARDS - 1}[when]
    assert status_of(fork_build(arguments_of(shards, output))) == 0
    assert_same_files(output, undisturbed[0])


# ---------------------------------------------------------------------------- several processes, by the program itself


def start(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition, process=None, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def workers_of(output):
    """Ids of the processes that are writing a Parquet file."""
    return {int(file.name.split("-")[-1].removesuffix(".tmp")) for file in output.glob(".build/*.parquet.*.tmp")}


def group_of(process):
    return [other for other in psutil.process_iter() if _group(other) == process.pid and other.status() != "zombie"]


def _group(process):
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


@pytest.mark.slow
def test_killed_worker_costs_its_shard_only(shards, undisturbed, tmp_path):
    output = tmp_path / "built"
    process = start(*arguments_of(shards, output, "--num_proc", 2))
    wait_for(lambda: workers_of(output), process)
    victim = workers_of(output).pop()
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    message = err.splitlines()[-1]
    assert process.returncode == 1 and f"its process {victim} was killed by SIGKILL, as the kernel does" in message
    assert f"error: 1 of {NUM_SHARDS} shards are not built: shard-" in message and "Traceback" not in err
    assert markers(output) == NUM_SHARDS - 1 and not list(output.rglob("*.tmp"))
    assert status_of(fork_build(arguments_of(shards, output))) == 0
    assert_same_files(output, undisturbed[0])


@pytest.mark.slow
def test_killed_with_two_processes(shards, undisturbed, tmp_path):
    rng = random.Random(2)
    for kill in range(4):
        output = tmp_path / f"built-{kill}"
        process = start(*arguments_of(shards, output, "--num_proc", 2))
        if kill:
            wait_for(lambda output=output: workers_of(output), process)
            time.sleep(undisturbed[1] / 2 * rng.random())
        else:
            time.sleep(3 * rng.random())  # while it imports
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert status_of(fork_build(arguments_of(shards, output))) == 0
        assert_same_files(output, undisturbed[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "whole_group", "code"),
    [
        (signal.SIGINT, True, 130),
        (signal.SIGTERM, False, 143),
        (signal.SIGKILL, False, -signal.SIGKILL),
    ],
)
def test_no_worker_outlives_a_stopped_build(shards, undisturbed, tmp_path, signum, whole_group, code):
    output = tmp_path / "built"
    process = start(*arguments_of(shards, output, "--num_proc", 2))
    wait_for(lambda: workers_of(output), process)
    (os.killpg if whole_group else os.kill)(process.pid, signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in err, err
    wait_for(lambda: not group_of(process))
    if signum != signal.SIGKILL:
        assert not list(output.rglob("*.tmp"))
    assert status_of(fork_build(arguments_of(shards, output))) == 0
    assert_same_files(output, undisturbed[0])


@pytest.mark.slow
def test_full_disk(shards, undisturbed, tmp_path):
    """A real full disk: a small file system in memory, where the machine allows to mount one."""
    output, copy = tmp_path / "disk", tmp_path / "copy"
    output.mkdir()
    need = sum(map(len, undisturbed[0].values())) // 1024
    build = " ".join([sys.executable, str(SCRIPT), *map(str, arguments_of(shards, output / "built"))])
    commands = f"""
        mount -t tmpfs -o size={need // 2}k tmpfs {output} || exit 77
        {build}; code=$?
        ls {output}/built/README.md && exit 78
        mount -o remount,size={4 * need}k {output}
        {build} || exit 79
        cp -r {output}/built {copy}
        exit $code
    """
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", commands]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare command")
    done = subprocess.run(unshare, capture_output=True, text=True)
    if done.returncode not in (0, 1, 78, 79):
        pytest.skip(f"no file system can be mounted: {done.stderr}")
    assert done.returncode == 1, done.stderr
    assert "no space left, free some" in done.stderr and "Traceback" not in done.stderr
    shutil.rmtree(copy / ".build" / "lost+found", ignore_errors=True)
    assert_same_files(copy, undisturbed[0])
