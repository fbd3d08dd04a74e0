"""What each rank does in an export: hand over rows of its tables, write its rows, compare them with a base version, take checksums."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...kernels.gather.local import LocalStore
from ...kernels.gather.tables import Changes, Shard, Table
from ..errors import ExportError
from ..optimized_model import OptimizedModel
from .manifest import Manifest
from .rows_writer import ChangedRows, Files, Written, changes_of, checksums, planned
from .table_sources import Held, Piece, Source, source_of
from .together import Together

Sums = dict[str, np.ndarray]  # of the rows of tables whose mean row is wanted


class RankWork:
    """One rank's part. ``names``, of its methods: the model's parameters by what the served tables are called."""

    def __init__(self, model: nn.Module) -> None:
        sharded = model._sharded if isinstance(model, OptimizedModel) else None
        self._model, self._ranks = model, None if sharded is None else sharded.ranks
        self._changed: dict[str, ChangedRows] = {}
        self.given: dict[str, Tensor] = {}  # rows in place of those of the model's parameters with these names

    def together(self) -> Together:
        """All ranks' parts."""
        names = ("rows_of", "write", "compare", "write_changes", "checksums", "ready")
        return Together(self._ranks, {name: getattr(self, name) for name in names})

    def rows_of(self, name: str, ids: Tensor) -> list[Piece]:
        """What is here of rows of a parameter."""
        return self._source(name).at(ids)

    def write(self, root: Path, tables: Mapping[str, Table], names: Mapping[str, str]) -> dict[str, tuple[dict[int, str], np.ndarray | None]]:
        """Write the rows that are here: by table the checksums of the shards that are now whole, and the sum of the rows."""
        files = Files(root)
        found = {key: Written(files, table) for key, table in tables.items()}

        def start() -> None:
            self._see(root)
            for shard in (s for t in tables.values() for s in t.shards) if self._ranks is None or self._ranks.rank == 0 else ():
                files.write(shard.file, 0, np.empty(0, np.uint8))  # one without rows is a file too

        try:
            self._go_through(names, start, lambda key, first, rows: found[key].add(first, rows))
        finally:
            files.close()
        return {key: (each.checksums(), each.sum) for key, each in found.items()}

    def compare(self, base: Path, tables: Mapping[str, Table], names: Mapping[str, str]) -> dict[str, tuple[int, int, np.ndarray | None]]:
        """By table the first row that is here, how many differ from the version in ``base``, and the sum of all."""

        def start() -> None:
            before = LocalStore(tables, base)
            self._changed = {key: ChangedRows(table, before) for key, table in tables.items()}

        self._go_through(names, start, lambda key, first, rows: self._changed[key].add(first, rows))
        return {key: (each.first, each.count, each.sum) for key, each in self._changed.items()}

    def _go_through(self, names: Mapping[str, str], start: Callable[[], None], add: Callable[[str, int, Tensor], None]) -> None:
        """``start()``, then ``add(table, first row, rows)`` for all that is here. What fails is raised at the end: until then other ranks may
        wait for rows of this one."""
        failure: Exception | None = None
        try:
            start()
        except Exception as error:
            failure = error
        for key, name in names.items():
            for first, rows in self._source(name).parts():
                try:
                    if failure is None:
                        add(key, first, rows)
                except Exception as error:
                    failure = error
        if failure is not None:
            raise failure

    def write_changes(self, root: Path, changes: Mapping[str, Changes], places: Mapping[str, list[int]]) -> None:
        """Write what :meth:`compare` found, behind the ``places[key][rank]`` rows of others."""
        files, rank = Files(root), 0 if self._ranks is None else self._ranks.rank
        for key, each in changes.items():
            self._changed[key].write(files, each, places[key][rank])
        files.close()
        self._changed = {}

    def checksums(self, root: Path, shards: list[Shard]) -> list[str]:
        """Of this rank's share of ``shards``, which lie on disk."""
        rank, world = (0, 1) if self._ranks is None else (self._ranks.rank, self._ranks.world)
        return checksums(root, shards[rank::world])

    def ready(self) -> None:
        """Is this rank still there?"""

    def _source(self, name: str) -> Source:
        return Held(self.given[name]) if name in self.given else source_of(self._model, name)

    def _see(self, root: Path) -> None:
        if not root.is_dir():
            raise ExportError(f"this rank does not see {root}, which the first rank made. Every rank writes its own rows: export to a file system that all share")


def row_reader(together: Together, dims: Callable[[str], int], dtypes: Callable[[str], torch.dtype]) -> Callable[[str, Tensor], Tensor]:
    """Rows ``[n, dim]`` of a parameter by ids, from wherever they are."""

    def fetch(name: str, ids: Tensor) -> Tensor:
        rows = torch.empty(len(ids), dims(name), dtype=dtypes(name))
        for pieces in together.ask("rows_of", name, ids):
            for places, column, values in pieces:
                rows[places, column : column + values.shape[1]] = values
        return rows

    return fetch


def write_tables(together: Together, root: Path, tables: Mapping[str, Table], names: Mapping[str, str], shards: int) -> tuple[dict[str, Table], Sums]:
    """All rows of ``tables``, which come back with their shards."""
    places = planned(tables, shards)
    placed = {key: replace(table, shards=places[key]) for key, table in tables.items()}
    found = together.ask("write", root, placed, names)
    hashes = {key: {k: h for each in found for k, h in each[key][0].items()} for key in placed}
    left = [(key, k) for key, table in placed.items() for k in range(len(table.shards)) if k not in hashes[key]]
    for (key, k), digest in zip(left, _checksums(together, root, [placed[key].shards[k] for key, k in left])):
        hashes[key][k] = digest
    done = {
        key: replace(table, shards=tuple(replace(s, sha256=hashes[key][k]) for k, s in enumerate(table.shards))) for key, table in placed.items()
    }  # fmt: skip
    return done, _sums({key: [each[key][1] for each in found] for key in placed})


def write_changes(together: Together, root: Path, tables: Mapping[str, Table], names: Mapping[str, str], base: Manifest) -> tuple[dict[str, Table], Sums]:
    """The rows that differ from version ``base``; the tables come back with them."""
    found = together.ask("compare", base.root, dict(base.tables), names)
    changes, places = {}, {}
    for number, (key, table) in enumerate(tables.items()):
        order = sorted(range(len(found)), key=lambda rank: found[rank][key][0])  # by their first rows
        places[key], count = [0] * len(found), 0
        for rank in order:
            places[key][rank] = count
            count += found[rank][key][1]
        changes[key] = changes_of(table, number, count)
    together.ask("write_changes", root, changes, places)
    digests = _checksums(together, root, [shard for each in changes.values() for shard in (each.ids, each.rows)])
    done = {
        key: replace(table, changes=Changes(replace(changes[key].ids, sha256=digests[2 * i]), replace(changes[key].rows, sha256=digests[2 * i + 1])))
        for i, (key, table) in enumerate(tables.items())
    }
    return done, _sums({key: [each[key][2] for each in found] for key in tables})


def _checksums(together: Together, root: Path, shards: list[Shard]) -> list[str]:
    found = together.ask("checksums", root, shards) if shards else []
    return [found[i % len(found)][i // len(found)] for i in range(len(shards))]


def _sums(by_rank: Mapping[str, list[np.ndarray | None]]) -> Sums:
    return {key: np.sum(held, 0) for key, sums in by_rank.items() if (held := [s for s in sums if s is not None])}
