"""Write the rows of tables as raw files: in their stored form, a chunk at a time, with checksums."""
from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

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


def write_tables(tables: Mapping[str, Table], rows: Mapping[str, Tensor], shards: int, root: Path) -> dict[str, tuple[Shard, ...]]:
    """All rows, in ``shards`` files for each size of row: file ``k`` has the ``k``-th part of every table with such rows."""
    found: dict[str, list[Shard]] = {name: [] for name in tables}
    (root / "tables").mkdir()
    for size in dict.fromkeys(t.row_bytes for t in tables.values()):
        members = [name for name, t in tables.items() if t.row_bytes == size]
        for k in range(shards):
            with open(root / "tables" / f"{size}-byte-rows-{k:05d}-of-{shards:05d}.bin", "wb") as file:
                for name in members:
                    first, last = (tables[name].rows * each // shards for each in (k, k + 1))
                    found[name].append(append_rows(file, tables[name], first, rows[name][first:last], root))
                file.flush()
                os.fsync(file.fileno())
    return {name: tuple(each) for name, each in found.items()}


def append_rows(file: BinaryIO, table: Table, first: int, rows: Tensor, root: Path) -> Shard:
    """Add the encoded ``rows``, which are those of ``table`` from row ``first`` on, to ``file`` below ``root``."""
    found, offset, step = hashlib.sha256(), file.tell(), chunks(table)
    for start in range(0, len(rows), step):
        raw = memoryview(np.ascontiguousarray(encoded(rows[start : start + step], table)).reshape(-1))
        file.write(raw)
        found.update(raw)
    name = str(Path(file.name).relative_to(root))
    return Shard(name, offset, first, len(rows), len(rows) * table.row_bytes, found.hexdigest())


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
    home = root / "tables" / f"{number:04d}-{re.sub(r'[^0-9A-Za-z_.-]', '_', table.name)[:100]}"
    id_file = write_bytes(home / "changed.ids", [every.astype("<i8")], root)
    row_file = write_bytes(home / "changed.rows", changed, root)
    return Changes(Shard(id_file[0], 0, 0, len(every), *id_file[1:]), Shard(row_file[0], 0, 0, len(every), *row_file[1:]))
