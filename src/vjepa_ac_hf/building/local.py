"""A build's tasks in this process or in several of this machine (docs/data.md, "Building a data set").

Not `concurrent.futures`: there a worker that is killed (by the kernel, where memory runs out) ends all others, and
nobody knows what it was building.
"""

import errno
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from .tasks import Progress, Task, build_task, remove_dead_temporaries

logger = logging.getLogger(__name__)

# After these no task can succeed: the disk, the quota or the allowed size of a file is used up.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_local(tasks: Iterable[Task], output: Path, plan_key: str, num_proc: int, bar: tqdm) -> dict[str, str]:
    """Build tasks in `num_proc` processes (1: in this one), one task each at a time, in the order given.

    A task that fails does not stop the others, a full disk does. Workers end when this process does, however it ends.

    Args:
        tasks: unfinished ones.
        output: folder of the data set.
        plan_key: of the plan that they belong to.
        num_proc: processes; each keeps one core busy.
        bar: counts recordings; shows clips.

    Returns:
        Why tasks have failed, by the name of their shard.
    """
    waiting, clips = deque(tasks), 0

    def progress(recordings: int, new_clips: int) -> None:
        nonlocal clips
        clips += new_clips
        bar.set_postfix(clips=clips, refresh=False)
        bar.update(recordings)

    num_proc = min(num_proc, len(waiting))
    run = _run_here if num_proc <= 1 else _run_workers
    return run(waiting, output, plan_key, num_proc, progress)


def _run_here(waiting: deque[Task], output: Path, plan_key: str, num_proc: int, progress: Progress) -> dict[str, str]:
    failures: dict[str, str] = {}
    while waiting:
        task = waiting.popleft()
        try:
            build_task(task, output, plan_key, progress)
        except (ValueError, OSError) as error:
            failures[task.name] = _reason(error)
            logger.error("%s is not built: %s", task.name, _reason(error))
            if _is_full(error):
                break
    return failures


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _NO_SPACE


def _reason(error: BaseException) -> str:
    return f"no space left, free some: {error}" if _is_full(error) else f"{type(error).__name__}: {error}"


class _Worker:
    """A process that builds one task after another, and this process's end of the pipe to it."""

    def __init__(self, output: Path, plan_key: str) -> None:
        # Not fork: torch's threads do not survive it.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.task: Task | None = None
        self.process = context.Process(target=_work, args=(theirs, output, plan_key), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the process

    def start(self, task: Task) -> None:
        self.task = task
        with suppress(OSError):  # it is dead already, which reading from it will show
            self.connection.send(task)

    def end(self) -> str:
        """Why the process is no more."""
        self.process.join()
        self.connection.close()
        code = self.process.exitcode or 0
        if code < 0:
            name = signal.Signals(-code).name
            memory = ", as the kernel does where memory runs out" if name == "SIGKILL" else ""
            return f"its process {self.process.pid} was killed by {name}{memory}"
        return f"its process {self.process.pid} ended with exit status {code}, see its messages above"


def _run_workers(
    waiting: deque[Task], output: Path, plan_key: str, num_proc: int, progress: Progress
) -> dict[str, str]:
    failures: dict[str, str] = {}
    workers: dict[Connection, _Worker] = {}
    full = False
    try:
        while workers or (waiting and not full):
            while waiting and not full and len(workers) < num_proc:
                worker = _Worker(output, plan_key)
                worker.start(waiting.popleft())
                workers[worker.connection] = worker
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                worker = workers[connection]
                assert worker.task is not None
                try:
                    message = connection.recv()
                except (EOFError, OSError):  # the process has died
                    del workers[connection]
                    failures[worker.task.name] = worker.end()
                    logger.error("%s is not built: %s", worker.task.name, failures[worker.task.name])
                    remove_dead_temporaries(output)
                    continue
                if isinstance(message, tuple):
                    progress(*message)
                    continue
                if isinstance(message, logging.LogRecord):  # told here, where the progress bar is
                    logging.getLogger(message.name).handle(message)
                    continue
                if message is not None:
                    failures[worker.task.name] = _reason(message)
                    logger.error("%s is not built: %s", worker.task.name, _reason(message))
                    full |= _is_full(message)
                if waiting and not full:
                    worker.start(waiting.popleft())
                else:
                    del workers[connection]
                    connection.close()
                    worker.process.join()
    finally:
        # After an error or an interrupt: what is not finished need not be.
        for worker in workers.values():
            worker.process.terminate()
        for worker in workers.values():
            worker.process.join()
        remove_dead_temporaries(output)
    return failures


class _ToParent(QueueHandler):
    """Sends messages to the process that shows progress: on one terminal, only one can keep off the bar's line."""

    queue: Any  # a connection

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.send(record)


def _work(connection: Connection, output: Path, plan_key: str) -> None:
    """A worker: receives tasks, sends messages, (recordings, clips) that are new, after each task its error or None."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_ToParent(cast(Any, connection))])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        error: BaseException | None = None
        try:
            build_task(task, output, plan_key, lambda *new: connection.send(new))
        except (ValueError, OSError) as caught:
            # Only what surely survives the way to the parent.
            error = OSError(caught.errno, str(caught)) if isinstance(caught, OSError) else ValueError(str(caught))
        connection.send(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
