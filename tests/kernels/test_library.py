"""Backwards that are recorded: each input's own gradient, where one input is made of another, or is it."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.cin import op as cin
from tablewright.kernels.dice import op as dice
from tablewright.kernels.mlp import op as mlp
from tablewright.kernels.mlp import reference as plain_mlp
from tablewright.kernels.mlp.layers import Layer, encode
from tablewright.kernels.row_layers import op as row_layers

LAYERS = (Layer(True, 0.0), Layer(False, 0.0))


def use_mlp(function, x, w, b):
    h = function(x @ w, [w, w], [b, b])
    return function(h, [w, w], [b, None])


MODELS = {  # of a function, x [5, 3, 4], w [4, 4] and b [4]; the function, and the same in plain PyTorch
    "row_layers": (lambda f, x, w, b: f(torch.tanh(x @ w), [w, w], [b, None], "sigmoid,none"), row_layers.call, row_layers.reference),
    "mlp": (
        use_mlp,
        lambda x, weights, biases: mlp.call(x, weights, biases, encode(LAYERS), [True] * 2),
        lambda x, weights, biases: plain_mlp.plain(x, weights, biases, LAYERS, [True] * 2),
    ),
    "cin_layer": (lambda f, x, w, b: f(x, f(x, x, w[:3].repeat(1, 3)[:, :9], b[:3]), w[:3].repeat(1, 3)[:, 3:], b[:3]), cin.call, cin.reference),
    "dice": (lambda f, x, w, b: f(x @ w, (x @ w - b) * 2, b), dice.call, dice.reference),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_inputs_made_of_each_other_count_once(name):
    model, *functions = MODELS[name]
    torch.manual_seed(0)
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3, 4), (4, 4), (4,))]
    made = []
    for function in functions:
        first = torch.autograd.grad(model(function, *leaves).square().sum(), leaves, create_graph=True)
        made.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])  # type: ignore[arg-type]
    for ours, plain in zip(*made, strict=True):
        torch.testing.assert_close(ours, plain)
