"""Makes the variants of one model: captures a method, decides who updates which table, and runs the plan's passes."""
from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.optim import Optimizer

from ..kernels.dense.fused_step import has_fused_step
from ..kernels.embedding import cpu
from ..kernels.embedding.op import OP
from ..kernels.embedding.optimizers import RowUpdates
from ..kernels.embedding.row_wise import row_wise
from ..kernels.embedding.spec import decode
from ..passes import IN_TIERS, OVER_RANKS
from ..passes.lookups import tables_read
from ..passes.records import APPLIED, Record
from ..passes.table_gradients import Choice
from .bisect import first_difference
from .capture import Captured, attach, capture
from .capture.check import undisturbed
from .capture.data_guard import asserted
from .capture.shell import TICKET
from .capture.stored import refuse_other_reads
from .compressed_tables import CompressedTables, is_table
from .data_ways import say
from .dynamic_tables import AnyIds
from .embedding_optimizer import decide
from .equivalence import numeric_check
from .errors import PlanError, TablewrightError
from .methods import FORWARD
from .optimized_model import OptimizedModel
from .pipeline import Check, Step, run_passes
from .plan import Plan, TablePlan
from .programs import merged, program_variant, tables_of
from .report import Report
from .sample_reads import reads_of
from .samples import Samples
from .sharding import Ranks, ShardedTables, prepare
from .tiers import TieredTables
from .variant import Variant

_MAX_VARIANTS = 16
_MAX_WAYS = 4  # graphs for one way of the data each, before pieces take what is left


class Compiler:
    """Makes variants of one model: once in ``optimize``, and again when a guard of all present ones fails."""

    def __init__(
        self, shell: nn.Module, originals: Mapping[str, nn.Module], plan: Plan, samples: dict[str, Samples], verify: str,
        ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.shell = shell
        self.ranks = ranks
        self.sharded: ShardedTables | None = None
        self.tiered: TieredTables | None = None
        self.empty: set[int] = set()  # tables that hold no rows yet
        self.originals = {path: weakref.ref(module) for path, module in originals.items()}
        self.plan = plan
        self.samples = samples
        self.verify = verify
        self.tables: dict[str, Tensor] = {}
        self.choices: dict[str, Choice] = {}
        self.resolved: dict[str, TablePlan] = {}
        self.plan_optimizer: RowUpdates | None = None
        self.user_optimizer: weakref.ref | None = None
        self.row_wise_tables: list[str] = []
        self.any_ids = AnyIds(shell, plan)
        self.stored: dict[str, tuple[int, int]] = {}  # tables in memory of their own: bytes in the plain model, and here
        self.compressed = CompressedTables()
        self.timings: dict[Any, Any] = {}  # what pays was timed once: all variants, copies and bisections make the same rewrites

    def for_copy(self, shell: nn.Module) -> Compiler:
        """For a deep copy of the model, which no longer follows the user's own."""
        result = Compiler(shell, {}, self.plan, self.samples, self.verify)
        named = dict([*shell.named_parameters(remove_duplicate=False), *shell.named_buffers(remove_duplicate=False)])
        result.tables = {name: named[name] for name in self.tables}
        result.choices, result.stored, result.compressed, result.timings = self.choices, self.stored, self.compressed, self.timings
        return result

    def compile_all(self, optimizer: Optimizer | None) -> list[Variant]:
        """The first variant of ``forward`` and of each method that has sample inputs. All are captured before it is decided who
        updates which table."""
        captured = []
        for entry, samples in self.samples.items():
            if samples.args is not None or (entry == FORWARD and all(s.args is None for s in self.samples.values())):
                captured.append(self._capture(entry, samples.args, samples.kwargs, samples.more))
        read: dict[str, Tensor] = {}
        for each in captured:
            read.update(tables_of(each, self.shell))
        self._decide(read, optimizer)
        if self.ranks is not None:
            self.sharded = ShardedTables(self.ranks, self.tables, self.resolved, self.plan.numerics)
            self.sharded.refuse_programs(captured)
            self.choices = self.sharded.choices(self.choices)
        return [self._rewritten(each, self.samples[each.entry].args, self.samples[each.entry].kwargs) for each in captured]

    def compile(self, entry: str, args: Any, kwargs: Any, form: str = "one graph", why: str = "") -> Variant:
        """A variant for such inputs: capture (see ``capture()`` for ``form``), and run the plan's passes."""
        with self.whole():
            return self._rewritten(self._capture(entry, args, kwargs, form=form, why=why), args, kwargs)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The shell with whole tables, as a capture needs them."""
        own = self.sharded or self.tiered
        with nullcontext() if own is None else own.whole_tables(self.shell), self.any_ids:
            yield

    def _capture(self, entry: str, args: Any, kwargs: Any, more: Any = None, form: str = "one graph", why: str = "") -> Captured:
        alive = {path: module for path, ref in self.originals.items() if (module := ref()) is not None}
        batches = args if args is None else [(args, kwargs), *(more or [])]
        with self.any_ids:
            return capture(self.shell, batches, originals=alive, entry=entry, form=form, why=why)

    def _rewritten(self, captured: Captured, args: Any, kwargs: Any) -> Variant:
        self.shell.__dict__.setdefault(TICKET, torch.zeros((), dtype=torch.int64))
        if self.stored or self.compressed.saved:
            refuse_other_reads(captured, self.shell)
        if self.ranks is not None:
            prepare(self.shell)
        if captured.program is not None:
            if self.sharded is not None:
                self.sharded.settle(None)
            if self.tiered is not None:
                self.tiered.refuse_program(captured)
            return program_variant(self, captured)
        check = None
        if self.verify == "numerics" and args is not None:
            check = numeric_check(self.shell, captured, args, kwargs)
        graph, steps = self.rewrite(captured.graph, check=check)
        self.check_demands(graph, steps)
        if args is not None:
            captured.guards.require(_joined_widths(captured, graph))
        if self.sharded is not None:
            leaves = None if args is None else list(captured.guards.flatten(args, kwargs))
            self.sharded.settle(None if leaves is None else functools.partial(reads_of, graph, self.shell, leaves))
            passes = [cls() for cls in OVER_RANKS]
            graph, more = run_passes(graph, self.shell, passes, self.choices, sharding=self.sharded.sharding)
            steps += more
        if self.tiered is not None:
            self.tiered.prepare(graph)
            graph, more = run_passes(graph, self.shell, [cls() for cls in IN_TIERS], self.choices, tiers=self.tiered.tiers)
            steps += more
        return Variant(captured, graph, steps, attach(self.shell, graph), unverified=args is None)

    def check_demands(self, graph: Graph, steps: list[Step]) -> None:
        """Raises :class:`PlanError` where the plan freezes a table or updates it in the backward, and the graph does neither."""
        done = {(t.name, t.grad) for node in graph.nodes if node.target is OP for t in decode(node.args[5]).tables}
        for name in tables_read(graph, self.shell):
            choice = self.choices.get(name)
            if choice is None or not choice.required or choice.grad == "sparse" or (name, choice.grad) in done:
                continue
            left = next((r for s in steps for r in s.records if r.subject == name and r.reason), None)
            left = left or next((r for s in steps for r in s.records if r.reason and r.kind == "lookups"), None)
            raise PlanError(
                f"the plan asks that table '{name}' be {choice.detail}, which was not done"
                + (f" ({left.rule} is {left.status}: {left.reason})" if left else "")
                + ". Take that entry out of the plan, or allow the pass"
            )

    def rewrite(self, graph: Graph, budget: int | None = None, check: Check | None = None) -> tuple[Graph, list[Step]]:
        """Run the passes on a captured graph; ``budget`` limits how many rewrites are made."""
        passes = self.plan.make_passes()
        tiers: Any = None if self.tiered is None else self.tiered.wanted
        return run_passes(graph, self.shell, passes, self.choices, budget=budget, numeric_check=check, tiers=tiers, timings=self.timings)

    def _decide(self, read: dict[str, Tensor], optimizer: Optimizer | None) -> None:
        modules = dict(self.shell.named_modules())
        every = {
            name: p for name, p in [*self.shell.named_parameters(), *self.shell.named_buffers()]
            if name in read or is_table(modules[name.rpartition(".")[0]], name.rpartition(".")[2])
        }  # fmt: skip
        every.update({name: t for name, t in read.items() if name not in every})
        aliases: dict[str, list[str]] = {}
        first = {id(t): name for name, t in every.items()}
        for name, param in self.shell.named_parameters(remove_duplicate=False):
            if id(param) in first:
                aliases.setdefault(first[id(param)], []).append(name)
        for name, names in self.compressed.names.items():
            aliases.setdefault(name, []).extend(names)
        resolved = self.resolved = self.plan.resolve(every, aliases)
        self.compressed.refuse_others(resolved)
        spread = next((name for name, t in resolved.items() if t.sharding is not None), None)
        if spread is not None and self.ranks is None:
            raise PlanError(f"the plan makes table '{spread}' {resolved[spread].sharding}, which needs several ranks: a mesh was not given (mesh=)")
        own = next((name for name, t in resolved.items() if t.storage is not None or t.ids is not None), None)
        if own is not None and self.ranks is not None:
            raise PlanError(f"the plan gives table '{own}' storage or dynamic ids, which are for a model on one rank today: leave mesh= out")
        updates = decide(read, resolved, optimizer, self.plan)
        self.tables, self.choices, self.plan_optimizer = every, updates.choices, updates.plan_optimizer
        if own is not None:
            if self.any_ids.names and self.verify == "numerics":
                raise PlanError(f"verify='numerics' runs copies of the plain model, which has no rows for the ids of '{self.any_ids.names[0]}': leave it out")
            self.tiered = TieredTables(self.shell, resolved, self.choices, optimizer, self.plan_optimizer, self.empty)

    def recapture(self, model: OptimizedModel, args: tuple, kwargs: dict, failure: str, entry: str) -> Variant:
        """A variant for a call that no present one fits. Raises :class:`CaptureError` saying what changed."""
        present = [variant for variant in model._variants if variant.captured.entry == entry]
        form, why = "one graph", ""
        if len(present) >= _MAX_VARIANTS:
            form = "plain"
            why = f"{len(present)} forms of {entry}() have been captured, as something that Python reads changes at every call: {failure}"
        elif sum(bool(asserted(variant.graph)) for variant in present) >= _MAX_WAYS:
            form, why = "pieces", f"{_MAX_WAYS} ways that data takes through {entry}() have been captured, each in one graph"
        if present:
            _refuse_ids(present[0], args, kwargs)
        for variant in model._variants:
            variant.captured.guards.sync()
        try:
            with undisturbed():
                variant = self.compile(entry, args, kwargs, form, why)
        except TablewrightError as error:
            if not failure:
                raise
            raise type(error)(f"{failure}; the model had to be captured again, which failed: {error}") from error
        model._variants.append(variant)
        if form != "one graph":
            say(model, f"from now on other calls of {entry}() run {'plainly' if form == 'plain' else 'in pieces'}: {why}")
        return variant

    def report(self, variants: list[Variant], seconds: float, copied: bool, memory: dict[str, int]) -> Report:
        """What was done in ``variants``, the first of each method. ``memory``: bytes, as fields of the report."""
        fused = [n for variant in variants for graph in variant.graphs for n in graph.nodes if n.target is OP]
        table_bytes = sum(t.numel() * t.element_size() for t in self.tables.values())
        own = [*self.stored.values(), *self.compressed.saved.values()]
        copied_bytes = table_bytes if copied else sum(low for _, low in own)
        notes = []
        for variant in variants:
            entry = variant.captured.entry
            notes += variant.captured.notes if entry == FORWARD else [
                f"{entry}(): captured by {variant.captured.door}", *(f"{entry}(): {note}" for note in variant.captured.notes)]
        notes += [*self.compressed.notes(), *([] if self.tiered is None else self.tiered.notes())]
        done = {variant.captured.entry for variant in variants}
        notes += [f"{entry}() has no sample inputs: it is captured at its first call" for entry in self.samples if entry not in done]
        return Report(
            records=(*merged(r for variant in variants for step in variant.steps for r in step.records), *self._storage(), *self.compressed.records),
            door=variants[0].captured.door, pieces=variants[0].pieces, notes=tuple(notes), launches=len(fused),
            table_bytes=table_bytes, copied_bytes=copied_bytes, **memory, kernels=f"CPU kernels: {cpu.describe()}",
            seconds=seconds, passes=tuple(dict.fromkeys(step.name for variant in variants for step in variant.steps)),
        )  # fmt: skip

    def _storage(self) -> list[Record]:
        """A row for each table that has storage of its own."""
        said = "{} in memory of its own, {:,} bytes instead of {:,}; the plain model's float32 table is not read or trained"
        words = {n: str(self.tables[n].dtype).removeprefix("torch.") for n in self.stored if n in self.tables}
        return [Record("stored tables", APPLIED, n, "storage", detail=said.format(w, *self.stored[n][::-1])) for n, w in words.items()]

    def returned_optimizer(self, optimizer: Optimizer, variants: list[Variant]) -> Optimizer:
        """The user's optimizer in the form that steps the tables which now have sparse gradients, and by torch's fused kernels the rest."""
        steps = [s for variant in variants for s in variant.steps if s.name == "table_gradients"]
        done = dict.fromkeys(r.subject for s in steps for r in s.records if r.status == APPLIED)
        self.row_wise_tables = [n for n in done if self.choices[n].grad == "sparse" and not self.choices[n].required]
        result = optimizer
        if self.row_wise_tables or (self.plan_optimizer is not None and has_fused_step(optimizer)):
            lazy = self.plan.numerics == "approximate"
            result = row_wise(optimizer, [self.tables[name] for name in self.row_wise_tables], lazy)
        return result

    def bisect(self, model: OptimizedModel, args: tuple, kwargs: dict) -> str:
        """See :meth:`OptimizedModel.bisect`."""
        return first_difference(self, model._variant_for(args, kwargs), args, kwargs)


def _refuse_ids(variant: Variant, args: tuple, kwargs: dict) -> None:
    """Raises ``TypeError`` where an input that is used as ids has no integer dtype: no capture could make that right."""
    leaves = variant.captured.guards.inputs.flatten(args, kwargs)
    if leaves is None:
        return
    given = dict(zip((n for n in variant.graph.nodes if n.op == "placeholder"), variant.captured.guards.inputs.pick(leaves)))
    for node in variant.graph.nodes:
        if node.target is not OP:
            continue
        spec = decode(node.args[5])
        for lookup, ids in zip(spec.lookups, node.args[1]):
            value = given.get(ids)
            if isinstance(value, Tensor) and value.dtype not in (torch.int32, torch.int64):
                raise TypeError(
                    f"ids of lookup '{lookup.name}' (table '{spec.tables[lookup.table].name}') are {value.dtype}; "
                    "they must be int32 or int64: pass ids.long()"
                )


def _joined_widths(captured: Captured, graph: Graph) -> list[str]:
    """Conditions: an input that a fused lookup copies beside its rows is as wide as it was in the sample."""
    inputs = captured.guards.inputs
    leaves = dict(zip((n for n in graph.nodes if n.op == "placeholder"), inputs.placeholders))
    ranks = {leaf: rank for leaf, (_, rank, _) in zip(inputs.tensors, inputs.facts)}
    found = []
    for node in graph.nodes:
        if node.target is OP:
            for extra, given in zip(decode(node.args[5]).extras, node.args[4]):
                leaf = leaves.get(given)
                if leaf in ranks:
                    found.append(f"S[{inputs.tensors.index(leaf)}][{ranks[leaf] - 1}] == {extra.width}")
    return found
