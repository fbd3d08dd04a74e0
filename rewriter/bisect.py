"""Find the first rewrite that changes what the model computes."""
from __future__ import annotations

import torch

from ..passes.records import APPLIED
from .capture import attach


def first_difference(compiler, variant, args: tuple, kwargs: dict, tolerance: float = 1e-5) -> str:
    """Binary search on how many rewrites are made. Outputs are compared under one RNG state, with tolerance relative to the
    largest output. Returns a sentence."""
    if variant.captured.program is not None:
        return "the model runs through dynamo or plainly, where rewrites are not undone one by one: use check()"
    leaves = variant.captured.guards.flatten(args, kwargs)

    def outputs(budget: int | None):
        graph = variant.captured.graph if budget == 0 else compiler.rewrite(variant.captured.graph, budget)[0]
        with torch.random.fork_rng(), torch.no_grad():
            buffers = {name: b.clone() for name, b in compiler.shell.named_buffers()}
            try:
                return attach(compiler.shell, graph)(*leaves)
            finally:
                for name, b in compiler.shell.named_buffers():
                    b.copy_(buffers[name])

    plain = outputs(0)

    def differs(budget: int) -> bool:
        for a, b in zip(plain, outputs(budget)):
            if isinstance(a, torch.Tensor):
                scale = max(float(a.abs().max()) if a.numel() else 0.0, 1.0)
                if a.shape != b.shape or not torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance * scale):
                    return True
        return False

    total = sum(step.made for step in compiler.rewrite(variant.captured.graph)[1])
    if total == 0 or not differs(total):
        return f"none of the {total} rewrites changes the outputs by more than {tolerance:g} of the largest"
    good, bad = 0, total
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if differs(middle) else (middle, bad)
    before, after = ([r for s in compiler.rewrite(variant.captured.graph, n)[1] for r in s.records] for n in (good, bad))
    rows = [r for r in after if r.status == APPLIED and r not in before]
    named = ", ".join(r.subject or "the model" for r in rows[:5]) + (", ..." if len(rows) > 5 else "")
    where = f" ({rows[0].location})" if rows[0].location else ""
    return f"rewrite {bad} of {total}, by {rows[0].rule}, changes the outputs first: {named}{where}"
