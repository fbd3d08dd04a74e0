"""The captured model as an ONNX model whose lookups are ``DistributedGather`` ops: capture in evaluation mode, three passes, export."""
from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from ...kernels.dynamic_ids.table import DynamicTable
from ...kernels.gather.op import BAG, GATHER
from ...passes.eval_form import EvalForm
from ...passes.fold_batch_norm import FoldBatchNorm
from ...passes.graph import aten, base_of, fetch, is_pure, stored_tensor
from ...passes.lower_to_serving import LowerToServing, table_names
from ...passes.records import APPLIED, Record
from ...passes.rule import Context
from ..capture import capture, clone_shell
from ..capture.check import modes_kept
from ..capture.compressed import Int8, restore_plain
from ..capture.export_frontend import quiet
from ..dynamic_tables import AnyIds
from ..errors import ExportError, explain
from ..optimized_model import OptimizedModel
from ..plan import Plan
from ..samples import Samples
from .onnx_ops import OPSET, translations
from .onnx_split import rename_values
from .rank_work import row_reader
from .request_inputs import BATCH
from .sample_rows import RowsOnDemand
from .together import Together

Batch = tuple[tuple, dict]


@dataclass
class ServingGraph:
    """A captured model without its tables. ``tables``: their tensors (shapes only of those that are elsewhere), ``names``: their parameters'
    names, both by what the graph calls them. ``labels``: names of the outputs; ``leaves``: per sample batch the tensors by input name;
    ``answers``: per sample batch what the plain model gives in evaluation mode, in the order of ``labels``. ``ids``: of tables with
    dynamic ids the ids (int64, ascending) of the rows, the last two of which are of what is left out (which id that is, or ``None``) and of
    ids that have none. ``to_onnx`` fills ``inputs`` and ``outputs``, as the manifest has them."""

    module: fx.GraphModule
    labels: list[str]
    result: str
    fixed: dict[str, Any]
    tables: dict[str, Tensor]
    names: dict[str, str]
    leaves: list[dict[str, Tensor]]
    answers: list[list[Tensor]]
    records: list[Record]
    ids: dict[str, tuple[Tensor, int | None]] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)


def serving_graph(model: nn.Module, samples: Samples, plan: Plan | None, together: Together) -> ServingGraph:
    """Raises :class:`ExportError` (or CaptureError) saying what in the model cannot be served, and where.

    Tables that are spread over ranks or in tiers are stand-ins here: only rows that the sample reads come, by way of ``together``, and
    all rows of a table that stays inside the graph."""
    if samples.args is None:
        raise ExportError("export_serving needs sample_inputs: one batch, as for optimize()")
    if isinstance(model, OptimizedModel):
        model._follow_plain_model()
        plan = plan or model.plan
    own = (model._sharded or model._tiered) if isinstance(model, OptimizedModel) else None
    shell = served_shell(model._shell if isinstance(model, OptimizedModel) else model)
    batches = [(samples.args, samples.kwargs or {}), *samples.more]
    if own is None:
        return _graph_of(shell, batches, plan or Plan(), shell, {}, {}, together)
    dynamic = model._tiered.dynamic if model._tiered is not None else {}  # type: ignore[union-attr]
    with own.whole_tables(shell), AnyIds(shell, model.plan):  # type: ignore[arg-type]
        stand_ins = {name: shell.get_parameter(name) for name in own.whole if name not in dynamic}
        return _graph_of(shell, batches, plan or Plan(), model if dynamic else shell, dynamic, stand_ins, together)


def served_shell(model: nn.Module) -> nn.Module:
    """A shell in evaluation mode whose rows can be fetched: int8 tables (``dtype: int8``) are float32 again, in the plain modules."""
    shell = clone_shell(model).eval()
    restore_plain(shell, Int8)
    return shell


def _graph_of(
    shell: nn.Module, batches: list[Batch], plan: Plan, answering: nn.Module, dynamic: Mapping[str, DynamicTable], stand_ins: Mapping[str, Tensor],
    together: Together,
) -> ServingGraph:  # fmt: skip
    """``answering``: what is asked for the answers, in evaluation mode. ``dynamic``: the tables with dynamic ids, ``stand_ins``: those that
    are elsewhere, both by parameter name."""
    rows = RowsOnDemand(stand_ins, row_reader(together, lambda n: stand_ins[n].shape[1], lambda n: stand_ins[n].dtype))
    names = table_names(shell)
    served = {names[id(shell.get_parameter(n))]: (*t.served(), t.padding) for n, t in dynamic.items()}
    captured = capture(shell, batches)
    if captured.program is not None:
        raise ExportError(f"the model cannot be exported, as it does not run as one graph: {'; '.join(captured.notes)}")
    context = Context(captured.graph, shell)
    lower = LowerToServing(plan.serving.inline_below, {n: (len(each), len(ids)) for n, (ids, each, _) in served.items()})
    records = [r for each in (EvalForm(), FoldBatchNorm(), lower) for r in each.run(context)]
    _refuse_state(context.graph)
    stored = {names[id(t)]: t for t in [*shell.buffers(), *shell.parameters()] if id(t) in names}
    inside = {names.get(id(t)) for n in context.graph.nodes if (t := stored_tensor(n, shell)) is not None}
    if stays := next((n for n in served if n in inside), None):
        why = "; ".join(left_inside(records))
        raise ExportError(f"table '{stays}' has dynamic ids and cannot stay inside the graph: {why}")
    for name in (n for n, t in stand_ins.items() if names[id(t)] in inside):
        rows.fill(name)
    full = {id(t): n for n, t in [*reversed([*shell.named_parameters(), *shell.named_buffers()]), *stand_ins.items()]}
    called = {n: full[id(t)] for n, t in stored.items()}
    stored.update({n: each for n, (_, each, _) in served.items()})
    tables = {node.args[_table_argument(node)]: None for node in context.graph.nodes if node.target in (GATHER, BAG)}
    fixed, placeholders = _fix_numbers(captured)
    kinds, labels = _outputs(captured, batches[0], shell)
    _trim_outputs(context.graph, kinds)
    module = _module(context.graph, shell)
    leaves = [_leaves(captured, placeholders, batch) for batch in batches]
    with rows:
        answers = [_answers(answering, batch, kinds) for batch in batches]
    result = "tensor" if captured.out_spec.is_leaf() else "tuple" if captured.out_spec.type in (tuple, list) and len(kinds) == len(labels) else "dict"
    known = {n: (ids, left_out) for n, (ids, _, left_out) in served.items() if n in tables}
    return ServingGraph(
        module, labels, result, fixed, {n: stored[n].detach() for n in tables}, {n: called[n] for n in tables}, leaves, answers, records, known
    )  # fmt: skip


def _table_argument(node: fx.Node) -> int:
    return 1 if node.target is GATHER else 3


def _refuse_state(graph: fx.Graph) -> None:
    """A served model answers equal requests equally and changes nothing."""
    for node in graph.nodes:
        if node.op == "call_function" and not is_pure(node) and isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            written = [a.name for a, v in zip(schema.arguments, node.args) if a.alias_info is not None and a.alias_info.is_write
                       and isinstance(v, fx.Node) and base_of(v).op == "get_attr"]  # fmt: skip
            drawn = torch.Tag.nondeterministic_seeded in node.target.tags
            if not written and not drawn:
                continue  # in place on a value of its own
            why = "draws random numbers in evaluation mode" if drawn else "changes a stored tensor in evaluation mode (max_norm, say)"
            raise ExportError(explain(
                f"the model cannot be served: {node.target.__name__} {why}", where=node.meta["origin"].where(),
                fix="take it out of forward() for evaluation; modules that are to be in evaluation mode must follow model.eval()"))


def _fix_numbers(captured) -> tuple[dict[str, Any], list[int]]:
    """Python numbers among the inputs become constants, as they were in the sample. Their values, and which leaves stay."""
    inputs, fixed, stay = captured.guards.inputs, {}, []
    nodes = [n for n in captured.graph.nodes if n.op == "placeholder"]
    for node, leaf in zip(nodes, inputs.placeholders):
        value = inputs.baked.get(leaf)
        if leaf not in inputs.baked:
            stay.append(leaf)
            continue
        fixed[inputs.names[leaf]] = value
        for user in list(node.users):
            user.args = fx.map_arg(user.args, lambda n, old=node, new=value: new if n is old else n)
            user.kwargs = fx.map_arg(user.kwargs, lambda n, old=node, new=value: new if n is old else n)
        captured.graph.erase_node(node)
    return fixed, stay


def _leaves(captured, placeholders: list[int], batch: Batch) -> dict[str, Tensor]:
    names = captured.guards.inputs.names
    leaves = pytree.tree_leaves(batch)
    return {names[i]: leaves[i].detach() for i in placeholders}


def _outputs(captured, batch: Batch, shell: nn.Module) -> tuple[list[bool], list[str]]:
    """Which leaves of the result are tensors, and their names."""
    with torch.no_grad():
        result = shell(*_copied(batch)[0], **_copied(batch)[1])
    pairs = pytree.tree_flatten_with_path(result)[0]
    kinds, labels = [], []
    for path, leaf in pairs:
        kinds.append(isinstance(leaf, Tensor))
        if isinstance(leaf, Tensor):
            text = ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
            labels.append(text if text and not text[0].isdigit() else f"output_{text}" if text else "output")
        elif leaf is not None:
            raise ExportError(f"the model returns {leaf!r} beside tensors; a served model returns tensors only. Return it as a tensor, or not at all")
    if not labels:
        raise ExportError("the model returns no tensor; there is nothing to serve")
    return kinds, labels


def _trim_outputs(graph: fx.Graph, kinds: list[bool]) -> None:
    """Only tensors are outputs, each a value of its own."""
    output = graph.output_node()
    leaves = [leaf for leaf, keep in zip(output.args[0], kinds) if keep]
    seen: set[fx.Node] = set()
    for k, leaf in enumerate(leaves):
        if leaf in seen or leaf.op in ("placeholder", "get_attr"):
            with graph.inserting_before(output):
                leaves[k] = graph.call_function(aten.clone.default, (leaf,))
            leaves[k].meta.update(leaf.meta)
        seen.add(leaf)
    output.args = (tuple(leaves),)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or not is_pure(n))


def _module(graph: fx.Graph, shell: nn.Module) -> fx.GraphModule:
    """The graph on a module that holds just the tensors it reads, as buffers."""
    root, flat = nn.Module(), {}
    for node in graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            if name not in flat:
                value = fetch(shell, name)
                flat[name] = f"{re.sub(r'[^0-9A-Za-z_]', '_', name)}_{len(flat)}"
                root.register_buffer(flat[name], value.detach()) if isinstance(value, Tensor) else setattr(root, flat[name], value)
            node.target = flat[name]
    return fx.GraphModule(root, graph, "ServingGraph")


def _copied(batch: Batch) -> Batch:
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, batch)


def _answers(model: nn.Module, batch: Batch, kinds: list[bool]) -> list[Tensor]:
    """What ``model`` gives in evaluation mode."""
    args, kwargs = _copied(batch)
    with torch.no_grad(), modes_kept(model):
        leaves = pytree.tree_leaves(model.eval()(*args, **kwargs))
    if isinstance(model, OptimizedModel):
        model._shell.training = model.training
    return [leaf.detach().cpu() for leaf, keep in zip(leaves, kinds) if keep]


def to_onnx(graph: ServingGraph) -> onnx.ModelProto:
    """The ONNX model, its values named after inputs and outputs. Raises :class:`ExportError`."""
    module, labels, first = graph.module, graph.labels, graph.leaves[0]
    sizes = {t.shape[0] for t in first.values() if t.dim()}
    if sizes == {1}:
        raise ExportError("sample_inputs is a batch of one: sizes of 1 are taken to be always 1. Pass a batch of two or more")
    auto = torch.export.Dim.AUTO
    try:
        with torch.no_grad(), quiet(), _without_warnings():
            program = torch.export.export(
                module, tuple(first.values()), dynamic_shapes=tuple({i: auto for i in range(t.dim())} for t in first.values()), strict=False
            )  # fmt: skip
            made = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, verbose=False, custom_translation_table=translations()
            )  # fmt: skip
    except Exception as error:
        raise ExportError(f"the captured graph cannot be written as ONNX ({type(error).__name__}): {str(error).strip()[:1500]}") from error
    proto = made.model_proto
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    low = {str(symbol): int(r.lower) for symbol, r in program.range_constraints.items() if str(r.lower).lstrip("-").isdigit()}
    if len(proto.graph.input) != len(first) or len(proto.graph.output) != len(labels):
        raise ExportError(f"the ONNX exporter changed the inputs {list(first)} to {[i.name for i in proto.graph.input]}; please report this model")
    _name_values(proto, list(first), labels)
    names = _name_dimensions(proto, list(first))
    graph.inputs = [_described(value) for value in proto.graph.input]
    lowest = {names[symbol]: least for symbol, least in low.items() if symbol in names and least > 2}
    for each in graph.inputs:
        least = {str(axis): lowest[size] for axis, size in enumerate(each["shape"]) if size in lowest}
        if least:
            each["least"] = least
    graph.outputs = [{**_described(value), "name": label} for value, label in zip(proto.graph.output, labels)]
    return proto


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """The exporter logs that torchvision is not there, and warns of its own calls."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _described(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [d.dim_param or (d.dim_value if d.HasField("dim_value") else f"{value.name}_{i}") for i, d in enumerate(tensor.shape.dim)]
    return {"name": value.name, "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, "shape": shape}


def _name_values(proto: onnx.ModelProto, inputs: list[str], labels: list[str]) -> None:
    """Inputs and outputs get these names (an output "x" beside an input "x" is "x.out"), and nothing else has one of them."""
    outputs = [f"{label}.out" if label in inputs else label for label in labels]
    taken = {*inputs, *outputs}
    made = {name for node in proto.graph.node for name in node.output} | {t.name for t in proto.graph.initializer}
    renamed = {name: f"{name}.inner" for name in made & taken}
    renamed.update(zip((v.name for v in proto.graph.input), inputs))
    renamed.update(zip((v.name for v in proto.graph.output), outputs))
    for node in proto.graph.node:
        rename_values(node, renamed)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer):
        value.name = renamed.get(value.name, value.name)


def _name_dimensions(proto: onnx.ModelProto, order: list[str]) -> dict[str, str]:
    """Call the batch's dimension "batch" and others after the input where they first appear, everywhere in ``proto``."""
    inputs = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in proto.graph.input}
    leading = [o.type.tensor_type.shape.dim[0].dim_param for o in proto.graph.output if o.type.tensor_type.shape.dim]
    known = {symbol for dims in inputs.values() for symbol in dims if symbol and not symbol.isdigit()}
    batch = next((symbol for symbol in leading if symbol in known), None)
    if batch is None:
        counted = Counter(dims[0] for dims in inputs.values() if dims and dims[0] in known)
        batch = counted.most_common(1)[0][0] if counted else None
    names = {} if batch is None else {batch: BATCH}
    for name in order:
        for axis, symbol in enumerate(inputs.get(name, ())):
            if symbol in known:
                names.setdefault(symbol, f"{name}_{axis}")

    def rename(text: str) -> str:
        return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m.group(), m.group()), text)

    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param.isdigit():  # a size that the export found to be fixed
                dim.dim_value = int(dim.dim_param)
            elif dim.dim_param:
                dim.dim_param = rename(dim.dim_param)
    return names


def left_inside(records: list[Record]) -> list[str]:
    """Sentences for the lookups whose tables did not leave the graph."""
    return [f"{r.subject or 'the model'}: {r.reason}" for r in records if r.kind == "lookups" and r.status != APPLIED]
