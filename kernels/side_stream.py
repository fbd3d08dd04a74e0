"""Work on a second CUDA stream beside the current one, joined before its results are read; on CPU simply done in order.

``with beside(device) as side: ...`` runs what it holds after everything that the current stream was given so far, and beside what it
is given next; ``side.join()`` makes the current stream wait for it. Tensors that are made inside and read after the join go
through :meth:`Beside.handed_over`. Works inside CUDA graph capture, where every join must come before its end.
"""
from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Beside:
    """See :func:`beside`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done: torch.cuda.Event | None = None

    def __enter__(self) -> Beside:
        if self._device.type == "cuda":
            side = _stream(self._device)
            side.wait_stream(torch.cuda.current_stream(self._device))
            self._context = torch.cuda.stream(side)
            self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record(_stream(self._device))
            self._context.__exit__(*error)

    def reads(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of ``tensors`` of the current stream until the work beside it, which reads or writes them, is done: only
        needed where they may be freed before the join."""
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(_stream(self._device))

    def handed_over(self, tensors: Iterable[Tensor]) -> None:
        """After the join: the current stream now owns ``tensors``, which were made beside it."""
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(self._device))

    def join(self) -> bool:
        """Make the current stream wait for the work; returns False, "nothing to wait for any more"."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
            self._done = None
        return False


def beside(device: torch.device) -> Beside:
    """A context whose work runs on a second stream of ``device``."""
    return Beside(device)
