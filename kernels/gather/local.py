"""Rows from memory-mapped files on this machine: the default store, without a server.

Pages are read from disk when they are first looked up, and several processes share them.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import CorruptShard, UnknownTable
from .tables import Shard, Table

Requests = Sequence[tuple[str, np.ndarray]]


class LocalStore:
    """``lookup_many([(table, ids), ...])`` -> one array of stored rows ``[len(ids), table.width]`` for each, in that order.

    ``ids``: int64 ``[n]``, each a row of its table (the caller has checked). ``root``: the version's directory; ``base``: that of
    the version it is a delta of, which then holds the shards. ``part = (i, n)``: only the shards that node ``i`` of ``n`` serves.
    Raises :class:`CorruptShard` for a file that is missing or of the wrong size.
    """

    wants_unique = False  # reading a row twice costs less than finding out

    def __init__(self, tables: Mapping[str, Table], root: Path, base: Path | None = None, part: tuple[int, int] = (0, 1)) -> None:
        self._tables = dict(tables)
        self._shards: dict[str, list[np.ndarray | None]] = {}
        self._firsts: dict[str, np.ndarray] = {}
        self._changes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for number, (name, table) in enumerate(self._tables.items()):
            home = root if base is None else base
            mine = [node_of(number, s, part[1]) == part[0] for s in range(len(table.shards))]
            self._shards[name] = [_rows(home, s, table) if own else None for s, own in zip(table.shards, mine)]
            self._firsts[name] = np.array([s.first for s in table.shards], dtype=np.int64)
            if table.changes is not None and table.changes.ids.rows:
                ids = np.fromfile(_checked(root, table.changes.ids), dtype="<i8")
                self._changes[name] = ids, _rows(root, table.changes.rows, table)

    def lookup_many(self, requests: Requests) -> list[np.ndarray]:
        """See the class. Raises :class:`UnknownTable`."""
        try:
            return [self._lookup(name, ids) for name, ids in requests]
        except KeyError as error:
            raise UnknownTable(f"this version has no table {error}; its tables: {', '.join(self._tables)}") from None

    def _lookup(self, name: str, ids: np.ndarray) -> np.ndarray:
        shards = self._shards[name]
        if len(shards) == 1 and shards[0] is not None:
            found = shards[0].take(ids, 0)
        else:
            found = self._from_shards(name, ids)
        changes = self._changes.get(name)
        if changes is not None:
            at = np.minimum(np.searchsorted(changes[0], ids), len(changes[0]) - 1)
            changed = changes[0][at] == ids
            if changed.any():
                found[changed] = changes[1].take(at[changed], 0)
        return found

    def _from_shards(self, name: str, ids: np.ndarray) -> np.ndarray:
        table, firsts = self._tables[name], self._firsts[name]
        found = np.empty((len(ids), table.width), table.stored)
        where = np.searchsorted(firsts, ids, side="right") - 1
        for number, rows in enumerate(self._shards[name]):
            mine = np.flatnonzero(where == number)
            if not len(mine):
                continue
            if rows is None:
                raise UnknownTable(f"shard {number} of table '{name}' is not served by this node")
            found[mine] = rows.take(ids[mine] - firsts[number], 0)
        return found

    def close(self) -> None:
        """Let the files go."""
        self._shards.clear()
        self._changes.clear()


def node_of(table: int, shard: int, nodes: int) -> int:
    """Which of ``nodes`` serves shard number ``shard`` of table number ``table`` (numbers in the manifest's order). Tables start on
    different nodes, so that their first shards, where frequent ids often are, are spread."""
    return (table + shard) % nodes


def _checked(root: Path, shard: Shard) -> Path:
    path = root / shard.file
    size = path.stat().st_size if path.is_file() else -1
    if size != shard.bytes:
        has = "is missing" if size < 0 else f"has {size} bytes"
        raise CorruptShard(f"{path} {has}; its manifest says {shard.bytes} bytes. Copy the version again")
    return path


def _rows(root: Path, shard: Shard, table: Table) -> np.ndarray:
    path = _checked(root, shard)
    if shard.rows == 0:
        return np.empty((0, table.width), table.stored)
    # a plain array over the mapping: np.memmap's own type makes every take() slower
    return np.asarray(np.memmap(path, dtype=table.stored, mode="r", shape=(shard.rows, table.width)))
