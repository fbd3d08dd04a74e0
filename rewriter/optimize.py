"""``optimize(model, plan)``: capture, rewrite, check, and return the model that does the same faster."""
from __future__ import annotations

import copy
import functools
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import Graph
from torch.optim import Optimizer

from ..kernels.dense.fused_step import has_fused_step
from ..kernels.embedding import cpu
from ..kernels.embedding.op import OP
from ..kernels.embedding.optimizers import RowUpdates
from ..kernels.embedding.row_wise import row_wise
from ..kernels.embedding.spec import decode
from ..kernels.memory import keep_freed_memory, use_huge_pages
from ..passes import IN_TIERS, OVER_RANKS
from ..passes.lookups import tables_read
from ..passes.records import APPLIED, Record
from ..passes.table_gradients import Choice
from .bisect import first_difference
from .capture import CAPTURING, Captured, attach, capture, clone_shell
from .capture.check import undisturbed
from .capture.data_guard import asserted
from .capture.plain_model import watch
from .capture.shell import TICKET
from .capture.stored import refuse_other_reads, store_tables
from .compressed_tables import CompressedTables, compressed, is_table
from .data_ways import say
from .dynamic_tables import AnyIds
from .embedding_optimizer import decide
from .equivalence import numeric_check
from .errors import CaptureError, PlanError, TablewrightError
from .for_the_loop import for_the_loop
from .in_backward_guard import InBackwardGuard, drop_placeholders
from .meta_weights import make_dense
from .methods import FORWARD, samples_of
from .optimized_model import OptimizedModel, refuse_optimized, with_signature_of
from .pipeline import Check, Step, run_passes
from .plan import Plan, TablePlan
from .programs import merged, program_variant, tables_of
from .report import Report
from .sample_reads import reads_of
from .samples import Samples
from .sharding import Ranks, ShardedTables, prepare, start
from .tiers import TieredTables, hook_checkpoints, stand_ins
from .variant import Variant

_MAX_VARIANTS = 16
_MAX_WAYS = 4  # graphs for one way of the data each, before pieces take what is left
VERIFY = ("structure", "numerics")


def optimize(
    model: nn.Module, plan: Plan | str | Path | Mapping[str, Any] = "auto", *, optimizer: Optimizer | None = None,
    sample_inputs: Any = None, sample_kwargs: Mapping[str, Any] | None = None, verify: str = "structure",
    copy: bool = False, on_skip: str = "report", methods: Sequence[str] = (), mesh: DeviceMesh | None = None,
) -> Any:  # fmt: skip
    """A drop-in for ``model`` whose lookups are table-batched and whose tables are updated row by row.

    ``plan``: "auto", a :class:`Plan`, its plain values, or a path to its YAML or JSON. ``optimizer``: the user's own, built on
    ``model``'s parameters; its row-wise form is returned beside the model and shares its param groups and state.
    ``sample_inputs``: a tuple of the positional arguments of one batch (or one tensor or mapping, if that is the only argument),
    or a list of two such batches of different size; needed where the model cannot be traced without them.
    ``sample_kwargs``: keyword arguments of the same batch. ``verify="numerics"``: also compare outputs and gradients after each
    pass (makes copies of the weights). ``copy``: leave ``model`` its own parameters. ``on_skip="error"``: raise where a lookup
    was found and not fused, or where the model cannot be captured.

    ``methods``: names of methods besides ``forward`` that are captured and rewritten too ("predict", "calculate_loss"), over the
    same tables; the others run plainly on the shared weights. Then ``sample_inputs`` may map names to the inputs of each:
    ``{"forward": (ids,), "calculate_loss": (batch,)}``. A method without any is tried with those of ``forward``, and else
    captured at its first call.

    ``mesh``: a ``torch.distributed`` DeviceMesh of one dimension, or two (nodes, ranks in a node). The result then runs over those
    ranks: each feeds its own batch, tables live where the plan says (``data_parallel`` where it says nothing; with "auto" the planner
    says, on rank 0's sample), gradients are averaged as DistributedDataParallel does, and weights start as rank 0 has them. ``optimizer``
    then holds this rank's blocks of the tables.

    What cannot be captured as one graph runs in pieces, or plainly, with the reason at the top of the report.

    Returns the :class:`OptimizedModel`, or ``(model, optimizer)`` if an ``optimizer`` was given. ``model`` is not changed;
    its parameters are shared. Raises :class:`CaptureError`, :class:`PlanError`, :class:`PassError`.
    """
    started = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise PlanError(f"optimize() takes an nn.Module, not {type(model).__name__}")
    refuse_optimized(model)
    if verify not in VERIFY or on_skip not in ("report", "error"):
        raise PlanError(f"verify is one of {VERIFY} and on_skip is 'report' or 'error'; they are {verify!r} and {on_skip!r}")
    if optimizer is not None and copy:
        raise PlanError("copy=True gives the result parameters of its own, which the given optimizer would not step: "
                        "build the optimizer on the result instead")  # fmt: skip
    samples = samples_of(model, methods, sample_inputs, sample_kwargs)
    ranks, first = None if mesh is None else Ranks.of(mesh), samples[FORWARD]
    if plan == "auto" and ranks is not None and first.args is not None:
        from .planner.auto import plan_over

        plan = plan_over(model, ranks, first.args, first.kwargs, optimizer)
    return optimize_with_samples(
        model, _plan(plan, model, sample_inputs), samples, optimizer, verify=verify, duplicate=copy, on_skip=on_skip, started=started, ranks=ranks,
    )  # fmt: skip


def optimize_with_samples(
    model: nn.Module, plan: Plan, samples: dict[str, Samples], optimizer: Optimizer | None = None, *, verify: str = "structure",
    duplicate: bool = False, on_skip: str = "report", started: float | None = None, ranks: Ranks | None = None,
) -> Any:  # fmt: skip
    """:func:`optimize` after its arguments have been read."""
    started = time.perf_counter() if started is None else started
    if duplicate:
        model = copy.deepcopy(model)
    drop_placeholders(model)
    shell = clone_shell(model)
    stored = store_tables(shell, plan)
    if stored and ranks is not None:
        raise PlanError(f"the plan stores '{next(iter(stored))}' in another dtype, which over several ranks (mesh=) is not supported yet")
    compiler = Compiler(shell, {} if duplicate else dict(model.named_modules()), plan, samples, verify, ranks)
    compiler.stored = stored
    if ranks is not None:
        make_dense(shell, optimizer)
    own = stand_ins(shell, plan, optimizer, ranks is not None), compressed(shell, plan, optimizer, ranks is not None)
    with CAPTURING, own[0] as compiler.empty, own[1] as compiler.compressed:
        try:
            variants = compiler.compile_all(optimizer)
        except CaptureError as error:
            if not stored:
                raise
            raise PlanError(
                f"{error}. The plan stores {', '.join(map(repr, stored))} in another dtype, which goes only with models that read these tables "
                "by calling their modules"
            ) from error
    if compiler.sharded is not None:
        compiler.sharded.place(shell, optimizer, compiler.empty)
    if compiler.tiered is not None:
        compiler.tiered.cut()
    result = with_signature_of(model, [name for name in samples if name != FORWARD])(shell, compiler, plan)
    result._variants.extend(variants)
    if not duplicate:
        result._watched.extend(watch(model, shell))
    result.__dict__["_embedding_optimizer"] = compiler.plan_optimizer
    if compiler.sharded is not None:
        start(compiler.sharded, result)
    if compiler.tiered is not None:
        result._own_tables(compiler.tiered)
        hook_checkpoints(result, compiler.tiered)
    result.__dict__["_guard"] = InBackwardGuard.of(result)
    huge = use_huge_pages(_big_memory(compiler, optimizer)) if plan.huge_pages else 0
    trained = any(p.requires_grad and p.device.type == "cpu" for p in shell.parameters())
    memory = {"huge_page_bytes": huge, "kept_bytes": keep_freed_memory() if trained and plan.keep_memory else 0}
    result.__dict__["_report"] = compiler.report(variants, time.perf_counter() - started, duplicate, memory)
    if on_skip == "error":
        _raise_if_skipped(result.report)
    stepped = for_the_loop(result, None if optimizer is None else compiler.returned_optimizer(optimizer, variants))
    compiler.user_optimizer = None if stepped is None else weakref.ref(stepped)
    return result if optimizer is None else (result, stepped)


def _big_memory(compiler: Compiler, optimizer: Optimizer | None) -> list[Tensor]:
    """The tables, or their caches, and the state that the user's optimizer already keeps for them."""
    found = list(compiler.tables.values())
    if compiler.tiered is not None:
        found += [part for table in compiler.tiered.open.values() for part in table.memory]
    for table in compiler.tables.values() if optimizer is not None else ():
        state = optimizer.state.get(table, {})
        found += [value for value in state.values() if isinstance(value, Tensor) and value.shape == table.shape]
    return found


def _plan(plan: Any, model: nn.Module, sample_inputs: Any) -> Plan:
    if isinstance(plan, Plan):
        return plan
    if plan == "auto":
        return Plan.auto(model, sample_inputs=sample_inputs)
    if isinstance(plan, Mapping):
        return Plan.from_dict(plan)
    if isinstance(plan, (str, Path)) and Path(plan).suffix in (".yaml", ".yml", ".json"):
        return Plan.load(plan)
    raise PlanError(f"plan is {plan!r}; it must be 'auto', a Plan, a mapping, or the path of a .yaml or .json file")


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


def _raise_if_skipped(report: Report) -> None:
    left = [r for r in report.skipped() if r.kind == "lookups"]
    if left:
        said = "; ".join(f"{r.subject or 'the model'} ({r.location}): {r.reason}" for r in left)
        raise PlanError(f"on_skip='error': {len(left)} lookups were not fused: {said}")


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


