"""Write the rows of tables as raw files: in their stored form, a chunk at a time, with checksums."""
from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...kernels.codecs.op import encode
from ...kernels.gather.tables import CODECS, Changes, Shard, Table

_CHUNK_BYTES = 1 << 24


def encoded(rows: Tensor, table: Table) -> np.ndarray:
    """``rows`` ``[n, dim]`` as they are stored: uint8 ``[n, table.row_bytes]``."""
    with torch.no_grad():
        return encode(rows.detach().cpu(), CODECS[table.row_dtype]).numpy()


def chunks(table: Table) -> int:
    """Rows to handle at a time."""
    return max(1, _CHUNK_BYTES // (4 * table.dim))


def write_bytes(path: Path, parts, root: Path) -> tuple[str, int, str]:
    """Write ``parts`` (arrays or bytes) one after the other and have them on disk: (name below ``root``, bytes, sha256)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for part in parts:
            view = part if isinstance(part, bytes) else memoryview(part.reshape(-1).view(np.uint8))
            file.write(view)
            found.update(view)
            size += len(view)
        file.flush()
        os.fsync(file.fileno())
    return str(path.relative_to(root)), size, found.hexdigest()


def write_shards(table: Table, number: int, rows: Tensor, shards: int, root: Path) -> tuple[Shard, ...]:
    """All of a table's rows in ``shards`` files of nearly equal size, rows ascending."""
    edges = [table.rows * k // shards for k in range(shards + 1)]
    return tuple(
        write_shard(table, number, k, shards, edges[k], rows[edges[k] : edges[k + 1]], root) for k in range(shards)
    )  # fmt: skip


def write_shard(table: Table, number: int, shard: int, shards: int, first: int, rows: Tensor, root: Path) -> Shard:
    """One file: ``rows`` are those from row ``first`` on."""
    step = chunks(table)
    parts = (np.ascontiguousarray(encoded(rows[i : i + step], table)) for i in range(0, len(rows), step))
    name, size, sha256 = write_bytes(folder(table, number, root) / f"{shard:05d}-of-{shards:05d}.bin", parts, root)
    return Shard(name, first, len(rows), size, sha256)


def folder(table: Table, number: int, root: Path) -> Path:
    """Where a table's files are: its number and as much of its name as a file system takes."""
    return root / "tables" / f"{number:04d}-{re.sub(r'[^0-9A-Za-z_.-]', '_', table.name)[:100]}"


def write_changes(table: Table, number: int, rows: Tensor, before, root: Path) -> Changes:
    """The rows that differ, as stored, from what ``before.lookup_many`` gives."""
    step, ids, changed = chunks(table), [], []
    for start in range(0, table.rows, step):
        these = np.arange(start, min(start + step, table.rows), dtype=np.int64)
        old = np.ascontiguousarray(before.lookup_many([(table.name, these)])[0]).view(np.uint8).reshape(len(these), -1)
        new = encoded(rows[start : start + step], table)
        other = (old != new).any(1)
        ids.append(these[other])
        changed.append(np.ascontiguousarray(new[other]))
    every = np.concatenate(ids) if ids else np.empty(0, np.int64)
    home = folder(table, number, root)
    id_file = write_bytes(home / "changed.ids", [every.astype("<i8")], root)
    row_file = write_bytes(home / "changed.rows", changed, root)
    return Changes(Shard(id_file[0], 0, len(every), *id_file[1:]), Shard(row_file[0], 0, len(every), *row_file[1:]))
