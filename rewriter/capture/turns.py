"""Threads that run and capture one model: a capture has its modules to itself.

For the time of a capture the modules have other classes and modes, which a run in another thread would read. Captures are rare and
runs are not, so a run only counts itself in and out; a capture waits until the others are out, and runs that start meanwhile wait for it.
"""
from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident


class Captures:
    """A lock that a thread may take again. ``waiting``: the threads that stand at it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.waiting: set[int] = set()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.waiting.add(get_ident())
            try:
                self._lock.acquire()
            finally:
                self.waiting.discard(get_ident())

    def __exit__(self, *_) -> None:
        self._lock.release()


# A capture swaps classes, switches modes and holds the random state of the process: one at a time, in whichever thread.
CAPTURING = Captures()


class Runs:
    """The runs of one model that are under way; entered for the time of each."""

    def __init__(self) -> None:
        self._depths: dict[int, int] = {}  # by thread
        self._alone: int | None = None  # the thread that captures

    def __enter__(self) -> None:
        me = get_ident()
        while True:
            self._depths[me] = self._depths.get(me, 0) + 1  # before it looks, as a capture looks here after it has said so
            if self._alone is None or self._alone == me:
                return
            self.__exit__()
            with CAPTURING:
                pass

    def __exit__(self, *_) -> None:
        me = get_ident()
        depth = self._depths.pop(me) - 1
        if depth:
            self._depths[me] = depth

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Under ``CAPTURING``: no other thread runs the model. One that waits for a capture inside a run stands still as well."""
        before, self._alone = self._alone, get_ident()
        try:
            while any(thread in sys._current_frames() for thread in set(self._depths) - {self._alone} - CAPTURING.waiting):
                time.sleep(1e-4)  # a fork leaves threads behind: those have no frame
            yield
        finally:
            self._alone = before
