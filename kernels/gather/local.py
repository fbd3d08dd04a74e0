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

    def __init__(self, tables: Mapping[str, Table], root: Path, base: Path | None = None, part: tuple[int, int] = (0, 1)) -> None:
        self._tables = dict(tables)
        self._files: dict[Path, np.ndarray] = {}
        self._shards: dict[str, list[np.ndarray | None]] = {}
        self._firsts: dict[str, np.ndarray] = {}
        self._changes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for number, (name, table) in enumerate(self._tables.items()):
            home = root if base is None else base
            mine = [node_of(number, s, part[1]) == part[0] for s in range(len(table.shards))]
            self._shards[name] = [self._rows(home, s, table) if own else None for s, own in zip(table.shards, mine)]
            self._firsts[name] = np.array([s.first for s in table.shards], dtype=np.int64)
            if table.changes is not None and table.changes.ids.rows:
                ids = self._bytes(root, table.changes.ids).view("<i8")
                self._changes[name] = ids, self._rows(root, table.changes.rows, table)

    def lookup_many(self, requests: Requests, out: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """See the class; the rows are written to ``out``, if given. Raises :class:`UnknownTable`."""
        try:
            return [self._lookup(name, ids, None if out is None else out[k]) for k, (name, ids) in enumerate(requests)]
        except KeyError as error:
            raise UnknownTable(f"this version has no table {error}; its tables: {', '.join(self._tables)}") from None

    def _lookup(self, name: str, ids: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        shards = self._shards[name]
        if len(shards) == 1 and shards[0] is not None:
            found = shards[0].take(ids, 0, out, "raise" if out is None else "clip")  # "raise" would copy what goes to ``out`` twice
        else:
            found = self._from_shards(name, ids, out)
        changes = self._changes.get(name)
        if changes is not None:
            at = np.minimum(np.searchsorted(changes[0], ids), len(changes[0]) - 1)
            changed = changes[0][at] == ids
            if changed.any():
                found[changed] = changes[1].take(at[changed], 0)
        return found

    def _from_shards(self, name: str, ids: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        table, firsts = self._tables[name], self._firsts[name]
        found = np.empty((len(ids), table.width), table.stored) if out is None else out
        where = np.searchsorted(firsts, ids, side="right") - 1
        for number, rows in enumerate(self._shards[name]):
            mine = np.flatnonzero(where == number)
            if not len(mine):
                continue
            if rows is None:
                raise UnknownTable(f"shard {number} of table '{name}' is not served by this node")
            found[mine] = rows.take(ids[mine] - firsts[number], 0)
        return found

    def block(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
        """Where the tables ``names`` lie whole in one file, in one form: that file as ``[rows, width]``, and the row at which each begins."""
        tables = [self._tables[name] for name in names]
        first = tables[0]
        if any((t.row_dtype, t.dim, len(t.shards)) != (first.row_dtype, first.dim, 1) or t.shards[0].file != first.shards[0].file for t in tables):
            return None
        if any(name in self._changes or self._shards[name][0] is None or not self._tables[name].rows for name in names):
            return None
        file = next(flat for path, flat in self._files.items() if str(path).endswith(first.shards[0].file))
        rows = file[: len(file) // first.row_bytes * first.row_bytes].view(first.stored).reshape(-1, first.width)
        return rows, np.array([t.shards[0].offset // first.row_bytes for t in tables], dtype=np.int64)

    def _bytes(self, root: Path, shard: Shard) -> np.ndarray:
        path = root / shard.file
        if path not in self._files:
            if not path.is_file():
                raise CorruptShard(f"{path} is missing. Copy the version again")
            # a plain array over the mapping: np.memmap's own type makes every take() slower
            self._files[path] = np.asarray(np.memmap(path, dtype=np.uint8, mode="r")) if path.stat().st_size else np.empty(0, np.uint8)
        found = self._files[path][shard.offset : shard.offset + shard.bytes]
        if len(found) != shard.bytes:
            has, needed = len(self._files[path]), shard.offset + shard.bytes
            raise CorruptShard(f"{path} has {has} bytes; its manifest says {needed} at least. Copy the version again")
        return found

    def _rows(self, root: Path, shard: Shard, table: Table) -> np.ndarray:
        return self._bytes(root, shard).view(table.stored).reshape(shard.rows, table.width)

    def close(self) -> None:
        """Let the files go."""
        self._shards.clear()
        self._changes.clear()
        self._files.clear()


def node_of(table: int, shard: int, nodes: int) -> int:
    """Which of ``nodes`` serves shard number ``shard`` of table number ``table`` (numbers in the manifest's order). Tables start on
    different nodes, so that their first shards, where frequent ids often are, are spread."""
    return (table + shard) % nodes
