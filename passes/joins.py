"""Concatenations and stacks of lookup results, which a fused lookup can write directly.

A join is a ``cat`` along the last dimension or a ``stack`` just before it. If everything it joins is a lookup of the launch or
a dense tensor that is ready in time, the whole join becomes a slot; otherwise each run of neighbouring lookups does, and the
join has fewer inputs.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from .graph import Editor, Writes, aten, is_op, value_of


@dataclass(frozen=True)
class Piece:
    """One input of a join: ``width`` columns, from a lookup of the launch or from another tensor."""

    node: Node
    width: int
    is_lookup: bool


@dataclass
class Join:
    """``pieces`` are inputs ``[first, first + len(pieces))`` of the cat or stack ``node``."""

    node: Node
    first: int
    pieces: list[Piece]

    @property
    def whole(self) -> bool:
        return len(self.pieces) == len(self.node.args[0])  # type: ignore[arg-type]

    def slot_value(self):
        """The fake value of the slot ``[*leading, width]``, if shapes are known."""
        value = value_of(self.pieces[0].node)
        width = sum(p.width for p in self.pieces)
        return None if value is None else value.new_empty(*value.shape[:-1], width)

    def replace(self, editor: Editor, slot: Node) -> None:
        """Let ``slot`` take the place of the joined pieces."""
        node = self.node
        if is_op(node, aten.stack.default):
            sizes = [len(self.pieces), self.pieces[0].width]
            slot = editor.call(
                aten.unflatten.int, slot, -1, sizes, before=node, sources=[node], value=value_of(node)
            )  # fmt: skip
        if self.whole:
            editor.replace(node, slot)
        else:
            inputs = list(node.args[0])  # type: ignore[arg-type]
            inputs[self.first : self.first + len(self.pieces)] = [slot]
            editor.set_argument(node, 0, inputs)


@dataclass(frozen=True)
class Rows:
    """What is known of a lookup's result without shape propagation: its columns, and its rank if that is known."""

    width: int
    rank: int | None


def find_joins(results: dict[Node, Rows], place: Node, order: dict[Node, int], writes: Writes) -> list[Join]:
    """The joins that a launch at ``place`` can write, each lookup in one of them at most."""
    taken: set[Node] = set()
    joins: list[Join] = []
    readers = dict.fromkeys(user for result in results for user in result.users)
    for node in sorted(readers, key=order.__getitem__):
        if not _joins_columns(node, results) or writes.to(node) is not None:
            continue  # what is written to the join must not reach the lookups in it
        inputs: list[Node] = list(node.args[0])  # type: ignore[arg-type]
        if len(set(inputs)) != len(inputs):
            continue  # one result twice in a concatenation: its gradient would have two homes
        free = {n: r for n, r in results.items() if n not in taken}
        pieces = [None if writes.to(n) is not None else _piece(n, free, results, node, order[place], order) for n in inputs]
        known = [p for p in pieces if p is not None]
        if len(known) == len(pieces):
            joins.append(Join(node, 0, known))
        elif is_op(node, aten.cat.default) and len(run := _longest_run(pieces)) > 1:
            joins.append(Join(node, inputs.index(run[0].node), run))
        else:
            continue
        taken.update(p.node for p in joins[-1].pieces)
    return joins


def _longest_run(pieces: list[Piece | None]) -> list[Piece]:
    best: list[Piece] = []
    run: list[Piece] = []
    for piece in [*pieces, None]:
        if piece is not None and piece.is_lookup:
            run.append(piece)
        else:
            best = max(best, run, key=len)
            run = []
    return best


def _piece(node: Node, free: dict, results: dict, join: Node, place: int, order: dict[Node, int]) -> Piece | None:
    if node in free:
        return Piece(node, free[node].width, True)
    value = value_of(node)
    if is_op(join, aten.stack.default) or value is None or node in results:
        return None
    # Another tensor is copied into the slot, if it exists when the launch runs and its columns have a known size.
    fixed = value.dim() >= 2 and isinstance(value.shape[-1], int) and value.is_floating_point()
    return Piece(node, value.shape[-1], False) if fixed and order[node] < place else None


def _joins_columns(node: Node, results: dict[Node, Rows]) -> bool:
    if not is_op(node, aten.cat.default, aten.stack.default):
        return False
    dim = node.args[1] if len(node.args) > 1 else 0
    stacked = is_op(node, aten.stack.default)
    if dim == (-2 if stacked else -1):
        return True
    rank = next((results[n].rank for n in node.args[0] if n in results), None)  # type: ignore[union-attr]
    return isinstance(rank, int) and isinstance(dim, int) and dim == rank - 1
