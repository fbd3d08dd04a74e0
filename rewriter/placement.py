"""How a table is spread over ranks, in the words of a plan: ``sharding``, ``ranks``, ``exchange``, ``communication`` and
``split`` (ranges of rows: ``even``, or cut so that the sample batch reads each range about equally often: ``sample``).

================  ===================================  ==================================================================
sharding          ranks                                who holds what
================  ===================================  ==================================================================
data_parallel     none                                 every rank holds the whole table; its gradients are averaged
table_wise        one                                  that rank holds the whole table
row_wise          any (default all)                    contiguous ranges of rows, in the order of ``ranks``
column_wise       any (default all)                    contiguous ranges of columns, in the order of ``ranks``
table_row_wise    ranks of one node                    ranges of rows over the ranks of that node
grid_shard        ranks of several nodes, node by      ranges of columns over the nodes, and in each node ranges of rows over
                  node, equally many of each           its ranks
================  ===================================  ==================================================================
"""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .errors import PlanError, nearest
from .plan_words import part_from

SHARDINGS = ("data_parallel", "table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard")
EXCHANGES = ("auto", "pooled", "unique")
SPLITS = ("even", "sample")
CODECS = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class Communication:
    """In which form rows (``forward``) and their gradients (``backward``) travel: ``fp32`` (as they are), ``fp16``, ``bf16`` or ``int8``
    (row-wise scaled). Anything but ``fp32`` is ``approximate``."""

    forward: str = "fp32"
    backward: str = "fp32"

    def __post_init__(self) -> None:
        for f in fields(self):
            _one_of(getattr(self, f.name), CODECS, f"communication.{f.name}")


def communication_from(raw: Any, where: str) -> Communication:
    """From plain values, ``{forward: fp16}``. Raises :class:`PlanError`."""
    return part_from(Communication, raw, where, "{forward: fp16, backward: bf16}")


def check_placement(
    sharding: Any, ranks: Any, exchange: Any, communication: Any, split: Any, where: str
) -> tuple[int, ...] | None:  # fmt: skip
    """``ranks`` as a tuple. Raises :class:`PlanError` where a value means nothing; what fits together is known only when all entries
    that match a table are put together (:func:`check_together`)."""
    if sharding is not None:
        _one_of(sharding, SHARDINGS, f"{where}.sharding")
    if exchange is not None:
        _one_of(exchange, EXCHANGES, f"{where}.exchange")
    if split is not None:
        _one_of(split, SPLITS, f"{where}.split")
    if communication is not None and not isinstance(communication, Communication):
        raise PlanError(f"{where}.communication is {communication!r}; it must be a tw.Communication")
    if ranks is None:
        return None
    numbers = isinstance(ranks, (list, tuple)) and all(type(r) is int and r >= 0 for r in ranks)
    if not numbers or not ranks or len(set(ranks)) != len(ranks):
        raise PlanError(f"{where}.ranks is {ranks!r}; it must be a list of different rank numbers from 0")
    return tuple(ranks)


def check_together(table: str, sharding: str | None, ranks: tuple[int, ...] | None) -> None:
    """Raises :class:`PlanError` where ``ranks`` do not go with ``sharding``."""
    if ranks is None:
        return
    if sharding is None or sharding == "data_parallel":
        raise PlanError(f"table '{table}' has ranks {list(ranks)} and sharding {sharding or 'none'}; ranks go with another sharding")
    if sharding == "table_wise" and len(ranks) != 1:
        raise PlanError(f"table '{table}' is table_wise on ranks {list(ranks)}; a whole table is on one rank")


def _one_of(value: Any, known: tuple[str, ...], where: str) -> None:
    if value not in known:
        raise PlanError(f"{where} is {value!r}{nearest(str(value), known)}; it must be {' | '.join(known)}")
