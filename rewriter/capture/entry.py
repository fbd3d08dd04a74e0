"""The guards of one variant as one generated function, for calls like the captured one where nothing has changed.

Looking at 26 tables one guard at a time takes as long as all their lookups. Here every leaf and every attribute is compared by
identity in straight-line code. Where anything differs, the function says so and no more: then ``Guards.failure`` looks again,
allows what is equal though not the same object, and finds the words.
"""
from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.fx import Graph

from ...passes.graph import fetch
from .plain_model import Watched
from .shell import attach

if TYPE_CHECKING:
    from .frontend import Captured
    from .guards import Guards
    from .inputs import Inputs


class _Leaf(int):
    """The place of one leaf, standing for its value."""


class _Code:
    """Lines of a function body that return None at the first difference, and the constants they name."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}

    def constant(self, value: Any) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def refuse_if(self, *conditions: str, indent: str = "") -> None:
        if conditions:
            self.lines.append(f"{indent}if {' or '.join(conditions)}: return None")

    def function(self, result: str) -> Callable:
        body = "\n  ".join([*self.lines, f"return {result}"])
        exec(f"def enter(args, kwargs):\n try:\n  {body}\n except (KeyError, ValueError, ArithmeticError): return None", self.constants)
        return self.constants["enter"]


def compile_entry(guards: Guards, watched: list[Watched]) -> Callable[[tuple, dict], list | None]:
    """A function (args, kwargs) -> the graph's inputs, or None where ``guards`` (and ``watched``) have to be asked in full."""
    code = _Code()
    inputs = guards.inputs
    try:
        args, kwargs = pytree.tree_unflatten([_Leaf(i) for i in range(len(inputs.types))], inputs.spec)
    except Exception:  # a registered class (torchrec's KeyedJaggedTensor) that looks at its tensors when it is put together
        return lambda args, kwargs: None
    if not (_structure(code, args, "args") and _structure(code, kwargs, "kwargs")):
        return lambda args, kwargs: None
    _leaves(code, inputs)
    if guards.holds is not None:
        shapes = "".join(f"x{i}.shape, " for i in inputs.tensors)
        code.refuse_if(f"not {code.constant(guards.holds)}(({shapes}))")
    for namespace, attributes in guards.namespaces():
        code.refuse_if(*_same(code, code.constant(namespace), attributes))
    for each in guards.globals:
        home, expression = each.place()
        if each.by_identity:
            code.refuse_if(f"{code.constant(home)}{expression} is not {code.constant(each.value)}")
        else:
            code.refuse_if(f"{code.constant(each.changed)}() is not None")
    modules: dict[int, tuple[weakref.ref, list, list[Watched]]] = {}  # by the place of the module in memory, so only while it lives
    for ref, attributes in guards.original_namespaces():
        modules.setdefault(id(ref()), (ref, [], []))[1].extend(attributes)
    for each in watched:
        modules.setdefault(id(each.module()), (each.module, [], []))[2].append(each)
    modules.pop(id(None), None)
    for ref, attributes, homes in modules.values():
        code.lines += [f"m = {code.constant(ref)}()", "if m is not None:", "  d = m.__dict__"]
        code.refuse_if(*_same(code, "d", attributes), *(c for each in homes for c in _held(code, each)), indent="  ")
    if guards.has_more():
        code.refuse_if(f"not {code.constant(guards.more_holds)}()")
    return code.function("[" + ", ".join(f"x{i}" for i in inputs.placeholders) + "]")


def _structure(code: _Code, value: Any, name: str) -> bool:
    """Unpack ``name`` down to its leaves, as x0, x1, ...; False for containers that only pytree knows."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        code.refuse_if(f"type({name}) is not {code.constant(kind)}", f"tuple({name}) != {code.constant(tuple(value))}" if value else name)
        children = [(f"{name}[{code.constant(key)}]", child) for key, child in value.items()]
    elif kind in (tuple, list) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        code.refuse_if(f"type({name}) is not {code.constant(kind)}", f"len({name}) != {len(value)}")
        children = [(f"{name}[{i}]", child) for i, child in enumerate(value)]
    else:
        return False
    if all(isinstance(child, _Leaf) for _, child in children) and children and kind not in (dict, OrderedDict):
        code.lines.append("".join(f"x{int(child)}, " for _, child in children) + f"= {name}")
        return True
    for expression, child in children:
        if isinstance(child, _Leaf):
            code.lines.append(f"x{int(child)} = {expression}")
            continue
        inner = f"v{len(code.lines)}"
        code.lines.append(f"{inner} = {expression}")
        if not _structure(code, child, inner):
            return False
    return True


def _leaves(code: _Code, inputs: Inputs) -> None:
    facts = dict(zip(inputs.tensors, inputs.facts))
    for i, kind in enumerate(inputs.types):
        x = f"x{i}"
        if i in inputs.baked:
            value = code.constant(inputs.baked[i])
            code.refuse_if(f"{x} is not {value} and (type({x}) is not {code.constant(kind)} or {x} != {value})")
            continue
        conditions = [f"type({x}) is not {code.constant(kind)}"]
        if i in facts:
            dtype, rank, on_cpu = facts[i]
            conditions += [f"{x}.dtype is not {code.constant(dtype)}", f"{x}.ndim != {rank}", f"{x}.is_cpu is not {on_cpu}"]
        if i in inputs.ranks:
            conditions.append(f"{x}.ndim != {inputs.ranks[i]}")
        code.refuse_if(*conditions)
    if inputs.device is not None and inputs.device.type != "cpu":
        code.refuse_if(f"x{inputs.tensors[0]}.device != {code.constant(inputs.device)}")


def _held(code: _Code, watched: Watched) -> list[str]:
    """Conditions that hold where one home of the user's module ``d`` holds something else than expected."""
    expected, home = code.constant(watched.expected), f"d[{watched.home!r}]"
    if watched.home == "_modules":
        return [f"{home} != {expected}"]  # dicts compare by identity first; tensors have an == of their own
    names = list(watched.seen)
    held = [f"(h := {home})", *["h"] * len(names)]
    return [f"{h}[{name!r}] is not {expected}[{name!r}]" for h, name in zip(held, names)]


def _same(code: _Code, namespace: str, attributes: list[tuple[str, Any, bool]]) -> list[str]:
    """Conditions that hold where an attribute is another object than it was, or for a container, not equal to its copy."""
    conditions = []
    for name, value, by_value in attributes:
        now = f"{namespace}[{name!r}]"
        if by_value:
            conditions.append(f"type({now}) is not {code.constant(type(value))}")
        conditions.append(f"{now} {'!=' if by_value else 'is not'} {code.constant(value)}")
    return conditions


# --- running -----------------------------------------------------------------------------------------------------------------


def with_live_tensors(shell: nn.Module, graph: Graph) -> Callable[..., tuple]:
    """``attach(shell, graph).forward`` with the tensors that ``graph`` reads handed in, read from their homes at each call:
    nn.Module's own attribute look-up takes 0.3 us a step. Changes ``graph``."""
    given = [node for node in graph.nodes if node.op == "placeholder"]
    reads = [(node, _read(shell, str(node.target))) for node in graph.nodes if node.op == "get_attr"]
    reads = [(node, found) for node, found in reads if found is not None]
    if not reads or any(node.args for node in given):
        return attach(shell, graph).forward
    code, expressions, paths = _Code(), [], [str(node.target) for node, _ in reads]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node, (start, expression) in reads:
        expressions.append(code.constant(start) + expression)
        with graph.inserting_before(first):
            tensor = graph.placeholder(node.name)
        node.replace_all_uses_with(tensor)
    for node, _ in reads:
        graph.erase_node(node)

    forward = attach(shell, graph).forward
    names = ", ".join(f"x{i}" for i in range(len(given)))
    moved = code.constant(lambda: [fetch(shell, path) for path in paths])  # a parametrization, say, has taken a home away
    exec(
        f"def run({names}):\n try: tensors = {', '.join(expressions)},\n except KeyError: tensors = {moved}()\n"
        f" return {code.constant(forward)}({names}{', ' if names else ''}*tensors)",
        code.constants,
    )
    return code.constants["run"]


def packer(captured: Captured, shell: nn.Module) -> Callable[[tuple], Any]:
    """``captured.result`` on ``shell``; straight for one tensor and for flat containers, where a spec takes 3 us to follow."""
    spec: Any = captured.out_spec
    if captured.program is None and not captured.effects:
        if spec.is_leaf():
            return itemgetter(0)
        if spec.num_nodes == spec.num_leaves + 1 and spec.type in (tuple, list):
            return spec.type
        if spec.num_nodes == spec.num_leaves + 1 and spec.type is dict:
            keys = tuple(spec.context)
            return lambda leaves: dict(zip(keys, leaves))
    return functools.partial(captured.result, shell)


def _read(root: nn.Module, path: str) -> tuple[dict, str] | None:
    """A dict and the subscripts that lead from it to the parameter or buffer ``root.<path>``; None where that is something else."""
    *parents, name = path.split(".")
    module, expression = root, ""
    for parent in parents:
        if parent in module.__dict__ or hasattr(type(module), parent) or not isinstance(module._modules.get(parent), nn.Module):
            return None
        expression += f"{'._modules' if expression else ''}[{parent!r}]"
        module = module._modules[parent]
    home = next((h for h in ("_parameters", "_buffers") if isinstance(getattr(module, h).get(name), torch.Tensor)), None)
    if home is None or name in module.__dict__ or hasattr(type(module), name):
        return None
    return (root._modules, f"{expression}.{home}[{name!r}]") if parents else (getattr(root, home), f"[{name!r}]")
