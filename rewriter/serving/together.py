"""What the ranks of a model do together in an export: the first one leads, all do what it asks, and it hears how that went.

A rank that fails says so, and the export ends on all ranks with its error; one that is gone is a :class:`~...PeerError`.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch.distributed as dist

from ...kernels.collectives.errors import PeerError, lost_peer
from ..errors import ExportError, TablewrightError

_END = ""


class Together:
    """``ranks``: see :class:`..sharding.Ranks` (``None``: one process, and nothing is sent). ``work``: what can be asked for, by name."""

    def __init__(self, ranks: Any, work: Mapping[str, Callable[..., Any]]) -> None:
        self._ranks, self._work = ranks, work

    @property
    def leads(self) -> bool:
        """Whether this rank is the first."""
        return self._ranks is None or self._ranks.rank == 0

    def ask(self, what: str, *arguments: Any) -> list[Any]:
        """What ``work[what](*arguments)`` returns on every rank. Raises :class:`~...ExportError` naming the first rank where it fails."""
        if self._ranks is None:
            return [self._work[what](*arguments)]
        self._say((what, arguments))
        found = self._told(self._outcome(what, arguments))
        for rank, (_, failure) in enumerate(found):
            if failure:
                raise ExportError(f"rank {rank} of {len(found)} could not do its part of the export ('{what}'): {failure}")
        return [value for value, _ in found]

    def follow(self) -> Any:
        """On other ranks: do what is asked until it is over; what the first rank gave to :meth:`end`, or its error."""
        while True:
            what, arguments = self._say(None)
            if what == _END:
                result, kind, message = arguments
                if message is not None:
                    raise _errors().get(kind, ExportError)(message)
                return result
            self._told(self._outcome(what, arguments))

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        """On the first rank: all others return ``result``, or raise ``error``."""
        if self._ranks is not None and not isinstance(error, PeerError):
            message = None if error is None else str(error) if type(error).__name__ in _errors() else f"rank 0 failed: {type(error).__name__}: {error}"
            self._say((_END, (result, type(error).__name__, message)))

    def _outcome(self, what: str, arguments: tuple) -> tuple[Any, str]:
        try:
            return self._work[what](*arguments), ""
        except PeerError:
            raise
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"

    def _told(self, outcome: tuple[Any, str]) -> list[Any]:
        """What all ranks found. Where others wait in vain for rows of this one, which failed, its own error is said here."""
        try:
            return self._hear(outcome)
        except PeerError as lost:
            if outcome[1]:
                raise PeerError(f"{lost} This rank itself failed first: {outcome[1]}") from lost
            raise

    def _say(self, value: Any) -> Any:
        held = [value]
        try:
            dist.broadcast_object_list(held, dist.get_global_rank(self._ranks.group, 0), group=self._ranks.group)
        except RuntimeError as error:
            self._lost(error)
        return held[0]

    def _hear(self, value: Any) -> list[Any]:
        found = [None] * self._ranks.world if self.leads else None
        try:
            dist.gather_object(value, found, dist.get_global_rank(self._ranks.group, 0), group=self._ranks.group)
        except RuntimeError as error:
            self._lost(error)
        return found or []

    def _lost(self, error: RuntimeError) -> NoReturn:
        raise lost_peer("an export for serving", self._ranks.rank, self._ranks.world, error) from error


def _errors() -> dict[str, type[TablewrightError]]:
    found, waiting = {}, [TablewrightError]
    while waiting:
        each = waiting.pop()
        found[each.__name__] = each
        waiting += each.__subclasses__()
    return found
