"""Rewriting what the third door captured: pieces that come one by one, each through the plan's passes when it is made."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx import Graph

from ..passes.lookups import tables_read
from ..passes.records import APPLIED, SKIPPED, Record
from .capture import Captured, attach
from .capture.dynamo_frontend import Dynamo
from .capture.pieces import Rewrite
from .errors import PlanError, TablewrightError
from .pipeline import Step
from .variant import Variant, runnable

if TYPE_CHECKING:
    from .compiler import Compiler

_RULE = "capture"


def program_variant(compiler: Compiler, captured: Captured) -> Variant:
    """The variant for a program: its pieces rewritten, the tables outside of them in the report as skipped.

    Raises :class:`PlanError` where the plan demands what only a graph of the whole model can give.
    """
    program = captured.program
    assert program is not None
    _check_demands(compiler, captured)
    program.rewritten_by(piece_rewrite(compiler))
    graphs, steps = [], []
    for form in [form for piece in program.pieces for form in piece.forms]:
        if form.result is not None:
            graphs.append(form.result[0])
            steps += form.result[1]
    for piece in program.pieces:
        if piece.reason:
            captured.notes.append(f"a piece runs as dynamo captured it: {piece.reason}")
    graph = graphs[0] if graphs else captured.graph
    steps.append(_outside(captured))
    return Variant(captured, graph, steps, attach(compiler.shell, graph), graphs=graphs)


def piece_rewrite(compiler: Compiler) -> Rewrite:
    """What a program calls for each graph: the plan's passes, on the compiler's shell and by its choices."""

    def rewrite(graph: Graph) -> tuple[Callable[..., Any], Any]:
        try:
            new, steps = compiler.rewrite(graph)
            compiler.check_demands(new, steps)
        except TablewrightError:
            if any(choice.required and choice.grad != "sparse" for choice in compiler.choices.values()):
                raise
            return attach(compiler.shell, graph).forward, None
        return runnable(compiler.shell, new), (new, steps)

    return rewrite


def tables_of(captured: Captured, shell: nn.Module) -> dict[str, Any]:
    """The tables that a captured model reads, in its graph or in its pieces or between them."""
    if captured.program is None:
        return tables_read(captured.graph, shell)
    found: dict[str, Any] = {}
    for form in [form for piece in captured.program.pieces for form in piece.forms]:
        found.update(tables_read(form.graph, shell))
    named = dict(shell.named_parameters())
    return {**found, **{name: named[name] for name in captured.tables_outside}}


def on_copy(compiler: Compiler, program, *, trained_inside: bool = True):
    """The same program on ``compiler``'s shell (a copy); ``trained_inside=False``: its in-backward tables give gradients."""
    if not trained_inside:
        compiler.choices = {
            name: replace(choice, grad="sparse") if choice.grad == "in_backward" else choice
            for name, choice in compiler.choices.items()
        }
    return program.on(compiler.shell, piece_rewrite(compiler))


def _check_demands(compiler: Compiler, captured: Captured) -> None:
    """One owner of a table's updates: an update in the backward, or a freeze, needs every read of the table in one graph."""
    program = captured.program
    demanded = [name for name, choice in compiler.choices.items() if choice.required and choice.grad != "sparse"]
    whole = isinstance(program, Dynamo) and program.whole
    for name in demanded:
        if not whole or name in captured.tables_outside:
            raise PlanError(
                f"the plan asks that table '{name}' be {compiler.choices[name].detail}, which needs the whole model in one "
                f"graph; but {captured.notes[0]}. Take that entry out of the plan"
            )
    if demanded and isinstance(program, Dynamo):
        program.only_whole = True


def _outside(captured: Captured) -> Step:
    """A row for each table that nothing captured reads."""
    program = captured.program
    why = getattr(program, "why", "") or "; ".join(getattr(program, "breaks", [])) or "dynamo did not capture the code around it"
    records = tuple(
        Record("lookups", SKIPPED, name.rpartition(".")[0], _RULE, f"read outside of every captured graph; {why}")
        for name in captured.tables_outside
    )
    return Step(_RULE, "ran", records, 0.0, 0.0, captured.graph, captured.graph)


def merged(records: Iterable[Record]) -> tuple[Record, ...]:
    """The rows of several graphs. A table has one row about its updates: what was done in any graph, else the weightiest reason."""
    rows, updates = [], {}
    for r in records:
        if r.kind != "updates":
            rows.append(r)
        elif r.subject not in updates or _weight(r) > _weight(updates[r.subject]):
            updates[r.subject] = r
    return (*rows, *updates.values())


def _weight(r: Record) -> int:
    return 2 if r.status == APPLIED else int("does not read it" not in r.reason)
