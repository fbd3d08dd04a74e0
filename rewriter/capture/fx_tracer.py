"""Door 1: run ``forward`` once on stand-ins and write down the ATen ops it means. Needs no example inputs.

It captures what is on the documented table (``aten_form.py``, ``aten_special.py``) and gives up on everything else, with
the reason and the user's line. ``self.training`` stays a value of the graph; a Python branch on it makes the capture
valid for the current mode only, and the log says so.
"""
from __future__ import annotations

import dis
import linecache
import operator
import os
import sys

import numpy
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.overrides import resolve_name

from ...passes.origin import KEY, Origin
from . import aten_form, aten_lookup, aten_special  # noqa: F401  (aten_lookup registers its lowerings when imported)
from .cleanup import may_alias
from .recording import ReadLog, raised_at, user_location
from .value import GiveUp, NumberValue, SequenceValue, TensorValue, tensor_value

aten = torch.ops.aten
_PROPERTIES = {getattr(torch.Tensor, name).__get__: name for name in ("shape", "ndim", "dtype", "device", "requires_grad")}
CONSTANT = "_tablewright_constant_"
_NO_RANK = "whose number of dimensions is not known without sample inputs"


class Tracer(ReadLog):
    """Builds the graph. As a ReadLog it sees the shell's reads; as the owner of a torch function mode, all torch calls."""

    def __init__(self, shell: nn.Module, fake_mode=None):
        super().__init__(shell)
        self.graph = fx.Graph()
        self.fake_mode = fake_mode
        self.stack: list[tuple[str, type]] = [("", type(shell))]
        self.reason: str | None = None  # set by the first GiveUp, so that nobody can swallow it
        self.where = ""
        self._known: dict[int, str] = {}
        for path, module in shell.named_modules():
            for kind in (module._parameters, module._buffers):
                for name, tensor in kind.items():
                    if tensor is not None:
                        self._known.setdefault(id(tensor), f"{path}.{name}" if path else name)
        self._tensors: dict[str, TensorValue] = {}
        self._numbers: dict[str, NumberValue] = {}
        self._constants: dict[int, fx.Node] = {}
        self._made: dict[fx.Node, torch.Tensor] = {}  # the tensors that they are of, kept so that their ids stay theirs
        self.remade: list[fx.Node] = []  # constants that the graph changes in place
        self.ranks: dict[fx.Node, int] = {}  # placeholders unpacked as ``B, F = ids.shape`` without sample inputs
        self._grad = torch.is_grad_enabled()

    # nodes -------------------------------------------------------------------------------------------------------------
    def node(self, target, args=(), kwargs=None, op="call_function", name=None) -> fx.Node:
        if torch.is_grad_enabled() != self._grad:
            raise GiveUp("forward() switches gradients on or off")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise GiveUp("forward() runs under autocast")
        args, kwargs = self.nodes_of(args), self.nodes_of(kwargs or {})
        if name is None and isinstance(target, torch._ops.OpOverload):
            name = target._schema.name.split("::")[1]  # as export names them
        node = self.graph.create_node(op, target, args, kwargs, name)
        self.stamp(node)
        if self.fake_mode is not None:
            self._propagate(node)
        return node

    def stamp(self, node: fx.Node) -> None:
        file, line, function = user_location(2)
        path = self.stack[-1][0]
        location = f"{os.path.basename(file)}:{line}" if file else ""
        node.meta["nn_module_stack"] = {each: (each, f"{cls.__module__}.{cls.__qualname__}") for each, cls in self.stack}
        if file:
            source = linecache.getline(file, line).strip()
            node.meta["stack_trace"] = f'File "{file}", line {line}, in {function}\n    {source}'
        node.meta[KEY] = Origin((node.name,), "capture", path, location)

    def nodes_of(self, value):
        """Values -> nodes, at any depth of lists, tuples, dicts and slices."""
        kind = type(value)
        if kind in (TensorValue, NumberValue, SequenceValue):
            node = value.__dict__.get("node")
            if node is None or node.graph is not self.graph:
                raise GiveUp("a traced value came back from code that the tracer cannot see into (autograd.Function?)")
            return node
        if isinstance(value, torch.Tensor):
            return self.constant(value)
        if kind in (list, tuple):
            return kind(self.nodes_of(item) for item in value)
        if isinstance(value, (list, tuple)):
            return [self.nodes_of(item) for item in value]
        if kind is dict:
            return {key: self.nodes_of(item) for key, item in value.items()}
        if isinstance(value, numpy.generic):
            return value.item()
        return value

    def constant(self, tensor: torch.Tensor) -> fx.Node:
        """The node of a real tensor: a parameter or buffer under its plain name, or a constant made during the trace."""
        if id(tensor) in self._known:
            return self.state(self._known[id(tensor)], tensor).node
        if isinstance(tensor, nn.Parameter) or tensor.requires_grad:
            raise GiveUp("a parameter that is not registered in the model is used (made inside forward(), or kept in a list)")
        if type(tensor) is not torch.Tensor or tensor.device.type == "meta":
            raise GiveUp(f"a {type(tensor).__name__} on {tensor.device} is used as a constant")
        if id(tensor) not in self._constants:
            number = 0
            while f"{CONSTANT}{number}" in self.shell.__dict__:
                number += 1
            name = f"{CONSTANT}{number}"
            self.shell.__dict__[name] = tensor.clone()
            node = self._constants[id(tensor)] = self.node(name, op="get_attr")
            self._made[node] = tensor
        return self._constants[id(tensor)]

    def state(self, path: str, tensor: torch.Tensor) -> TensorValue:
        if path not in self._tensors:
            value = self.wrap_tensor(self.node(path, op="get_attr"))
            value.known = tensor
            value._is_param = isinstance(tensor, nn.Parameter)
            self._tensors[path] = value
            self._known.setdefault(id(tensor), path)
        return self._tensors[path]

    def emit(self, op, *args, **kwargs):
        """A call of an ATen op, and its results as values."""
        if op._schema.is_mutable:
            for place, argument in enumerate(op._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._changes(args[place] if place < len(args) else kwargs.get(argument.name))
        node = self.node(op, args, kwargs)
        returns = op._schema.returns
        if len(returns) == 1:
            return self._wrap(node, str(returns[0].type))
        items = tuple(self._wrap(self.node(operator.getitem, (node, index)), str(each.type)) for index, each in enumerate(returns))
        named = getattr(torch.return_types, op._schema.name.split("::")[1], None)
        return named(items) if named is not None else items

    def _changes(self, value) -> None:
        """``value`` is about to be changed in place. A tensor that the trace made is made anew at each call, and Python may not hold
        it too: what it does with its own would not be traced."""
        if isinstance(value, torch.Tensor) and not isinstance(value, TensorValue) and id(value) not in self._known:
            raise GiveUp("a tensor that was made without looking at the inputs is changed in place")
        node = value.__dict__.get("node") if isinstance(value, TensorValue) else None
        while isinstance(node, fx.Node) and node not in self._made and may_alias(node) and node.args:
            node = node.args[0]
        if node in self._made:
            tensor = self._made[node]
            held = {node: object()}  # as we hold the tensor, and nobody else
            other = held[node]
            if tensor._base is not None or sys.getrefcount(tensor) > sys.getrefcount(other):
                raise GiveUp("a tensor that Python still holds is changed in place under another name")
            self.remade.append(node)

    def _wrap(self, node, kind: str):
        if kind == "Tensor":
            return self.wrap_tensor(node)
        if kind == "List[Tensor]":
            return SequenceValue(node, self)
        return NumberValue(node, {"number": "float"}.get(kind, kind.lower().replace("symint", "int")), self)

    def wrap_tensor(self, node: fx.Node) -> TensorValue:
        return tensor_value(node)

    # what the values ask -----------------------------------------------------------------------------------------------
    def number(self, function, args) -> NumberValue:
        node = self.node(function, args)
        kind = "int"
        if getattr(function, "__name__", "") in ("eq", "ne", "lt", "le", "gt", "ge"):
            kind = "bool"
        elif getattr(function, "__name__", "") in ("truediv", "pow") or any(isinstance(each, float) for each in args):
            kind = "float"
        return NumberValue(node, kind, self)

    def number_as_bool(self, value: NumberValue) -> bool:
        path = value.__dict__.get("flag_of")
        if path is None:
            value._refuse("a branch")
        self.modes.add(path)  # Python branches on self.training: this graph is for the current mode
        return self._module(path).__dict__["training"]

    def known_length(self, node: fx.Node) -> int:
        """How many tensors a list has, where the code itself says so: split by a list, or ``a, b = x.chunk(2)``."""
        if node.target is aten.split_with_sizes.default:
            return len(node.args[1])
        count = _unpacked_into(sys._getframe(2))
        if count is None or node.target is aten.unbind.int:
            raise GiveUp(f"a loop over the tensors made by {self.describe(node)}, whose number is known only when the graph runs")
        return count

    def rank(self, value) -> int | None:
        """Number of dimensions, where it is certain: of parameters, and of what sample inputs (whose ranks are guarded) imply."""
        if not isinstance(value, TensorValue):
            return value.dim()
        if (real := value.__dict__.get("known")) is not None:
            return real.dim()
        fake = value.node.meta.get("val")
        return None if fake is None or not value.node.meta.get("rank_is_sure") else fake.dim()

    def shape(self, value):
        if (real := value.__dict__.get("known")) is not None:
            return real.shape
        rank = self.rank(value)
        if rank is None:
            return ShapeValue(self, value)
        return tuple(self.size(value, dim) for dim in range(rank))

    def size(self, value, dim):
        if (real := value.__dict__.get("known")) is not None:
            return real.shape[dim]
        return NumberValue(self.node(aten.sym_size.int, (value, dim)), "int", self)

    def dtype(self, value):
        return NumberValue(self.node(getattr, (value, "dtype")), "dtype", self)

    def device(self, value):
        return NumberValue(self.node(getattr, (value, "device")), "device", self)

    def result(self, leaf):
        """A leaf of the model's result as an argument of the output node."""
        node = self.nodes_of(leaf)
        if isinstance(node, fx.Node) and node.op == "get_attr" and str(node.target).startswith(CONSTANT):
            return self.node(aten.clone.default, (node,))  # the model makes a new one at each call
        if node is not None and not isinstance(node, (fx.Node, bool, int, float, str)):
            raise GiveUp(f"a {type(leaf).__name__} is returned")
        return node

    def give_up(self, stop: GiveUp) -> None:
        if self.reason is None:
            file, line, _ = user_location(3)
            self.reason, self.where = stop.reason, raised_at(stop) or (f"{file}:{line}" if file else "")

    def dtype_is_integer(self, value) -> bool:
        real = value.__dict__.get("known")
        return real is not None and not real.is_floating_point()

    def is_mask(self, tensor) -> bool:
        if not isinstance(tensor, TensorValue):
            return tensor.dtype == torch.bool
        fake = tensor.node.meta.get("val")
        return fake is None or fake.dtype in (torch.bool, torch.uint8)

    def parameter_shape(self, weight):
        real = weight.__dict__.get("known") if isinstance(weight, TensorValue) else weight
        if real is None:
            raise GiveUp("a negative padding_idx of a table that is not a parameter")
        return real.shape

    def describe(self, value) -> str:
        node = getattr(value, "node", value)
        if isinstance(node, fx.Node):
            return f"input '{node.target}'" if node.op == "placeholder" else f"the result of {node.name}"
        return type(value).__name__

    # what the shells report ---------------------------------------------------------------------------------------------
    def read_training(self, module, value):
        path = self.path_of(module)
        if path is None:
            return value
        target = f"{path}.training" if path else "training"
        self.flags.add(path)
        if target not in self._numbers:
            flag = NumberValue(self.node(target, op="get_attr"), "bool", self)
            flag.flag_of = path
            self._numbers[target] = flag
        return self._numbers[target]

    def tensor(self, module, name, value):
        path = self.path_of(module)
        if path is None or isinstance(value, TensorValue):
            return value
        super().tensor(module, name, value)
        if name in module.__dict__:
            super().read(module, name, value)  # a plain tensor attribute: live in the graph, and guarded by identity
        return self.state(f"{path}.{name}" if path else name, value)

    def call(self, module, forward, args, kwargs):
        path = self.path_of(module)
        self.stack.append((self.stack[-1][0] if path is None else path, type(module).__bases__[0]))
        try:
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and type(module).forward is nn.BatchNorm1d.forward:
                return self._batch_norm(module, *args, **kwargs)
            if isinstance(module, (nn.RNNBase, nn.MultiheadAttention, nn.modules.batchnorm._NormBase)):
                raise GiveUp(f"{type(module).__name__} is not on the table")
            return forward(*args, **kwargs)
        finally:
            self.stack.pop()

    def write(self, module, name, value):
        if name in module.__dict__.get("_buffers", ()):
            path = self.path_of(module) or ""
            node = value.__dict__.get("node") if isinstance(value, TensorValue) else None
            if node is not None and node.op == "get_attr" and node.target == (f"{path}.{name}" if path else name):
                return False  # ``self.buffer += 1``: changed in place already
            raise GiveUp(f"forward() replaces buffer '{name}'")
        return super().write(module, name, value)

    def _batch_norm(self, module, input):
        """nn.BatchNorm with its flag kept: momentum=None would read the count, which only a running model knows."""
        if module.momentum is None:
            raise GiveUp("BatchNorm with momentum=None")
        mean, variance, weight, bias = module.running_mean, module.running_var, module.weight, module.bias
        if mean is None or variance is None:
            training = True
        else:
            if not module.track_running_stats:
                raise GiveUp("BatchNorm whose track_running_stats was switched off")
            training = module.training
            if module.num_batches_tracked is not None:
                self.emit(aten.add_.Tensor, module.num_batches_tracked, training)
        return aten_special.batch_norm(self, input, mean, variance, weight, bias, training, module.momentum, module.eps)

    def _module(self, path: str) -> nn.Module:
        return self.shell.get_submodule(path) if path else self.shell

    # torch calls ---------------------------------------------------------------------------------------------------------
    def torch_call(self, func, args, kwargs):
        name = getattr(func, "__name__", str(func))
        if name in ("_set_grad_enabled", "_is_torch_function_enabled"):
            return func(*args, **kwargs)
        traced = _has_value((args, kwargs))
        if not traced:
            if self._touches_state((args, kwargs)) and func not in _PROPERTIES and name not in _HARMLESS:
                traced = True
            elif name in aten_form.RANDOM:
                traced = True
            else:
                result = func(*args, **kwargs)
                return result
        special = aten_special.SPECIAL.get(func)
        if special is not None:
            try:
                return special(self, *args, **kwargs)
            except TypeError as error:
                if error.__traceback__.tb_next is not None:  # raised inside: not a question of arguments
                    raise
                raise GiveUp(f"{name} with these arguments ({error})") from error
        lowered = aten_form.lowered(func, args, kwargs)
        if lowered is None:
            raise GiveUp(f"{_spelled(func)} is not on the table of captured calls, or not with these arguments")
        op, positional, keyword = lowered
        result = self.emit(op, *positional, **keyword)
        if op._schema.is_mutable:
            return args[0]
        return result

    def _touches_state(self, value) -> bool:
        return any(isinstance(leaf, torch.Tensor) and (id(leaf) in self._known or leaf.requires_grad)
                   for leaf in pytree.tree_leaves(value))

    # shapes ----------------------------------------------------------------------------------------------------------------
    def _propagate(self, node: fx.Node) -> None:
        """meta["val"]: what the node would be for the sample inputs; no storage is touched."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            self._fake_value(node)

    def _fake_value(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        assert self.fake_mode is not None
        try:
            if node.op == "get_attr":
                value = self.shell
                for part in node.target.split("."):
                    value = _plain_getattr(value, part)
                if isinstance(value, torch.Tensor):
                    value = self.fake_mode.from_tensor(value.detach(), static_shapes=True)
            elif any("val" not in each.meta for each in inputs):
                return
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
                with self.fake_mode:
                    value = node.target(*args, **kwargs)
        except Exception:
            return  # a shape that depends on data: passes see no "val"
        node.meta["val"] = value
        # squeeze() keeps or drops a dimension by its size, so what Python reads after it may differ for other sizes
        node.meta["rank_is_sure"] = (getattr(node.target, "_schema", None) is None or "squeeze" not in str(node.target)
                                     or "unsqueeze" in str(node.target)) and all(
            each.meta.get("rank_is_sure", True) for each in inputs)


_HARMLESS = {"dim", "size", "numel", "is_floating_point", "is_complex", "ndimension", "__len__", "__hash__", "__repr__",
             "stride", "is_contiguous", "nelement", "__get__", "element_size"}


class ShapeValue:
    """``x.shape`` of a tensor of unknown rank: indexable, but not countable or iterable."""

    def __init__(self, tracer: Tracer, value: TensorValue):
        self.tracer, self.value = tracer, value

    def __getitem__(self, index):
        if type(index) is not int:
            raise GiveUp(f"a part of the shape of {self.tracer.describe(self.value)}, {_NO_RANK}")
        return self.tracer.size(self.value, index)

    def __iter__(self):
        count = _unpacked_into(sys._getframe(1))
        if count is not None and self.value.node.op == "placeholder":
            self.tracer.ranks[self.value.node] = count
        if count is None:
            raise GiveUp(f"a loop over the shape of {self.tracer.describe(self.value)}, {_NO_RANK}")
        return iter([self[index] for index in range(count)])

    def __len__(self):
        raise GiveUp(f"the rank of {self.tracer.describe(self.value)}, {_NO_RANK}")

    def __eq__(self, other):
        raise GiveUp("a comparison of shapes")

    numel = __len__


def _spelled(func) -> str:
    try:
        return resolve_name(func) or getattr(func, "__name__", str(func))
    except Exception:
        return getattr(func, "__name__", str(func))


def _plain_getattr(value, name):
    """getattr without the recording class's replies."""
    for place in (value.__dict__, value._parameters, value._buffers, value._modules):
        if name in place:
            return place[name]
    raise AttributeError(name)


def _has_value(value) -> bool:
    kind = type(value)
    if kind in (TensorValue, NumberValue, SequenceValue, ShapeValue):
        return True
    if kind in (tuple, list) or isinstance(value, (tuple, list)):
        return any(_has_value(item) for item in value)
    if kind is dict:
        return any(_has_value(item) for item in value.values())
    if kind is slice:
        return any(_has_value(item) for item in (value.start, value.stop, value.step))
    return False


def _unpacked_into(frame) -> int | None:
    """n where ``frame`` is about to run ``a, b, ... = <value>`` into n names, else None."""
    if frame is None or frame.f_lasti < 0:
        return None
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti:
            return instruction.argval if instruction.opname == "UNPACK_SEQUENCE" else None
    return None
