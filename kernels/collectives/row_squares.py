"""Rowwise AdaGrad on tables whose rows are cut: the mean of a row's squared gradient needs all of its columns.

Ranks that hold other columns of the same rows read the same ids, so they touch the same rows in the same order: one number a row goes
to each of them. Point to point, as ranks without such a table take no part. On CPU C++ makes the squares and the step, each in one pass over
the gradients of all tables: inside a backward from the gradients of bags (``TwoPasses``: 110 instead of 115 processor ms for a step of DLRM
with 10 ids a bag, as no sums are stored), else from ``.grad`` (native/row_squares.cpp).
"""
from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..embedding.cpu import TwoPasses
from ..embedding.reference import accumulation_dtype
from ..embedding.updates import TableUpdate
from .errors import lost_peer
from .native import library as _lib
from .spec import Shard, TableLayout
from .work import group_of

Cut = tuple[str, Tensor, Tensor, Tensor, TableUpdate]  # name, block, rows int64 ascending, gradient [rows, columns], rule


class RowSquares:
    """Adds up squared sums over column shards. ``layouts``: of the tables that are cut into columns."""

    def __init__(self, layouts: Mapping[str, TableLayout], rank: int, group: str) -> None:
        self.layouts, self.rank, self.group = dict(layouts), rank, group
        self._kept: dict[tuple[str, ...], dict[tuple[int, ...], list[int]]] = {}

    def __contains__(self, name: str) -> bool:
        """Whether this rank holds columns of the table."""
        return name in self.layouts and self.layouts[name].on(self.rank) is not None

    def totals(self, names: Sequence[str], squares: Sequence[Tensor]) -> list[Tensor]:
        """For each table the sum over all columns of each touched row; ``squares`` are those over this rank's columns.

        Raises :class:`~.errors.PeerError` where a rank does not do its part."""
        alike = self._alike(tuple(names))
        flat = {ranks: torch.cat([squares[i] for i in mine]) for ranks, mine in alike.items()}
        process_group = group_of(self.group)
        peers = sorted({peer for ranks in alike for peer in ranks} - {self.rank})
        sent = {peer: torch.cat([flat[ranks] for ranks in alike if peer in ranks]) for peer in peers}
        received = {peer: torch.empty_like(flat) for peer, flat in sent.items()}
        transfers = []
        for peer in peers:
            there = dist.get_global_rank(process_group, peer)
            transfers.append(dist.P2POp(dist.isend, sent[peer], there, process_group))
            transfers.append(dist.P2POp(dist.irecv, received[peer], there, process_group))
        try:
            for work in dist.batch_isend_irecv(transfers) if transfers else []:
                work.wait()
        except RuntimeError as error:
            raise lost_peer("the exchange of rows' squared sums", self.rank, dist.get_world_size(process_group), error) from error
        found = list(squares)
        parts = {peer: iter(received[peer].split([flat[ranks].numel() for ranks in alike if peer in ranks])) for peer in peers}
        for ranks, mine in alike.items():
            total, *others = [flat[ranks] if rank == self.rank else next(parts[rank]) for rank in ranks]
            for other in others:
                total = total + other
            for i, part in zip(mine, total.split([squares[i].numel() for i in mine])):
                found[i] = part
        return found

    def _alike(self, names: tuple[str, ...]) -> dict[tuple[int, ...], list[int]]:
        """Tables by the ranks that hold their columns, in the order of these, so that all ranks get the same bits; by name, which all know."""
        alike = self._kept.get(names)
        if alike is None:
            if len(self._kept) >= 64:
                self._kept.clear()
            alike = self._kept[names] = {}
            for i in sorted(range(len(names)), key=lambda i: names[i]):
                alike.setdefault(tuple(shard.rank for shard in self._siblings(names[i])), []).append(i)
        return alike

    def _siblings(self, name: str) -> list[Shard]:
        """The shards that hold the rows of this rank's shard, by column."""
        layout = self.layouts[name]
        mine = layout.on(self.rank)
        assert mine is not None
        return sorted((s for s in layout.shards if s.row == mine.row), key=lambda s: s.column)

    def update(self, work: Sequence[Cut], spent: bool = False) -> None:
        """One step of these tables. ``spent``: nobody reads the gradients afterwards, so they may be overwritten."""
        if _lib is not None and _is_native(work):
            return self._update_natively(work)
        from ..embedding.op import implementation

        wide = [values.to(accumulation_dtype(block.dtype)) for _, block, _, values, _ in work]
        scratch: dict[tuple, Tensor] = {}
        totals = self.totals([name for name, *_ in work], [_squares(v, scratch) for v in wide])
        blocks, touched, steps, rules = [], [], [], []
        for (name, block, rows, values, rule), gradient, total in zip(work, wide, totals):
            (state,) = rule.state
            sums = state.index_select(0, rows) + (total / self.layouts[name].dim).to(state.dtype)
            state.index_copy_(0, rows, sums)
            root = (sums.to(gradient.dtype).sqrt() + rule.eps)[:, None]
            scaled = gradient.div_(root) if spent or gradient is not values else gradient / root  # what was widened is a copy
            if block.dtype == scaled.dtype:
                blocks.append(block)
                touched.append(rows)
                steps.append(scaled)
                rules.append(TableUpdate("sgd", lr=rule.lr, weight_decay=rule.weight_decay, maximize=rule.maximize))
            else:  # rounded to the block's dtype once, after the step
                held = block.index_select(0, rows).to(scaled.dtype) * (1 - rule.lr * rule.weight_decay)
                held -= rule.lr * (-scaled if rule.maximize else scaled)
                block.index_copy_(0, rows, held.to(block.dtype))
        for kind in dict.fromkeys((block.device, block.dtype) for block in blocks):
            of = [i for i, block in enumerate(blocks) if (block.device, block.dtype) == kind]
            chosen = ([each[i] for i in of] for each in (blocks, touched, steps, rules))
            implementation(kind[0]).update_from_sparse(*chosen)

    def update_in_two(self, names: Sequence[str], passes: TwoPasses) -> None:
        """The same in two passes over gradients that are not summed yet; ``names``: of the tables that these know, cut or not."""
        due = [i for i, squares in enumerate(passes.squares) if squares is not None]
        totals = self.totals([names[i] for i in due], [passes.squares[i] for i in due])
        means: list[Tensor | None] = [None] * len(names)
        dims = [self.layouts[names[i]].dim for i in due]
        if len(set(dims)) == 1:
            totals = torch.cat(totals).div_(dims[0]).split([total.numel() for total in totals])
        else:
            totals = [total / dim for total, dim in zip(totals, dims)]
        for i, total in zip(due, totals):
            means[i] = total
        passes.step(means)

    def _update_natively(self, work: Sequence[Cut]) -> None:
        assert _lib is not None
        dtype, threads = work[0][1].dtype, torch.get_num_threads()
        gradients = [values.contiguous() for _, _, _, values, _ in work]
        squares = list(torch.empty(sum(len(v) for v in gradients), dtype=dtype).split([len(v) for v in gradients]))

        def run(function, each: Sequence[Tensor]) -> None:
            words = b"".join(
                struct.pack(
                    "=8q4d", g.data_ptr(), *g.shape, one.data_ptr(), rows.data_ptr(), block.data_ptr(), block.stride(0),
                    rule.state[0].data_ptr(), self.layouts[name].dim, -rule.lr if rule.maximize else rule.lr, rule.eps,
                    1 - rule.lr * rule.weight_decay,
                )
                for (name, block, rows, _, rule), g, one in zip(work, gradients, each)
            )  # fmt: skip
            function(words, len(work), dtype == torch.float64, threads)

        run(_lib.twc_squares, squares)
        totals = [total.contiguous() for total in self.totals([name for name, *_ in work], squares)]
        run(_lib.twc_step, totals)


def _is_native(work: Sequence[Cut]) -> bool:
    """Are the tables on CPU, all float32 or all float64, with state of that dtype, and laid out as the library reads them?"""
    dtypes = {t.dtype for _, block, _, values, rule in work for t in (block, values, *rule.state)}
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64} and all(
        block.is_cpu and block.stride(1) == 1 and rows.is_contiguous() and rule.state[0].is_contiguous() for _, block, rows, _, rule in work
    )


def _squares(values: Tensor, scratch: dict[tuple, Tensor]) -> Tensor:
    """The sum of each row's squares; ``scratch`` holds the squares, so that tables take turns in one piece of memory."""
    kind = values.dtype, values.device
    held = scratch.get(kind)
    if held is None or held.numel() < values.numel():
        held = scratch[kind] = torch.empty(values.numel(), dtype=values.dtype, device=values.device)
    return torch.mul(values, values, out=held[: values.numel()].view(values.shape)).sum(1)
