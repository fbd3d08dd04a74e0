"""Concurrent requests as one batch: while one runs, what arrives waits and goes together into the next. No request waits for company.

A request joins others only where that cannot change its answer: every input and output has the batch as its first dimension, no input
is given once for a whole batch, and all other sizes agree. If a joint batch fails, its requests are answered one by one, so that
a wrong id in one is no error of the others.
"""
from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np

from ...kernels.errors import ServingError
from .manifest import Manifest
from .predictor import Predictor
from .request_inputs import BATCH


class Busy(ServingError):
    """So many requests wait already that another one would wait too long."""


class Batcher:
    """``submit(inputs)`` -> a future of ``(outputs by name, version)``. ``max_rows``: of a joint batch; ``max_waiting``: requests;
    ``workers``: batches that run at a time. ``observe(requests, rows)`` is told of each batch."""

    def __init__(self, predictor: Predictor, max_rows: int = 1024, max_waiting: int = 256, workers: int = 1, observe=lambda requests, rows: None) -> None:
        self._predictor, self._max_rows, self._max_waiting, self._observe = predictor, max_rows, max_waiting, observe
        self._waiting: deque[tuple[dict[str, np.ndarray], Any, int, Future]] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True, name="tablewright-batches") for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """How many requests have not been begun."""
        return len(self._waiting)

    def submit(self, inputs: Mapping[str, Any]) -> Future:
        """Raises :class:`InputError` for a request that the model does not take, :class:`Busy` where too many wait."""
        version = self._predictor._version
        arrays, rows, once = version.inputs.checked(inputs)
        alone = once or not rows or not _joinable(version.manifest)
        key = None if alone else tuple((name, a.shape[1:]) for name, a in arrays.items())
        future: Future = Future()
        with self._change:
            if self._closed or len(self._waiting) >= self._max_waiting:
                raise Busy("the server is shutting down" if self._closed else f"{self._max_waiting} requests wait already; try again later")
            self._waiting.append((arrays, key, rows or 0, future))
            self._change.notify()
        return future

    def _take(self) -> list[tuple]:
        with self._change:
            while not self._waiting and not self._closed:
                self._change.wait()
            if not self._waiting:
                return []
            batch = [self._waiting.popleft()]
            rows, key = batch[0][2], batch[0][1]
            while key is not None and self._waiting and self._waiting[0][1] == key and rows + self._waiting[0][2] <= self._max_rows:
                batch.append(self._waiting.popleft())
                rows += batch[-1][2]
            return batch

    def _work(self) -> None:
        while batch := self._take():
            batch = [each for each in batch if each[3].set_running_or_notify_cancel()]
            if not batch:
                continue
            self._observe(len(batch), sum(rows for _, _, rows, _ in batch))
            if len(batch) > 1:
                try:
                    self._together(batch)
                    continue
                except Exception:
                    pass  # one by one, below: each gets an answer or an error of its own
            for arrays, _, _, future in batch:
                try:
                    future.set_result(self._predictor.outputs(arrays))
                except BaseException as error:
                    future.set_exception(error)

    def _together(self, batch: list[tuple]) -> None:
        names = batch[0][0]
        outputs, version = self._predictor.outputs({n: np.concatenate([arrays[n] for arrays, *_ in batch]) for n in names})
        start = 0
        for _, _, rows, future in batch:
            future.set_result(({name: value[start : start + rows] for name, value in outputs.items()}, version))
            start += rows

    def close(self) -> None:
        """Answer what waits, then stop."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()


def _joinable(manifest: Manifest) -> bool:
    raw = manifest.raw
    jagged = any(each.get("offsets") for each in raw["lookups"])
    return not jagged and all(d["shape"][:1] == [BATCH] for d in (*raw["inputs"], *raw["outputs"]))
