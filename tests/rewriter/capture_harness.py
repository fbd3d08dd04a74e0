"""Capture a model and compare the graph with its plain forward: what the capture tests share."""
import copy

import torch
from tablewright.passes.origin import KEY, Origin
from tablewright.rewriter.capture import attach, capture, clone_shell


def captured(model, args, kwargs=None, door=None, **more):
    """(captured, graph module, shell); checks the door, the origins, outputs in both modes, gradients and buffers."""
    kwargs = kwargs or {}
    shell = clone_shell(model)
    result = capture(shell, args, kwargs, originals=dict(model.named_modules()), **more)
    if door is not None:
        assert result.door == door, result.notes
    batch = (args[0] if isinstance(args, list) else (args, kwargs))
    module = attach(shell, result.graph)
    module.graph.lint()
    for node in result.graph.nodes:
        assert isinstance(node.meta.get(KEY), Origin), node
    modes = [model.training] if result.guards.modes else [True, False]
    for mode in modes:
        same(model, module, shell, result, *batch, mode)
    return result, module, shell


def same(model, module, shell, result, args, kwargs, mode):
    plain = copy.deepcopy(model).train(mode)
    shell.train(mode)
    assert result.guards.failure(args, kwargs) is None
    state = torch.get_rng_state()
    wanted = torch.utils._pytree.tree_leaves(plain(*args, **kwargs))
    torch.set_rng_state(state)
    before = {name: buffer.clone() for name, buffer in shell.named_buffers()}
    found = module(*result.guards.flatten(args, kwargs))
    assert len(wanted) == len(found)
    total, mine = 0, 0
    for a, b in zip(wanted, found):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, equal_nan=True)
            if a.requires_grad:
                total, mine = total + a.sum(), mine + b.sum()
        else:
            assert a == b
    for (name, a), (other, b) in zip(plain.named_buffers(), shell.named_buffers()):
        assert name == other
        torch.testing.assert_close(a, b)
    if isinstance(total, torch.Tensor):
        total.backward()
        parameters = dict(model.named_parameters())
        mine.backward()
        for name, parameter in plain.named_parameters():
            a, b = parameter.grad, parameters[name].grad
            assert (a is None) == (b is None), name
            if a is not None:
                torch.testing.assert_close(b.to_dense(), a.to_dense())
            parameters[name].grad = None
    with torch.no_grad():
        for name, buffer in shell.named_buffers():
            buffer.copy_(before[name])


def targets(result):
    return [str(node.target) for node in result.graph.nodes if node.op == "call_function"]
