"""Write the rows of tables as raw files: in their stored form, a chunk at a time, with checksums.

Where each row goes is known before any is written, so several ranks can write into the same files, each what it holds, and the files
are the same whoever writes them.
"""
from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...kernels.codecs.op import encode
from ...kernels.gather.local import LocalStore
from ...kernels.gather.tables import CODECS, Changes, Shard, Table
from . import manifest as manifests


def encoded(rows: Tensor, table: Table) -> np.ndarray:
    """``rows`` ``[n, dim]`` as they are stored: uint8 ``[n, table.row_bytes]``."""
    with torch.no_grad():
        return encode(rows.detach().cpu(), CODECS[table.row_dtype]).numpy()


def write_bytes(path: Path, content: bytes, root: Path) -> tuple[str, int, str]:
    """Write ``content`` and have it on disk: (name below ``root``, bytes, sha256)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return str(path.relative_to(root)), len(content), hashlib.sha256(content).hexdigest()


def planned(tables: Mapping[str, Table], shards: int) -> dict[str, tuple[Shard, ...]]:
    """Where all rows will be, without checksums: in ``shards`` files for each size of row, of which file ``k`` has the ``k``-th part of
    every table with such rows."""
    found: dict[str, list[Shard]] = {name: [] for name in tables}
    for size in dict.fromkeys(t.row_bytes for t in tables.values()):
        for k in range(shards):
            file, offset = f"tables/{size}-byte-rows-{k:05d}-of-{shards:05d}.bin", 0
            for name, table in tables.items():
                if table.row_bytes == size:
                    first, last = (table.rows * each // shards for each in (k, k + 1))
                    found[name].append(Shard(file, offset, first, last - first, (last - first) * size, ""))
                    offset += (last - first) * size
    return {name: tuple(each) for name, each in found.items()}


class Files:
    """Files below ``root`` that are written at places. Several processes may write to one file."""

    def __init__(self, root: Path) -> None:
        self._root, self._open = root, dict[str, int]()

    def write(self, file: str, offset: int, content: np.ndarray) -> None:
        """Put the bytes of ``content`` there."""
        if file not in self._open:
            (self._root / file).parent.mkdir(parents=True, exist_ok=True)
            self._open[file] = os.open(self._root / file, os.O_WRONLY | os.O_CREAT, 0o644)
        left = memoryview(np.ascontiguousarray(content).reshape(-1).view(np.uint8))
        while len(left):
            done = os.pwrite(self._open[file], left, offset)
            left, offset = left[done:], offset + done

    def close(self) -> None:
        """Have everything on disk."""
        handles, self._open = self._open, {}
        try:
            for each in handles.values():
                os.fsync(each)
        finally:
            for each in handles.values():
                os.close(each)


class Written:
    """Takes the rows of ``table`` that are here, from lowest to highest, and writes them to its shards. ``sum``: of all rows in float64, where
    ``table.missing`` needs it."""

    def __init__(self, files: Files, table: Table) -> None:
        self._files, self._table = files, table
        self._hashes = [hashlib.sha256() for _ in table.shards]
        self._reached = [s.first for s in table.shards]
        self.sum: np.ndarray | None = None

    def add(self, first: int, rows: Tensor) -> None:
        """``rows`` ``[n, dim]`` from row ``first`` on."""
        self.sum = _added(self.sum, rows, self._table)
        raw = encoded(rows, self._table)
        for k, shard in enumerate(self._table.shards):
            start, stop = max(first, shard.first), min(first + len(raw), shard.first + shard.rows)
            if start < stop:
                part = np.ascontiguousarray(raw[start - first : stop - first]).reshape(-1)
                self._files.write(shard.file, shard.offset + (start - shard.first) * self._table.row_bytes, part)
                if start == self._reached[k]:
                    self._hashes[k].update(memoryview(part))
                    self._reached[k] = stop

    def checksums(self) -> dict[int, str]:
        """By number, of the shards that were written whole."""
        ends = [s.first + s.rows for s in self._table.shards]
        return {k: h.hexdigest() for k, h in enumerate(self._hashes) if self._reached[k] == ends[k] and self._table.shards[k].rows}


def _added(total: np.ndarray | None, rows: Tensor, table: Table) -> np.ndarray | None:
    if table.missing != "mean":
        return None
    more = rows.double().sum(0).cpu().numpy()
    return more if total is None else total + more


def checksums(root: Path, shards: Iterable[Shard]) -> list[str]:
    """Of what is on disk."""
    return [manifests.sha256_of(root / s.file, s.offset, s.bytes) if s.bytes else hashlib.sha256().hexdigest() for s in shards]


class ChangedRows:
    """Takes the rows of ``table`` that are here and keeps those that differ, as stored, from what ``before`` has. ``first``: the lowest
    row that is here; ``sum``: as in :class:`Written`."""

    def __init__(self, table: Table, before: LocalStore) -> None:
        self._table, self._before = table, before
        self._ids, self._rows = [np.empty(0, np.int64)], [np.empty((0, table.row_bytes), np.uint8)]
        self.first, self.count = table.rows, 0
        self.sum: np.ndarray | None = None

    def add(self, first: int, rows: Tensor) -> None:
        """``rows`` ``[n, dim]`` from row ``first`` on."""
        self.first, self.sum = min(self.first, first), _added(self.sum, rows, self._table)
        these = np.arange(first, first + len(rows), dtype=np.int64)
        old = np.ascontiguousarray(self._before.lookup_many([(self._table.name, these)])[0]).view(np.uint8).reshape(len(these), -1)
        new = encoded(rows, self._table)
        other = (old != new).any(1)
        self._ids.append(these[other])
        self._rows.append(new[other])
        self.count += int(other.sum())

    def write(self, files: Files, changes: Changes, place: int) -> None:
        """Put them behind the ``place`` changed rows that come before."""
        files.write(changes.ids.file, place * 8, np.concatenate(self._ids).astype("<i8"))
        files.write(changes.rows.file, place * self._table.row_bytes, np.concatenate(self._rows))


def changes_of(table: Table, number: int, count: int) -> Changes:
    """Where ``count`` changed rows will be, without checksums."""
    home = f"tables/{number:04d}-{re.sub(r'[^0-9A-Za-z_.-]', '_', table.name)[:100]}"
    return Changes(Shard(f"{home}/changed.ids", 0, 0, count, count * 8, ""), Shard(f"{home}/changed.rows", 0, 0, count, count * table.row_bytes, ""))
