"""The order of the doors: FX tracing, export, dynamo in one graph, dynamo in pieces; each is checked against the model.

What none of them captures runs plainly, with the reason. All but the first need example inputs.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from ..errors import CaptureError, explain
from . import check, data_guard, dynamo_frontend, export_frontend, fx_frontend, program_check
from .dynamo_frontend import Dynamo, NotWhole, Plain
from .guards import Guards
from .lazy import fill_lazy_attributes
from .recording import Effect
from .shell import refuse_hooks

_NO_INPUTS = "pass sample_inputs=, so that torch.export can capture what tracing without inputs cannot"


@dataclass
class Captured:
    """A captured model.

    ``graph``: flat placeholders (one per tensor or number leaf of ``(args, kwargs)``, in pytree order), ATen training IR,
    ``get_attr`` nodes under the plain model's names, and an output node that is a flat tuple of the result's leaves.
    ``in_spec``/``out_spec``: TreeSpecs of ``(args, kwargs)`` and of the result. ``door``: "fx", "export", "dynamo",
    "dynamo, in pieces" or "none". ``notes``: sentences for the report. ``program``: for the last three, what runs by itself
    (``graph`` is then empty, the programs' pieces have graphs of their own); ``entry``: the method that was captured;
    ``effects``: plain attributes that it sets, whose values are further outputs of the graph, after the result's leaves;
    ``tables_outside``: names of tables read where nothing was captured.
    """

    graph: fx.Graph
    in_spec: object
    out_spec: object
    door: str
    guards: Guards
    notes: list[str] = field(default_factory=list)
    entry: str = "forward"
    effects: list[Effect] = field(default_factory=list)
    program: Dynamo | Plain | None = None
    tables_outside: tuple[str, ...] = ()

    def result(self, shell: nn.Module, leaves: tuple | list) -> object:
        """What the captured method returns, from the graph's outputs; the attributes that it sets are set on ``shell``."""
        spec = self.out_spec
        if self.effects:
            count = spec.num_leaves
            for effect in self.effects:
                owner = shell.get_submodule(effect.path) if effect.path else shell
                mine = leaves[count : count + effect.spec.num_leaves]
                setattr(owner, effect.name, pytree.tree_unflatten(list(mine), effect.spec))
                count += effect.spec.num_leaves
            leaves = leaves[: spec.num_leaves]
        return leaves[0] if spec.is_leaf() else pytree.tree_unflatten(list(leaves), spec)


def capture(shell: nn.Module, args: tuple | list | None, kwargs: dict | None = None, *,
            originals: dict[str, nn.Module] | None = None, entry: str = "forward", form: str = "one graph", why: str = "") -> Captured:
    """Captures ``shell(*args, **kwargs)``, or the method named by ``entry``, in the shell's current mode.

    ``form``: the best that is tried: "one graph", "pieces" or "plain"; ``why`` not a better one.

    ``args`` may be a list of ``(args, kwargs)`` batches, or None to trace without inputs. ``originals`` maps module
    paths to the user's own modules, whose attributes are then guarded too. Nothing that belongs to the user changes.
    Raises CaptureError naming the user's line, the cause and the way out: without inputs, and where the model itself fails.
    """
    with check.undisturbed(), export_frontend.quiet(), torch.inference_mode(False):
        if args is None:
            return _without_inputs(shell, originals, entry)
        args, kwargs = _trainable(args), _trainable(kwargs)
        batches = [(tuple(a), dict(k or {})) for a, k in args] if isinstance(args, list) else [(tuple(args), dict(kwargs or {}))]
        if not batches:
            raise CaptureError(explain("sample_inputs is an empty list", fix="pass a batch, or a list of two (args, kwargs) batches"))
        if form != "one graph":
            return _program(shell, batches, originals, entry, why, form)
        try:
            return _one_graph(shell, batches, originals, entry)
        except check.PlainModelFails:
            raise
        except CaptureError as error:
            why = str(error)
        if filled := fill_lazy_attributes(shell, entry, batches):
            try:
                captured = _one_graph(shell, batches, originals, entry)
                captured.notes.append(f"filled beforehand, as the first call does: {', '.join(filled)}")
                return captured
            except CaptureError as error:
                why = str(error)
        return _program(shell, batches, originals, entry, why)


def _without_inputs(shell, originals, entry) -> Captured:
    try:
        refuse_hooks(shell)
        captured = _by_tracing(shell, None, None, originals, entry)
    except CaptureError as error:
        raise CaptureError(explain("the model cannot be captured without inputs", why=str(error), fix=_NO_INPUTS)) from error
    captured.notes.append("captured without sample inputs, so not compared with the plain model")
    return captured


def _one_graph(shell, batches, originals, entry) -> Captured:
    """By the first two doors: one graph under guards of ours."""
    refuse_hooks(shell)
    try:
        captured = _by_tracing(shell, *batches[0], originals, entry)
        why = _checked(shell, captured, batches)
        if why is None:
            return captured
        why = f"the traced graph is not the model: {why}"
    except check.PlainModelFails:
        raise
    except CaptureError as error:
        why = f"tracing stopped: {error}"
    captured = _by_export(shell, *batches[0], originals, entry)
    if captured.guards.failure(*batches[0]) is not None:  # a batch of one, exported as two: export it as it is
        captured = _by_export(shell, *batches[0], originals, entry, exact=True)
    captured.notes.append(f"captured by torch.export, because {why}")
    different = _checked(shell, captured, batches)
    if different is not None:
        raise CaptureError(explain("the captured graph is not the model", why=different, fix=(
            "make forward() depend on its inputs and the module's parameters only (no Python randomness, clocks or globals), "
            "or leave this model as it is")))
    return captured


def _program(shell, batches, originals, entry, why: str, form: str = "one graph") -> Captured:
    """By the third door, and where that does not compute the same either, the model as it is."""
    with program_check.kept(shell), check.undisturbed():
        try:
            log = dynamo_frontend.reads_of(shell, entry, *program_check.copied(batches[0]))
        except Exception as error:
            raise program_check.plain_fails(error) from error
    notes, failed = [], None
    for whole in {"one graph": (True, False), "pieces": (False,), "plain": ()}[form]:
        if not whole and form == "one graph" and (captured := _one_way(shell, batches, originals, entry, why, notes)) is not None:
            return captured
        program = Dynamo(shell, entry, whole=whole)
        program.only_whole = whole  # else it would go on in pieces at once
        if not whole:
            program.breaks.append(str(failed or why))
        try:
            failed = program_check.program_mismatch(shell, program, batches)
        except check.PlainModelFails:
            raise
        except NotWhole as error:
            failed = error.why
        except Exception as error:  # dynamo's own limits, or ours: the plain model has just run on this batch
            failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
        if failed is None:
            break
        if not whole:
            notes.append(f"dynamo in pieces was not used: {failed}")
    else:
        program = Plain(shell, entry, why)
    if isinstance(program, Dynamo):
        program.only_whole = False
    read = {name for name, tensor in shell.named_parameters() if id(tensor) in log.tensors and _is_table(shell, name)}
    for each in [each for piece in program.pieces for each in piece.forms]:
        read -= {name for name in each.names if name is not None}
    captured = Captured(_empty(), None, None, program.door, dynamo_frontend.Watch(shell, originals, log), entry=entry,
                        program=program, tables_outside=tuple(sorted(read)))
    captured.notes += _program_notes(program, why, notes)
    return captured


def _one_way(shell, batches, originals, entry, why: str, notes: list[str]) -> Captured | None:
    """One graph of the way that the first batch takes through a forward() which looks at data; None (and a note) where it cannot be."""
    try:
        refuse_hooks(shell)
        captured = _by_export(shell, *batches[0], originals, entry, data=True)
        if captured.guards.failure(*batches[0]) is not None:
            captured = _by_export(shell, *batches[0], originals, entry, exact=True, data=True)
        data_guard.require_undoable(captured.graph)
        different = _checked(shell, captured, batches)
    except check.PlainModelFails:
        raise
    except CaptureError as error:
        different = str(error)
    except Exception as error:  # export's own limits
        different = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
    if different is not None:
        notes.append(f"not one graph for this data either, because {different}")
        return None
    captured.notes.insert(0, f"captured by torch.export for such data as the sample's: forward() looks at data ({why}). What that decided "
                             "is asserted in the graph; other data is captured anew")
    return captured


def _program_notes(program, why: str, notes: list[str]) -> list[str]:
    if isinstance(program, Plain):
        return [f"NOT captured, it runs plainly: {why}", *notes]
    if program.whole:
        return [f"captured by dynamo in one graph, because {why}", *notes]
    said = [f"captured in {len(program.pieces)} pieces; what lies between them runs plainly: {each}" for each in program.breaks]
    return [*said, f"not one graph by the other doors, because {why}", *notes]


def _is_table(shell: nn.Module, name: str) -> bool:
    return isinstance(shell.get_submodule(name.rpartition(".")[0]), (nn.Embedding, nn.EmbeddingBag))


def _empty() -> fx.Graph:
    graph = fx.Graph()
    graph.output(())
    return graph


def _by_tracing(shell, args, kwargs, originals, entry) -> Captured:
    graph, inputs, out_spec, effects, log = fx_frontend.trace(shell, args, kwargs, entry)
    conditions = [] if args is None else _no_other_broadcasts([t.shape for t in inputs.tensors_of(inputs.flatten(args, kwargs))])
    return _finished("fx", entry, graph, inputs, out_spec, effects, Guards(shell, originals, inputs, log, conditions=conditions))


def _no_other_broadcasts(shapes: list[torch.Size]) -> list[str]:
    """Conditions on sizes under which nothing broadcasts that did not in the sample: the traced graph is right for any sizes,
    but the passes see the sample's. A size of 1 stays 1, and of sizes that were equal not just some may be 1 (one user, many items)."""
    equal: dict[int, list[str]] = {}
    for i, shape in enumerate(shapes):
        for dim, size in enumerate(shape):
            equal.setdefault(size, []).append(f"S[{i}][{dim}]")
    ones = [f"{name} == 1" for name in equal.pop(1, [])]
    return ones + [f"1 not in ({', '.join(names)}) or {' == '.join(names)}" for names in equal.values() if len(names) > 1]


def _by_export(shell, args, kwargs, originals, entry, exact: bool = False, data: bool = False) -> Captured:
    graph, inputs, out_spec, effects, log, conditions = export_frontend.export(shell, args, kwargs, entry, exact, data)
    return _finished("export", entry, graph, inputs, out_spec, effects,
                     Guards(shell, originals, inputs, log, conditions=conditions, baked_dtypes=True))


def _finished(door, entry, graph, inputs, out_spec, effects, guards) -> Captured:
    notes = []
    if guards.modes:
        names = ", ".join(f"'{path or 'the model'}'" for path in guards.modes)
        notes.append(f"forward() of {names} branches on self.training, so each mode has a graph of its own")
    if torch.nn.modules.module._has_any_global_hook():
        notes.append("global module hooks are installed; the graph does not run them for its submodules")
    graph.lint()
    return Captured(graph, inputs.spec, out_spec, door, guards, notes, entry, effects)


def _checked(shell, captured: Captured, batches) -> str | None:
    """None where the graph agrees with the plain model on every batch; what is different otherwise."""
    for number, (args, kwargs) in enumerate(batches):
        if (reason := captured.guards.failure(args, kwargs)) is not None:
            if number and captured.door == "export":
                captured.notes.append(f"sample batch {number + 1} needs a capture of its own: {reason}")
                continue
            return reason
        try:
            reason = check.mismatch(shell, captured, args, kwargs)
        except data_guard.OtherData as other:
            if not number:
                return str(other)
            captured.notes.append(f"sample batch {number + 1} needs a capture of its own: {other}")
            continue
        if reason is not None:
            return reason
    made = check.derived_batches(captured.guards.inputs, *batches[0])
    if len(batches) == 1 and not made:
        captured.notes.append("checked at one batch size")
    for rows, args, kwargs in made:
        if captured.guards.failure(args, kwargs) is not None:
            continue  # never run at this size: the guard asks for another capture
        try:
            reason = check.mismatch(shell, captured, args, kwargs, required=False, modes=rows > 1)
        except data_guard.OtherData as other:
            if rows > 1:
                captured.notes.append(f"the graph is not for the sample with {rows - 1} row more: {other}")
            continue
        if reason is not None and rows < 2 and captured.door == "export":
            # export reasons about sizes of two and more; the guard keeps smaller batches away from this graph
            captured.guards.require([f"S[{i}][0] > {rows}" for i in range(len(captured.guards.inputs.tensors))])
            captured.notes.append(f"the graph does not serve batches of {rows} rows: {reason}")
        elif reason is not None:
            return reason
    return None


def verify(shell: nn.Module, captured: Captured, args: tuple, kwargs: dict | None = None) -> str | None:
    """Compares graph and plain forward on one batch, in the modes that the graph serves; what differs, or None.

    For graphs that were captured without inputs, at their first real call. Nothing changes by it.
    """
    with export_frontend.quiet(), torch.inference_mode(False):
        return check.mismatch(shell, captured, tuple(_trainable(args)), dict(_trainable(kwargs or {})))


def _trainable(batch):
    """Tensors made under inference mode as ordinary ones, which a graph with gradients can be checked on."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) and leaf.is_inference() else leaf, batch)
