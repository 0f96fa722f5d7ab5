"""Signals that ask a run to stop, and data that do not come (docs/training.md, "Interruptions and resume")."""

import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h: a checkpoint was written, start the same command again.
EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Seconds within which a second SIGINT is the first one again: Ctrl-C reaches all processes of a terminal's job, and
# torchrun, which gets it too, passes it on (torch/distributed/elastic/multiprocessing/api.py, `close(death_sig)`).
SAME_CTRL_C = 1.0


class StopSignals:
    """SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) as a wish to stop.

    Within the context a signal ends the process at once, with status 75: what was finished is on the disk. While
    `deferred`, it sets `requested`, and a second SIGTERM or SIGINT ends the process at once (status 143 or 130).
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._deferring = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Python takes signals in its main thread alone; elsewhere (a program that embeds this one) nothing is changed.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A context in which signals only set `requested`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._deferring:
            logger.warning("%s: stopped before training went on; what was finished is kept", name)
            raise SystemExit(EXIT_INTERRUPTED)
        again = number == signal.SIGINT and time.monotonic() - self._since < SAME_CTRL_C
        if self.requested and number != signal.SIGUSR1 and not again:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested, self._since = True, time.monotonic()
        logger.warning("%s: stopping after this step with a checkpoint", name)


def kill_workers() -> None:
    """End loader workers that would be waited for at exit: those that hang, or leave signals to this process."""
    for child in multiprocessing.active_children():
        child.kill()


class LoaderTimeout(TimeoutError):
    """No batch came for too long."""


class BatchWatch:
    """An iterator that reports when its next item does not come.

    A thread warns after every `warn_seconds` of waiting for one batch of a `ClipLoader` and, after `fail_seconds`,
    stops the wait with `LoaderTimeout`. Where the wait cannot be stopped, because it is in a library's code, the
    process ends with the stacks of its threads.
    """

    def __init__(self, batches: Iterator[dict[str, Any]], warn_seconds: float, fail_seconds: float):
        self.batches, self.warn_seconds, self.fail_seconds = batches, warn_seconds, fail_seconds
        self.timed_out = False
        self._since: float | None = None
        self._closed = threading.Event()
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        if self._in_main_thread:
            self._previous = signal.signal(signal.SIGALRM, self._stop_waiting)
        threading.Thread(target=self._watch, name="batch-watch", daemon=True).start()

    def __iter__(self) -> "BatchWatch":
        return self

    def __next__(self) -> dict[str, Any]:
        self._since = time.monotonic()
        try:
            return next(self.batches)
        except LoaderTimeout:
            kill_workers()
            raise
        finally:
            self._since = None

    def close(self) -> None:
        self._closed.set()
        if self._in_main_thread:
            signal.signal(signal.SIGALRM, self._previous)

    def _stop_waiting(self, number: int, frame: FrameType | None) -> None:
        if self._since is not None and self.timed_out:
            raise LoaderTimeout(
                f"no batch came in {self.fail_seconds:g} seconds: the loader's workers hang, or the data cannot be "
                "read. --num_workers 0 shows where; --loader_timeout allows for more"
            )

    def _watch(self) -> None:
        warned: tuple[float, int] = (0.0, 0)
        while not self._closed.wait(min(self.warn_seconds, self.fail_seconds) / 10):
            since = self._since
            if since is None:
                continue
            waited = time.monotonic() - since
            times = int(waited / self.warn_seconds)
            if times and warned != (since, times):
                warned = (since, times)
                logger.warning("waiting for data: no batch for %.0f s (an error after %g s)", waited, self.fail_seconds)
            if waited > self.fail_seconds and self._in_main_thread and not self.timed_out:
                self.timed_out = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
            elif waited > 2 * self.fail_seconds:
                logger.error("no batch for %.0f s, and the wait cannot be stopped: the process ends", waited)
                faulthandler.dump_traceback(file=sys.__stderr__ or 2)
                os._exit(1)
