"""Bad ids on a GPU: found by the forward kernel, reported to the user without ever waiting for the GPU unasked.

The kernel reads nothing for a bad id and lowers, with an integer minimum, the first bad position of its lookup in
:attr:`IdStatus.found`; so what is reported does not depend on the schedule. The few numbers travel to the host behind the kernel.
:func:`check_ids` raises for every forward whose numbers have arrived: each forward calls it first, so the error comes with the
next call; an optimizer step, or a plan that asks for it, calls ``check_ids(wait=True)`` and has it at once.

Inside a CUDA graph nothing may be asked of the GPU: the numbers of its last replay are on the device, and ``check_ids(wait=True)`` after it reads
them there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from .spec import GroupSpec

NOTHING = 2**31 - 1

_pending: deque[IdStatus] = deque()
_in_graphs: list[IdStatus] = []  # recorded in CUDA graphs, which write their ``found`` anew with each replay


class IdStatus:
    """What one forward found. ``found`` is int32 ``[2, lookups]``: first position with a bad id, first bag with bad offsets.

    It keeps the ids until it is checked, to be able to name one; ids overwritten in place meanwhile are named as they are then."""

    def __init__(self, spec: GroupSpec, indices: Sequence[Tensor], offsets: Sequence[Tensor | None], device: torch.device) -> None:
        self.spec, self.indices, self.offsets = spec, list(indices), list(offsets)
        self.found = torch.full((2, max(1, len(spec.lookups))), NOTHING, dtype=torch.int32, device=device)
        self._host = self.found
        self._arrived: torch.cuda.Event | None = None

    def send(self) -> None:
        """Call after the kernel was launched: starts the copy to the host and queues this status for :func:`check_ids`."""
        if self.found.is_cuda and torch.cuda.is_current_stream_capturing():
            _in_graphs.append(self)
            return
        if self.found.is_cuda:
            self._host = torch.empty(self.found.shape, dtype=torch.int32, pin_memory=True)
            self._host.copy_(self.found, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(self.found.device))
        _pending.append(self)

    def arrived(self) -> bool:
        return self._arrived is None or self._arrived.query()

    def check(self) -> None:
        """Wait for the numbers and raise for the first lookup with something wrong.

        IndexError: an id outside its table. ValueError: offsets that decrease, do not start at 0 or pass the end."""
        if self._arrived is not None:
            self._arrived.synchronize()
        for i, (position, bag) in enumerate(self._host.t().tolist()):  # of a graph: on the device, so this waits
            if bag != NOTHING:
                raise ValueError(self._bad_offsets(i, bag))
            if position != NOTHING:
                raise IndexError(self._bad_id(i, position))

    def _bad_id(self, i: int, position: int) -> str:
        lookup = self.spec.lookups[i]
        table = self.spec.tables[lookup.table]
        lowest = -table.rows if lookup.wrap_negative else 0
        return (
            f"id {int(self.indices[i].reshape(-1)[position])} at position {position} of lookup {lookup.name!r} is out of range "
            f"for table {table.name!r} with {table.rows} rows: ids must be in [{lowest}, {table.rows}). Check how the ids are "
            "made (hashing, vocabulary size, padding value), or build the table with more rows"
        )

    def _bad_offsets(self, i: int, bag: int) -> str:
        offsets = self.offsets[i]
        assert offsets is not None
        table = self.spec.tables[self.spec.lookups[i].table].name
        return (
            f"offsets of lookup {self.spec.lookups[i].name!r} must start at 0, not decrease, and lie within the "
            f"{self.indices[i].numel()} ids; around bag {bag} they are {offsets[max(0, bag - 1) : bag + 2].tolist()} "
            f"(table {table!r})"
        )


def check_ids(wait: bool = True) -> None:
    """Check the forwards that nobody checked yet, oldest first: all of them, or with ``wait=False`` those whose numbers have
    arrived. Raises what :meth:`IdStatus.check` raises; the forwards after the guilty one stay queued."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    while _pending and (wait or _pending[0].arrived()):
        _pending.popleft().check()
    if wait:
        for status in _in_graphs:
            status.check()
