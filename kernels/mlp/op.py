"""``tablewright::mlp``: a chain of linear layers with their ReLU and dropout as one op.

::

    mlp(x, weights, biases, layers, train) -> [*, out of the last layer]

``x`` is ``[*, in]``, ``weights[i]`` ``[out_i, in_i]``, ``biases[i]`` ``[out_i]`` or none, any floating dtype, one for all, but on CPU a layer of
low ``x`` may be float32 (as in ``tablewright::dense``); ``layers`` is an encoded tuple of :class:`~.layers.Layer`; ``train[i]`` says whether the dropout of layer i drops. The parameters are the model's own.

What ReLU and dropout leave of a value is kept for the backward as one bit. Its derivative at 0 is 0 and NaN passes, as in torch.
A gradient at a value that did not pass is 0 even where it is infinite or NaN. On CPU dropout draws what ``F.dropout`` draws, value for value;
on a GPU it draws from a seed that torch's generator of that device gives (so ``torch.manual_seed``, checkpoints and CUDA graphs
hold), with a probability rounded to a multiple of 2**-16. A backward that is differentiated again (``create_graph=True``) runs
through plain PyTorch ops. Under autocast the products are of autocast's dtype, as those of ``F.linear``.

Raises ``ValueError`` for shapes that do not chain, for unequal dtypes and for a description that is none.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..library import DIRECT, LIBRARY, recorded_gradients, tracing
from . import cpu, reference
from .layers import Layer, decode, words

_SEEDED = (torch.Tag.nondeterministic_seeded,)
LIBRARY.define("mlp(Tensor x, Tensor[] weights, Tensor?[] biases, str layers, bool[] train) -> Tensor", tags=_SEEDED)
LIBRARY.define(
    "mlp_forward(Tensor x, Tensor[] weights, Tensor?[] biases, str layers, bool[] train, Tensor? seed) -> Tensor[]", tags=_SEEDED
)
LIBRARY.define(
    "mlp_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] outs, Tensor[] masks, str layers, bool[] train, bool[] wanted)"
    " -> Tensor[]"
)


def implementation(device: torch.device):
    """The module whose functions run on ``device``."""
    if device.type == "cpu":
        return cpu
    from . import gpu  # Triton is imported only where a GPU asks for it

    return gpu


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], layers: Sequence[Layer], train) -> None:
    if not len(weights) == len(biases) == len(train) == len(layers) > 0:
        raise ValueError(
            f"{len(layers)} layers with {len(weights)} weights, {len(biases)} biases and {len(train)} flags; as many of each are needed"
        )
    width = x.shape[-1]
    dtypes = (x.dtype, torch.float32) if x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) else (x.dtype,)
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(f"the weight of layer {i} has shape {list(weight.shape)}; [out, {width}] was needed")
        width = weight.shape[0]
        if bias is not None and tuple(bias.shape) != (width,):
            raise ValueError(f"the bias of layer {i} has shape {list(bias.shape)}; [{width}] was needed")
        wrong = next((t for t in (weight, bias) if t is not None and t.dtype not in dtypes), None)
        if wrong is not None:
            raise ValueError(f"layer {i} holds {wrong.dtype} and its input is {x.dtype}; one dtype for both was needed")


def _forward(x: Tensor, weights, biases, text: str, train: Sequence[bool], seed: Tensor | None) -> list[Tensor]:
    """The results of all layers as ``[rows, out]``, then their masks."""
    outs, masks = implementation(x.device).forward(x.reshape(-1, x.shape[-1]), weights, biases, decode(text), train, seed)
    return outs + masks


def _backward(grad: Tensor, x: Tensor, weights, outs, masks, text: str, train: Sequence[bool], wanted: Sequence[bool]) -> list[Tensor]:
    """The ``wanted`` gradients, in the order x, first weight, first bias, second weight, ..."""
    pairs = list(zip(wanted[1::2], wanted[2::2]))
    flat = grad.reshape(-1, grad.shape[-1])
    run = implementation(x.device).backward
    dx, made = run(flat, x.reshape(-1, x.shape[-1]), weights, outs, masks, decode(text), train, wanted[0], pairs)
    out = [] if dx is None else [dx.view(x.shape)]
    return out + [g for pair in made for g in pair if g is not None]


class _Mlp(torch.autograd.Function):
    """Inputs after the text, the flag, the seed and the input: weights, then biases, as many of each as there are layers."""

    @staticmethod
    def forward(ctx, text, train, seed, x, *tensors):
        count = len(decode(text))
        weights, biases = list(tensors[:count]), list(tensors[count:])
        if tracing():
            with torch._C._AutoDispatchBelowAutograd():
                made = torch.ops.tablewright.mlp_forward(x, weights, biases, text, train, seed)
        else:
            made = _forward(x, weights, biases, text, train, seed)
        ctx.text, ctx.train = text, list(train)
        ctx.save_for_backward(x, *weights, *biases, *made[: count - 1], *made[count:])
        return made[count - 1].view(*x.shape[:-1], made[count - 1].shape[1])

    @staticmethod
    def backward(ctx, grad):
        layers = decode(ctx.text)
        count = len(layers)
        x, *saved = ctx.saved_tensors
        weights, biases, saved = saved[:count], saved[count : 2 * count], saved[2 * count :]
        outs, masks = saved[: count - 1], saved[count - 1 :]
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():

            def again(x, *tensors):
                made = reference.masked_again(x.reshape(-1, x.shape[-1]), tensors[:count], tensors[count:], layers, ctx.train, masks)
                return made.view(grad.shape)

            return (None, None, None, *recorded_gradients(again, [x, *weights, *biases], needs, grad))
        wanted = [needs[0], *(n for pair in zip(needs[1 : 1 + count], needs[1 + count :]) for n in pair)]
        run = torch.ops.tablewright.mlp_backward if tracing() else _backward
        made = iter(run(grad, x, weights, outs, masks, ctx.text, ctx.train, wanted))
        found = [next(made) if want else None for want in wanted]
        return (None, None, None, found[0], *found[1::2], *found[2::2])


def _autograd(x: Tensor, weights, biases, layers: str, train: Sequence[bool]) -> Tensor:
    if x.layout != torch.strided:  # a sparse matrix: torch's own product takes it, ours read dense rows
        return reference.plain(x, weights, biases, decode(layers), train)
    if torch.is_autocast_enabled(x.device.type):
        if x.is_cpu:
            return reference.plain(x, weights, biases, decode(layers), train)  # which autocast sees and casts as in the plain model
        low = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(low), [w.to(low) for w in weights]
        biases = [None if b is None else b.to(low) for b in biases]
    _check(x, weights, biases, decode(layers), train)
    seed = _seed(x, layers, train)
    if not torch.is_grad_enabled() and not tracing():
        return _result(x, weights, biases, layers, train, seed)
    return _Mlp.apply(layers, train, seed, x, *weights, *biases)


def _seed(x: Tensor, layers: str, train: Sequence[bool]) -> Tensor | None:
    """Where a GPU's dropout begins: one number from torch's generator, which stays on the device."""
    if x.is_cpu or not any(layer.dropped(drops) for layer, drops in zip(decode(layers), train)):
        return None
    return torch.randint(2**62, (1,), device=x.device)


def _result(x: Tensor, weights, biases, layers: str, train: Sequence[bool], seed: Tensor | None) -> Tensor:
    out = _forward(x, weights, biases, layers, train, seed)[len(weights) - 1]
    return out.view(*x.shape[:-1], out.shape[1])


def _kernel(x: Tensor, weights, biases, layers: str, train: Sequence[bool]) -> Tensor:
    _check(x, weights, biases, decode(layers), train)
    return _result(x, weights, biases, layers, train, _seed(x, layers, train))


@torch.library.register_fake("tablewright::mlp", lib=LIBRARY)
def _fake(x, weights, biases, layers, train):
    _check(x, weights, biases, decode(layers), train)
    return x.new_empty((*x.shape[:-1], weights[-1].shape[0]))


@torch.library.register_fake("tablewright::mlp_forward", lib=LIBRARY)
def _fake_forward(x, weights, biases, layers, train, seed):
    rows = x.numel() // x.shape[-1] if x.dim() > 2 else x.shape[0] if x.dim() == 2 else 1
    outs = [x.new_empty((rows, w.shape[0])) for w in weights]
    masked = [w for w, layer, drops in zip(weights, decode(layers), train) if layer.masks(drops)]
    return outs + [x.new_empty((rows, words(w.shape[0])), dtype=torch.int32) for w in masked]


@torch.library.register_fake("tablewright::mlp_backward", lib=LIBRARY)
def _fake_backward(grad, x, weights, outs, masks, layers, train, wanted):
    likes = [x.new_empty(x.shape)]
    for weight in weights:
        likes += [weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])]
    return [like for like, want in zip(likes, wanted) if want]


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("mlp", _kernel, _device)
    LIBRARY.impl("mlp_forward", _forward, _device)
    LIBRARY.impl("mlp_backward", _backward, _device)
LIBRARY.impl("mlp", _autograd, "Autograd")

OP = torch.ops.tablewright.mlp.default


def call(x: Tensor, weights, biases, layers: str, train: Sequence[bool]) -> Tensor:
    """:data:`OP` without the trip through torch's dispatcher, wherever nothing needs to see the op."""
    run = OP if torch.compiler.is_compiling() or tracing() else _autograd
    return run(x, weights, biases, layers, train)


DIRECT[OP] = call
