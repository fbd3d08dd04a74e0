"""One form for both doors: in-place ops on fresh results become their plain ops, and nodes without effect are removed."""
from __future__ import annotations

import operator

import torch
from torch import fx, nn

aten = torch.ops.aten
# ops whose result may share storage with their input without their schema saying so
_MAYBE_VIEWS = {aten.reshape.default, aten.contiguous.default, aten.to.dtype, aten.to.device, aten.to.other,
                aten.to.dtype_layout, aten.flatten.using_ints, aten.type_as.default, aten.expand_as.default, operator.getitem,
                aten.dropout.default, aten.alpha_dropout.default, aten.feature_dropout.default, aten.chunk.default,
                aten.unflatten.int, aten.movedim.int, aten.movedim.intlist, aten.ravel.default, aten.einsum.default,
                aten.matmul.default, aten.tile.default, aten.repeat_interleave.self_int, aten.where.default,
                aten.tensordot.default, aten.constant_pad_nd.default, aten.view_as.default, aten.diff.default}


_WHOLE = (0, (1 << 63) - 1)


def is_mutable(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def has_effect(node: fx.Node) -> bool:
    """Whether a node without users must stay: it changes a tensor, draws random numbers, or calls something unknown."""
    if node.op in ("placeholder", "output", "call_module", "call_method"):
        return True
    if node.op == "get_attr":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace not in ("aten", "prims", "prim"):
            return True
        return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags or (
            "assert" in node.target._schema.name) or "dropout" in node.target._schema.name
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def remove_dead(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and not has_effect(node):
            graph.erase_node(node)


def may_alias(node: fx.Node) -> bool:
    """Whether the result of ``node`` may share storage with anything else (a view, an input, a parameter, an unknown op)."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):  # one of several results, read once
        source, which = node.args
        return may_alias(source) or any(
            user is not node and user.target is operator.getitem and user.args[1] == which for user in source.users)
    if node.op != "call_function" or node.target in _MAYBE_VIEWS:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return any(each.alias_info is not None for each in node.target._schema.returns)


def make_functional(graph: fx.Graph) -> None:
    """relu_(x) -> relu(x), later uses of x reading the result, wherever nobody else can see x's storage.

    Exact: x must be the fresh result of one op, and no view of it may exist before the change. What does not qualify
    (parameters, buffers, inputs, views) stays in place, in its order.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not is_mutable(node) or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        schema = node.target._schema
        name, target = schema.name.split("::")[1], node.args[0]
        changed = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
        if not name.endswith("_") or changed != [schema.arguments[0].name] or len(schema.returns) != 1:
            continue
        plain = getattr(getattr(aten, name[:-1], None), schema.overload_name or "default", None)
        if plain is None or may_alias(target) or schema.name.split("::")[0] != "aten":
            continue
        if any(order[user] < order[node] and may_alias(user) for user in target.users):
            continue
        value, mine = target.meta.get("val"), node.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(mine, torch.Tensor) and value.dtype != mine.dtype:
            continue
        if not _same_dtype(node, plain):
            continue
        with graph.inserting_before(node):
            fresh = graph.call_function(plain, node.args, node.kwargs)
        fresh.meta = dict(node.meta)
        order[fresh] = order[node]
        node.replace_all_uses_with(fresh)
        for user in list(target.users):
            if user is not fresh and user is not node and order[user] > order[node]:
                user.replace_input_with(target, fresh)
        graph.erase_node(node)


_KEEPS_DTYPE = {"relu", "silu", "leaky_relu", "elu", "hardtanh", "relu6", "abs", "neg", "clamp", "clamp_min", "clamp_max",
                "masked_fill", "square", "floor", "ceil", "round", "selu", "celu", "mish", "hardswish", "hardsigmoid", "dropout"}
_ELEMENTWISE = {"add", "sub", "mul", "div", "pow"}


def _same_dtype(node: fx.Node, plain) -> bool:
    """x.add_(y) keeps x's shape and dtype; x + y may promote or broadcast. Only what surely does neither is rewritten."""
    name = plain._schema.name.split("::")[1]
    if name in _KEEPS_DTYPE:
        return True
    if name not in _ELEMENTWISE:
        return name in ("sigmoid", "tanh", "exp", "log", "sqrt", "reciprocal")  # in place they demand a float
    value = node.args[0].meta.get("val")
    others = [arg for arg in node.args[1:] if isinstance(arg, fx.Node)]
    if not isinstance(value, torch.Tensor):
        return False
    if not value.dtype.is_floating_point:
        return False
    for each in others:
        other = each.meta.get("val")
        if not isinstance(other, torch.Tensor) or other.dtype != value.dtype or other.dim() > value.dim():
            return False
    return True


def simplify(graph: fx.Graph, shell: nn.Module) -> None:
    """Removes what export adds and the FX door does not: full slices, copies and conversions of constants nobody changes."""
    changed = {node.args[0] for node in graph.nodes if is_mutable(node) and node.target is not aten.detach_.default}
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor and tuple(node.args[2:4]) == _WHOLE and len(node.args) < 5:
            if node not in changed and not any(user.op == "output" for user in node.users):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        elif node.target in (aten.detach_.default, *_CONVERSIONS) and _is_copied_constant(node.args[0]):
            if not _same_tensor(node, shell):
                continue
            node.replace_all_uses_with(node.args[0])
            if node in changed:
                changed.add(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is aten.lift_fresh_copy.default:
            readers = [*node.users]
            for view in [user for user in readers if user.target is aten.unsqueeze.default]:
                readers.remove(view)
                readers += view.users
            safe = {aten.index.Tensor, aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor}
            if node not in changed and all(user.target in safe for user in readers):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
            else:
                node.target = aten.clone.default


_CONVERSIONS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout)


def _is_copied_constant(node) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.lift_fresh_copy.default and node.args[0].op == "get_attr"


def _same_tensor(node: fx.Node, shell: nn.Module) -> bool:
    """Whether a conversion of a constant converts nothing."""
    value = shell.__dict__.get(node.args[0].args[0].target)
    mine = node.meta.get("val")
    return node.target is aten.detach_.default or (
        isinstance(value, torch.Tensor) and isinstance(mine, torch.Tensor) and value.dtype == mine.dtype and value.device == mine.device)
