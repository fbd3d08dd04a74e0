"""``optimize(model, plan)``: capture, rewrite, check, and return the model that does the same faster."""
from __future__ import annotations

import copy
import inspect
import time
import types
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from ..kernels.memory import keep_freed_memory, use_huge_pages
from .capture import CAPTURING, clone_shell
from .capture.plain_model import watch
from .capture.stored import store_tables
from .compiler import Compiler
from .compressed_tables import compressed
from .errors import CaptureError, PlanError
from .for_the_loop import for_the_loop
from .in_backward_guard import InBackwardGuard, drop_placeholders
from .meta_weights import make_dense
from .methods import FORWARD, bound, samples_of
from .optimized_model import OptimizedModel
from .plan import Plan
from .report import Report
from .samples import Samples
from .sharding import Ranks, start
from .tiers import hook_checkpoints, stand_ins

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
    _refuse_optimized(model)
    if verify not in VERIFY or on_skip not in ("report", "error"):
        raise PlanError(f"verify is one of {VERIFY} and on_skip is 'report' or 'error'; they are {verify!r} and {on_skip!r}")
    if optimizer is not None and not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
        raise PlanError(f"optimizer= is a {type(optimizer).__name__}, not a torch.optim.Optimizer: give the one that steps the tables; others, and "
                        "schedulers, stay as they are, for the parameters are the same objects")  # fmt: skip
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
    result = _with_signature_of(model, [name for name in samples if name != FORWARD])(shell, compiler, plan)
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


def _raise_if_skipped(report: Report) -> None:
    left = [r for r in report.skipped() if r.kind == "lookups"]
    if left:
        said = "; ".join(f"{r.subject or 'the model'} ({r.location}): {r.reason}" for r in left)
        raise PlanError(f"on_skip='error': {len(left)} lookups were not fused: {said}")


def _with_signature_of(model: nn.Module, methods: Iterable[str] = ()) -> type[OptimizedModel]:
    """A subclass of :class:`OptimizedModel` whose ``forward`` shows the plain model's signature and documentation; ``methods``:
    those that are captured too."""
    plain, base = type(model).forward, OptimizedModel.forward
    forward = types.FunctionType(base.__code__, base.__globals__, "forward", base.__defaults__, base.__closure__)
    try:
        forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        pass
    forward.__doc__ = plain.__doc__
    made = type(f"Optimized{type(model).__name__}", (OptimizedModel,), {"forward": forward, "__module__": OptimizedModel.__module__})
    for name in methods:
        setattr(made, name, bound(made, model, name))
    return made


def _refuse_optimized(model: nn.Module) -> None:
    """Raises :class:`PlanError` if ``model`` was optimized before, or holds a model that was."""
    for path, module in model.named_modules():
        if isinstance(module, OptimizedModel):
            what = f"its submodule '{path}' is" if path else "the model is"
            raise PlanError(f"{what} already optimized: call .unoptimized() first, or optimize the whole plain model once")
