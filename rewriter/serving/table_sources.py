"""Where an export takes the rows of a table from: memory, tiers, or this rank's block of a table that is spread over ranks."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...kernels.collectives.errors import lost_peer
from ...kernels.collectives.spec import Shard, TableLayout
from ...kernels.tiers.table import TieredTable
from ..optimized_model import OptimizedModel
from ..shard_map import evenly

CHUNK_BYTES = 1 << 24  # of float32 rows that are handled at a time
Piece = tuple[Tensor, int, Tensor]  # places [n] among the ids, first column, values [n, columns]


class Source(Protocol):
    """The rows of one table ``[rows, dim]`` as this rank has them."""

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, whole rows ``[n, dim]``) of what this rank is to write, in ascending order, a chunk at a time. Over all ranks each row
        comes once. Ranks that hold columns of the same rows exchange them here: every rank runs it, and to its end."""
        ...

    def at(self, ids: Tensor) -> list[Piece]:
        """What this rank holds of the rows ``ids`` (int64 ``[n]``)."""
        ...


def step_of(dim: int) -> int:
    """Rows to handle at a time."""
    return max(1, CHUNK_BYTES // (4 * max(1, dim)))


@dataclass
class Held:
    """A tensor in memory. ``writes``: of what all ranks hold, one writes."""

    table: Tensor
    writes: bool = True

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """See :class:`Source`."""
        step = step_of(self.table.shape[1])
        for first in range(0, len(self.table) if self.writes else 0, step):
            yield first, self.table[first : first + step].detach()

    def at(self, ids: Tensor) -> list[Piece]:
        """See :class:`Source`."""
        return [(torch.arange(len(ids)), 0, self.table.detach()[ids.to(self.table.device)].cpu())] if self.writes else []


@dataclass
class InTiers:
    """A table in tiers: rows come from its store, whose cache stays as it is."""

    table: TieredTable

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """See :class:`Source`."""
        rows, step = self.table.cache.rows, step_of(self.table.memory[0].shape[1])
        for first in range(0, rows, step):
            yield first, self.table.read(first, min(rows, first + step))

    def at(self, ids: Tensor) -> list[Piece]:
        """See :class:`Source`."""
        rows = [self.table.read(i, i + 1) for i in ids.tolist()]
        return [(torch.arange(len(ids)), 0, torch.cat(rows))] if rows else []


@dataclass
class Block:
    """This rank's block of a table that is cut by rows, by columns, or both."""

    layout: TableLayout
    block: Tensor
    ranks: Any

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """See :class:`Source`. Rows that are cut are put together a chunk at a time; each of the ranks that hold columns of them writes an
        equal part. Raises :class:`~...PeerError` where another rank does not do its part."""
        mine = self.layout.on(self.ranks.rank)
        if mine is None:
            return
        block, step = self.block.detach(), step_of(self.layout.dim)
        members = sorted((s for s in self.layout.shards if (s.row, s.rows) == (mine.row, mine.rows)), key=lambda s: s.column)
        for writer, (start, count) in zip(members, evenly(mine.rows, len(members))):
            for first in range(start, start + count, step):
                piece = block[first : min(first + step, start + count)].contiguous()
                if writer.rank != mine.rank:
                    self._send(piece, writer.rank)
                else:
                    yield mine.row + first, piece if len(members) == 1 else self._joined(piece, members)

    def _joined(self, piece: Tensor, members: list[Shard]) -> Tensor:
        whole = piece.new_empty(len(piece), self.layout.dim)
        for each in members:
            columns = piece if each.rank == self.ranks.rank else self._received(piece.new_empty(len(piece), each.columns), each.rank)
            whole[:, each.column : each.column + each.columns] = columns
        return whole

    def _send(self, piece: Tensor, rank: int) -> None:
        try:
            dist.send(piece.view(torch.uint8), dist.get_global_rank(self.ranks.group, rank), group=self.ranks.group)
        except RuntimeError as error:
            raise lost_peer("an export for serving", self.ranks.rank, self.ranks.world, error) from error

    def _received(self, room: Tensor, rank: int) -> Tensor:
        try:
            dist.recv(room.view(torch.uint8), dist.get_global_rank(self.ranks.group, rank), group=self.ranks.group)
        except RuntimeError as error:
            raise lost_peer("an export for serving", self.ranks.rank, self.ranks.world, error) from error
        return room

    def at(self, ids: Tensor) -> list[Piece]:
        """See :class:`Source`."""
        mine = self.layout.on(self.ranks.rank)
        if mine is None:
            return []
        places = ((ids >= mine.row) & (ids < mine.row + mine.rows)).nonzero().flatten()
        return [(places, mine.column, self.block.detach()[(ids[places] - mine.row).to(self.block.device)].cpu())]


def source_of(model: nn.Module, name: str) -> Source:
    """The rows of ``model``'s parameter or buffer ``name``."""
    if not isinstance(model, OptimizedModel):
        return Held(_tensor(model, name))
    if model._tiered is not None and name in model._tiered.files:
        return InTiers(model._tiered.files[name])
    tensor, tables = _tensor(model._shell, name), model._sharded
    if tables is None:
        return Held(tensor)
    layout = tables.layouts.get(name)
    return Held(tensor, tables.ranks.rank == 0) if layout is None or layout.replicated else Block(layout, tensor, tables.ranks)


def _tensor(module: nn.Module, name: str) -> Tensor:
    home, _, last = name.rpartition(".")
    return getattr(module.get_submodule(home), last)
