"""How a table is spread over ranks, in the words of a plan: ``sharding``, ``ranks``, ``exchange``, ``communication``,
``split`` (ranges of rows: ``even``, or cut so that the sample batch reads each range about equally often: ``sample``) and ``reduce_in_node``
(``docs/sharding.md``): whether the ranks of a node add up their parts of a bag before it crosses nodes. Where the mesh has nodes and the
exchange is pooled, ``table_row_wise`` and ``grid_shard`` do (``false``: they do not), and ``row_wise`` may (``true``).

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

from ..passes.shard_tables import BY_NODE
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
    sharding: Any, ranks: Any, exchange: Any, communication: Any, split: Any, reduce_in_node: Any, where: str
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
    if reduce_in_node is not None and not isinstance(reduce_in_node, bool):
        raise PlanError(f"{where}.reduce_in_node is {reduce_in_node!r}; it must be true or false")
    if ranks is None:
        return None
    numbers = isinstance(ranks, (list, tuple)) and all(type(r) is int and r >= 0 for r in ranks)
    if not numbers or not ranks or len(set(ranks)) != len(ranks):
        raise PlanError(f"{where}.ranks is {ranks!r}; it must be a list of different rank numbers from 0")
    return tuple(ranks)


def check_together(
    table: str, sharding: str | None, ranks: tuple[int, ...] | None, exchange: str | None = None, reduce_in_node: bool | None = None
) -> None:
    """Raises :class:`PlanError` where ``ranks`` or ``reduce_in_node`` do not go with the rest."""
    if reduce_in_node and sharding not in (*BY_NODE, "row_wise"):
        raise PlanError(
            f"table '{table}' has reduce_in_node: true and sharding {sharding or 'none'}; only where ranks of a node hold ranges of its rows is "
            f"there something to add up: {', '.join(BY_NODE)} or row_wise"
        )
    if reduce_in_node and exchange == "unique":
        raise PlanError(
            f"table '{table}' has reduce_in_node: true and exchange: unique, which sends single rows, not sums: say exchange: pooled, or leave one out"
        )
    if ranks is None:
        return
    if sharding is None or sharding == "data_parallel":
        raise PlanError(f"table '{table}' has ranks {list(ranks)} and sharding {sharding or 'none'}; ranks go with another sharding")
    if sharding == "table_wise" and len(ranks) != 1:
        raise PlanError(f"table '{table}' is table_wise on ranks {list(ranks)}; a whole table is on one rank")


def _one_of(value: Any, known: tuple[str, ...], where: str) -> None:
    if value not in known:
        raise PlanError(f"{where} is {value!r}{nearest(str(value), known)}; it must be {' | '.join(known)}")
