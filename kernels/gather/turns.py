"""How many threads work on requests at once: more only take the cores, and Python's lock, from one another. No torch.

Threads that come when all turns are taken wait in the order in which they came. Without it the operating system and Python's lock choose who goes
on, some requests wait again and again, and the slowest take four times the median (``benchmarks/serving_soak.py``). A thread that waits for
another machine gives its turn up meanwhile (:func:`leave`, :func:`back`).
"""
from __future__ import annotations

import os
import threading
from collections import deque

_thread = threading.local()  # .turns: whose turn this thread has or has left; .left: is it left?


class Turns:
    """``with turns:`` takes one of ``most`` turns. Not to be nested in a thread."""

    def __init__(self, most: int) -> None:
        self._free, self._lock = most, threading.Lock()
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        self._take(first=False)
        _thread.turns, _thread.left = self, False

    def __exit__(self, *_) -> None:
        _thread.turns = None
        if not _thread.left:
            self._give()

    def _take(self, first: bool) -> None:
        """``first``: before all that wait."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            mine = threading.Lock()
            mine.acquire()
            (self._waiting.appendleft if first else self._waiting.append)(mine)
        try:
            mine.acquire()
        except BaseException:  # Ctrl-C
            with self._lock:
                given = mine not in self._waiting
                if not given:
                    self._waiting.remove(mine)
            if given:
                self._give()
            raise

    def _give(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1


def leave() -> None:
    """Give this thread's turn, if it has one, to another thread until :func:`back`."""
    turns = getattr(_thread, "turns", None)
    if turns is not None and not _thread.left:
        _thread.left = True
        turns._give()


def back() -> None:
    """Take a turn again, if this thread left one: before those that have not begun."""
    turns = getattr(_thread, "turns", None)
    if turns is not None and _thread.left:
        turns._take(first=True)
        _thread.left = False


def cores() -> int:
    """Those that this process may run on, and 2 at least: one thread may wait for a disk while the other works."""
    return max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
