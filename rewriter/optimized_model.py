"""The module that ``optimize`` returns: the plain model's names, parameters and signature around a rewritten graph."""
from __future__ import annotations

import copy
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Graph
from torch.optim import Optimizer

from ..kernels.embedding import in_backward
from ..kernels.embedding.op import OP
from ..kernels.embedding.optimizers import RowUpdates
from ..passes.records import Record
from . import data_ways, shard_map, snapshots
from .capture import CAPTURING, attach, deep_copy, verify
from .capture.data_guard import OtherData
from .capture.entry import compile_entry
from .capture.plain_model import follow
from .capture.program_check import leaves_of
from .capture.shell import plain_copy
from .capture.turns import Runs
from .errors import CaptureError, PlanError, nearest
from .in_backward_guard import InBackwardGuard, drop_placeholders
from .methods import plainly
from .pipeline import Step
from .plan import Plan
from .report import Report
from .sharded_state import whole_state_dict
from .variant import Variant, first_call
from .verify import copy_graph

# Hooks on the whole plain model run around the optimized one too.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


class OptimizedModel(nn.Module):
    """A drop-in for the plain model. Its parameters *are* the plain model's parameters (unless ``copy=True``), under their plain
    names, so ``state_dict``, ``named_parameters`` and an optimizer built on the plain model mean the same here; ``train()`` and
    ``eval()`` are its own. Attributes and methods of the plain model can be read through it; methods that ``optimize`` did not
    name run plainly on the shared weights.
    """

    def __init__(self, shell: nn.Module, compiler: Any, plan: Plan) -> None:
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = shell.__dict__[name]
        for name in _HOOKS:
            self.__dict__[name] = copy.copy(shell.__dict__[name])
        set_plain = self.__dict__.__setitem__
        set_plain("_shell", shell)
        set_plain("_compiler", compiler)  # makes a variant for a call that no present variant fits
        set_plain("_variants", [])
        set_plain("_plan", plan)
        set_plain("_report", Report(()))
        set_plain("_embedding_optimizer", None)
        set_plain("_guard", None)
        set_plain("_rounds", None)  # where gradients of several batches are summed
        set_plain("_sharded", None)  # over several ranks: who holds what
        set_plain("_tiered", None)  # tables larger than memory
        set_plain("_watched", [])  # what is shared with the plain model
        set_plain("_runs", Runs())
        self.training = shell.training
        self.register_load_state_dict_post_hook(_follow_loaded)  # also runs where a parent module loads
        self.register_load_state_dict_pre_hook(_follow_buffers)  # else what is loaded would be lost to the plain model's
        self.register_state_dict_pre_hook(_follow_buffers)

    # --- running -------------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the plain model's ``forward`` computes."""
        others: list[Variant] = []  # whose graphs are for other data, which shows when they run
        if not torch.compiler.is_compiling():
            with self._runs:
                for variant in self._variants:
                    if variant.captured.entry == "forward" and (inputs := variant.enter(args, kwargs)) is not None:
                        try:
                            return self._run_on(variant, inputs)
                        except OtherData as error:
                            if error.__cause__ is not None:
                                return data_ways.plainly(self, "forward", args, kwargs, error)
                            others.append(variant)
        return data_ways.call(self, "forward", args, kwargs, others)

    def _run(self, variant: Variant, args: tuple, kwargs: dict) -> Any:
        if variant.captured.program is not None:
            return self._run_program(variant.captured.program, args, kwargs)
        inputs = variant.captured.guards.flatten(args, kwargs)
        if torch.compiler.is_compiling():
            if self._guard is not None and torch.is_grad_enabled():
                self._guard.before_forward()
            return variant.captured.result(self._shell, variant.module.forward(*inputs))
        if variant.enter is first_call:
            variant.enter = compile_entry(variant.captured.guards, self._watched)
        return self._run_on(variant, inputs)

    def _run_on(self, variant: Variant, inputs: list) -> Any:
        guard = self._guard
        if guard is None or not torch.is_grad_enabled():
            return variant.pack(variant.run(*inputs))
        guard.before_forward()
        leaves = variant.run(*inputs)
        guard.watch(leaves)
        return variant.pack(leaves)

    def _run_program(self, program: Any, args: tuple, kwargs: dict) -> Any:
        if torch.compiler.is_compiling():
            return getattr(self._shell, program.entry)(*args, **kwargs)  # the compiler at work captures the plain model itself
        guard = self._guard
        watched = guard is not None and torch.is_grad_enabled()
        if watched:
            guard.before_forward()
        result = program(args, kwargs)
        if watched:
            guard.watch([leaf for _, leaf in leaves_of(result)])
        return result

    def _variant_for(self, args: tuple, kwargs: dict, entry: str = "forward", others: Sequence[Variant] = ()) -> Variant:
        """The variant whose guards hold for this call, but for ``others``; a new one where there is none."""
        if torch.compiler.is_compiling():
            return self._variant_for_mode(entry)
        with CAPTURING:  # another thread may be making the variant that this call needs
            failure = self._follow_plain_model()
            self._wait_for_lookups()
            for variant in self._variants:
                if variant.captured.entry != entry:
                    continue
                if any(variant is each for each in others):
                    failure = "the data takes another way through the model than the one captured"
                    continue
                failure = variant.captured.guards.failure(args, kwargs)
                if failure is None and variant.unverified:
                    variant.unverified = False
                    with self._runs.alone(), self._compiler.whole():
                        failure = verify(self._shell, variant.captured, args, kwargs)
                    if failure is not None:
                        self._variants.remove(variant)
                        break
                if failure is None:
                    return variant
            with self._runs.alone():
                return self._compiler.recapture(self, args, kwargs, failure, entry)

    def _wait_for_lookups(self) -> None:
        """Lookups that a pipeline runs ahead read the shell's tables, which a capture takes away for a while."""
        for variant in self._variants:
            if (wait := getattr(variant.run, "wait", None)) is not None:
                wait()

    def _variant_for_mode(self, entry: str) -> Variant:
        """Under torch.compile, which guards inputs and modules itself: the variant for the present training flags."""
        for variant in self._variants:
            if variant.captured.entry == entry and all(self.get_submodule(path).training == mode for path, mode in variant.captured.guards.modes.items()):
                return variant
        raise CaptureError("the model has not been captured in this mode: call it once without torch.compile, then compile")

    def train(self, mode: bool = True) -> OptimizedModel:
        super().train(mode)
        self._shell.training = mode
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; where the plan accumulates gradients, those that a step to come still needs stay."""
        if self._rounds is None or not self._rounds.keeps_gradients():
            super().zero_grad(set_to_none)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            shell = self.__dict__.get("_shell")
            if shell is None or name.startswith("__"):
                raise
            value = getattr(shell, name)
            if isinstance(value, types.MethodType) and not torch.compiler.is_compiling():
                self._follow_plain_model()  # the method may read what was replaced there
            if self._guard is not None and isinstance(value, types.MethodType):
                return plainly(value, self._in_backward_tables())
            return value

    def _in_backward_tables(self) -> set[int]:
        names = [name for name, choice in self._compiler.choices.items() if choice.grad == "in_backward"]
        return {id(self.get_parameter(name)) for name in names}

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_plain_models(name) or (self._is_new(name) and not isinstance(value, (nn.Parameter, nn.Module))):
            setattr(self._shell, name, value)  # an attribute of the plain model: the guards see it change
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_plain_models(name):
            delattr(self._shell, name)
        else:
            super().__delattr__(name)

    def _is_plain_models(self, name: str) -> bool:
        return "_shell" in self.__dict__ and name in self._shell.__dict__ and name != "training"

    def _is_new(self, name: str) -> bool:
        homes = ("_parameters", "_buffers", "_modules")
        known = name in self.__dict__ or hasattr(type(self), name) or any(name in self.__dict__.get(home, ()) for home in homes)
        return "_shell" in self.__dict__ and not known

    def extra_repr(self) -> str:
        return self._report._summary()

    # --- what was done -------------------------------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """What was rewritten, what was not and why. Print it."""
        live = [] if self._tiered is None else self._tiered.counted()
        return replace(self._report, notes=(*self._report.notes, *live)) if live else self._report

    @property
    def plan(self) -> Plan:
        """The plan this model was optimized by."""
        return self._plan

    @property
    def graph_module(self) -> torch.fx.GraphModule:
        """The rewritten graph (of the first variant)."""
        return self._variants[0].module

    @property
    def steps(self) -> list[Step]:
        """One entry for each pass, with the graph before and after."""
        return self._variants[0].steps

    def explain(self, path: str) -> str:
        """Why the module at ``path`` (or each inside it) was or was not rewritten. Raises ``KeyError`` for an unknown path."""
        known = {n for n, _ in self.named_modules()} | {n for n, _ in self.named_parameters(remove_duplicate=False)}
        if path not in known:
            raise KeyError(f"the model has no module or parameter '{path}'{nearest(path, known)}")
        rows = self._report.of(path)
        if not rows:
            return f"{path}: no rewrite looks at what this module does; it runs as in the plain model"
        return "\n".join(_sentence(r) for r in rows)

    def code(self, step: str | None = None, *, before: bool = False) -> str:
        """The graph as Python, after (or before) the pass named ``step``; by default after all of them."""
        if step is None:
            return self.graph_module.code
        chosen = next((s for s in self.steps if s.name == step), None)
        if chosen is None:
            raise KeyError(f"no pass '{step}' ran; the passes were {', '.join(s.name for s in self.steps)}")
        return str((chosen.before if before else chosen.after).python_code("self").src)

    def visualize(self, path: str | Path | None = None, **options: Any) -> str:
        """What was rewritten and why, as one self-contained page (see :func:`.viewer.visualize` for ``format=``, ``profile=`` and
        ``sources=``). Returns its text and writes it to ``path`` where one is given."""
        from .viewer import visualize

        return visualize(self, path, **options)

    def _repr_html_(self) -> str:
        """In a notebook the model shows itself."""
        from .viewer import embedded

        return embedded(self)

    def check(self, *args: Any, **kwargs: Any):
        """Compare outputs, gradients and one optimizer step with the plain model on these inputs (copies of the weights are
        made and nothing of this model changes). Returns an :class:`~.equivalence.Equivalence`; print it, or call its
        ``raise_if_failed()``."""
        self._alone("check()")
        from .equivalence import check_model

        return check_model(self, args, kwargs)

    def bisect(self, *args: Any, **kwargs: Any) -> str:
        """Name the first rewrite that changes the outputs on these inputs, or say that none does."""
        self._alone("bisect()")
        return self._compiler.bisect(self, args, kwargs)

    @property
    def resolved_plan(self) -> str:
        """Over several ranks: every table with its ranks, rows and columns, as text."""
        return "" if self._sharded is None else shard_map.table(self._sharded.layouts)

    # --- weights -------------------------------------------------------------------------------------------------------------

    @property
    def embedding_optimizer(self) -> RowUpdates | None:
        """The optimizer that the plan's ``embedding_optimizer`` asks for; ``None`` where the plan names none."""
        return self._embedding_optimizer

    def table_names(self) -> list[str]:
        """Parameter names of the tables that lookups read."""
        return list(self._compiler.tables)

    def dense_parameters(self):
        """The parameters that are not embedding tables: what a dense optimizer is built on."""
        tables = set(self._compiler.tables)
        seen: set[int] = {id(p) for n, p in self.named_parameters(remove_duplicate=False) if n in tables}
        return (p for n, p in self.named_parameters() if id(p) not in seen)

    def unoptimized(self) -> nn.Module:
        """An independent plain model (its own class) with today's weights, buffers and mode. Over several ranks every rank calls it."""
        _follow_buffers(self)
        if self._tiered is not None and self._tiered.dynamic:
            self._alone("unoptimized()")
        if self._sharded is not None or self._tiered is not None:
            whole = self.whole_state_dict()
            self._wait_for_lookups()
            with self._compiler.whole():
                plain = plain_copy(self._shell)
            plain.load_state_dict(whole)
            return plain
        return plain_copy(self._shell)

    def whole_state_dict(self, rank: int | None = None) -> dict[str, Any] | None:
        """The state of a model over several ranks with whole tables: on ``rank`` (others get ``None``), or on all. A collective: every
        rank calls it; it takes the memory of all tables there. Of a model on one rank it is ``state_dict()``."""
        return dict(self.state_dict()) if self._sharded is None else whole_state_dict(self, rank)

    def _alone(self, what: str) -> None:
        """Raises :class:`PlanError` for a model over several ranks, in tiers or with dynamic ids."""
        if self._sharded is not None:
            raise PlanError(f"{what} is for a model on one rank, and this one runs over several: take opt.unoptimized() (on all ranks) first")
        if self._tiered is not None:
            if held := ", ".join(self._tiered.files):
                raise PlanError(f"{what} is for a model in memory, and the plan keeps {held} in tiers: take opt.unoptimized() first, where that fits")
            raise PlanError(f"{what} needs a plain table of every row, and the plan gives {', '.join(self._tiered.dynamic)} dynamic ids: state_dict() has "
                            "the ids and rows, as has opt.dynamic_ids[name].export()")  # fmt: skip

    def _apply(self, fn, recurse: bool = True):
        drop_placeholders(self)
        _follow_buffers(self)
        super()._apply(fn, recurse)
        self._follow_replaced_parameters()
        return self

    def _follow_plain_model(self, strict: bool = True) -> str:
        """Take over buffers replaced on the plain model. Returns why the variants were dropped, "" where they serve."""
        followed, failure = follow(self._watched, strict)
        if followed:
            self._follow_replaced_parameters()
        self._variants[:] = [] if failure else self._variants
        return failure

    def _follow_replaced_parameters(self) -> None:
        """``assign=True`` and ``to_empty()`` put new Parameter objects in place: the plan's optimizer must update those, and
        nothing may keep the old ones alive."""
        named = tensors_of(self)
        self._compiler.tables.update({name: named[name] for name in self._compiler.tables})
        if self._embedding_optimizer is not None:
            self._embedding_optimizer.follow(named)

    # --- tables larger than memory ---------------------------------------------------------------------------------------------

    def snapshot(self, folder: str | Path, *optimizers: Optimizer) -> Path:
        """Make everything as it is now durable, all of it or nothing: the tables in tiers in their own folders, the other parameters, tables
        with dynamic ids, the buffers and the state of ``optimizers`` in ``folder``. Training goes on from it, also after a crash, with ``storage.resume: folder`` in
        the plan and :meth:`restore`. Returns the file that makes it complete. Raises ``RuntimeError`` where no table is in tiers or has dynamic ids."""
        return snapshots.snapshot(self._tables_in_tiers("snapshot()"), folder, self, optimizers)

    def restore(self, folder: str | Path, *optimizers: Optimizer) -> None:
        """Take parameters, buffers and the state of ``optimizers`` (in the order that :meth:`snapshot` was given) from a snapshot; the
        tables in tiers were opened at it by ``storage.resume``. Raises :class:`~..kernels.tiers.TierError` where they do not belong together."""
        snapshots.restore(self._tables_in_tiers("restore()"), folder, self, optimizers)

    @property
    def tiers(self) -> dict[str, Any]:
        """What happened in the cache of each table in tiers, by plain name: :class:`~..kernels.tiers.Counters`."""
        return {} if self._tiered is None else {name: t.cache.counters() for name, t in self._tiered.files.items()}

    @property
    def dynamic_ids(self) -> dict[str, Any]:
        """The tables with dynamic ids, by plain name: :class:`~..kernels.dynamic_ids.table.DynamicTable`, whose ``counters()`` say what happened,
        and whose ``export()`` and ``load(ids, rows)`` take ids and rows out and in."""
        return {} if self._tiered is None else self._tiered.dynamic

    def _tables_in_tiers(self, what: str) -> Any:
        if self._tiered is None:
            raise RuntimeError(f"{what} is for tables in tiers or with dynamic ids, and the plan gives none storage: save state_dict() instead")
        return self._tiered

    def _own_tables(self, tables: Any) -> None:
        """The shell's tables were replaced by caches: they are no longer the plain model's."""
        self.__dict__["_tiered"] = tables
        self._follow_replaced_parameters()
        for each in self._watched:
            if each.home == "_parameters":
                for name in [n for n in each.seen if f"{each.path}.{n}".lstrip(".") in tables.open]:
                    del each.seen[name]

    # --- copies --------------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict) -> OptimizedModel:
        self._alone("deepcopy")
        shell = deep_copy(self._shell, memo)
        from .programs import on_copy

        result = type(self)(shell, self._compiler.for_copy(shell), self._plan)
        memo[id(self)] = result
        for name in _HOOKS:  # some were registered on this model
            result.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        owner = -1
        if self._embedding_optimizer is not None:
            result.__dict__["_embedding_optimizer"] = copy.deepcopy(self._embedding_optimizer, memo)
            owner = in_backward.register(result._embedding_optimizer)
            result.__dict__["_guard"] = InBackwardGuard.of(result)
            result._compiler.plan_optimizer = result._embedding_optimizer
        choices = self._compiler.choices
        result._compiler.choices = {n: replace(c, owner=owner) if c.owner != -1 else c for n, c in choices.items()}
        result.__dict__["_report"] = self._report
        for variant in self._variants:
            graph = copy_graph(variant.graph)
            _set_owner(graph, owner)
            captured = replace(variant.captured, guards=copy.deepcopy(variant.captured.guards, memo))
            if captured.program is not None:
                captured.program = on_copy(result._compiler, captured.program)
            result._variants.append(Variant(captured, graph, variant.steps, attach(shell, graph), variant.unverified, variant.graphs))
        return result

    def __reduce_ex__(self, protocol: int):
        """Saved by recipe: the plain model, the plan, the sample inputs and the optimizer state; ``optimize`` runs on load."""
        self._alone("pickling (torch.save of the model)")
        _follow_buffers(self)
        optimizer = self._embedding_optimizer
        state = None if optimizer is None else optimizer.state_dict()
        parts = {name: tensor for name, tensor in tensors_of(self._shell).items() if name in self._compiler.compressed.names}
        return _rebuild, (plain_copy(self._shell, share=True), self._plan, self._compiler.samples, self.training, state, parts)

    def __dir__(self):
        return sorted({*super().__dir__(), *dir(self._shell)})


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Its parameters and buffers by all their names."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _follow_loaded(model: OptimizedModel, _) -> None:
    model._follow_replaced_parameters()


def _follow_buffers(model: OptimizedModel, *_) -> None:
    model._follow_plain_model(strict=False)


def _rebuild(
    model: nn.Module, plan: Plan, samples: Any, training: bool, optimizer_state: dict | None, parts: dict[str, torch.Tensor]
) -> OptimizedModel:  # fmt: skip
    from .optimize import optimize_with_samples

    result = optimize_with_samples(model, plan, samples)
    held = tensors_of(result)
    with torch.no_grad():
        for name, part in parts.items():  # of compressed tables, which were fitted just now
            held[name].copy_(part)
    if optimizer_state is not None:
        result.embedding_optimizer.load_state_dict(optimizer_state)
    return result.train(training)


def _set_owner(graph: Graph, owner: int) -> None:
    """Point every in-backward lookup of a copied graph at the copy's own optimizer."""
    for node in graph.nodes:
        if node.target is OP and len(node.args) > 7:
            node.update_arg(7, owner)


def _sentence(r: Record) -> str:
    where = f"{r.subject or 'the model'}" + (f" ({r.location})" if r.location else "")
    return f"{r.status} {r.rule}: {where}: {r.reason or r.detail or 'rewritten'}"
