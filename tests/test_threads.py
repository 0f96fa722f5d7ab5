"""Threads that are the first to need something, all at once, as the listing of shards and the downloader start them."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable

from helpers_data import make_lines, name_of, shard_of, to_log, write_recording

from vjepa_ac_hf.building.plan import list_files
from vjepa_ac_hf.recordings.log import parse_recording

FORKS, THREADS = 60, 16


def first_in_many_forks(work: Callable[[], object], threads: int = THREADS) -> dict[int, int]:
    """How forked processes end in which `threads` threads do `work` at once, each as the first of its process.

    A crash of a few per cent is seen all the same: 7 times in 10 where one in fifty crashes.
    """
    ends: dict[int, int] = {}
    for _ in range(FORKS):
        process = os.fork()
        if process == 0:
            faulthandler.disable()  # a crash is counted, and its stacks are of no use
            sys.setswitchinterval(1e-6)
            errors, barrier = [], threading.Barrier(threads)

            def run(errors=errors, barrier=barrier):
                barrier.wait()
                try:
                    work()
                except BaseException as error:
                    errors.append(error)
                    raise

            started = [threading.Thread(target=run) for _ in range(threads)]
            for thread in started:
                thread.start()
            for thread in started:
                thread.join()
            os._exit(len(errors))
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        ends[status] = ends.get(status, 0) + 1
    return ends


def test_logs_are_parsed_by_many_threads_at_once():
    log = to_log(make_lines(3))
    assert first_in_many_forks(lambda: parse_recording(log, "a")) == {0: FORKS}


def test_cached_listings_are_read_by_many_threads_at_once(tmp_path):
    write_recording(tmp_path, name_of("s0"), 40)
    tars = [str(shard_of(tmp_path, tmp_path / f"shard-{i:06d}.tar", [name_of("s0")])) for i in range(THREADS)]
    expected, _ = list_files(tars, tmp_path / "out")  # fills the cache
    assert len(expected) == THREADS

    def listed():
        assert list_files(tars, tmp_path / "out")[0] == expected

    assert first_in_many_forks(listed, threads=1) == {0: FORKS}
