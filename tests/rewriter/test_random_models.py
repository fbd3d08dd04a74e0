"""Random models and random loops: optimized equals plain torch with the plain torch optimizer, over three steps.

``pytest`` runs a fixed set of a hundred or so. By hand, any number of new ones::

    PYTHONPATH=<folder of the package> python tests/rewriter/test_random_models.py --examples 500 [--seed 1]
"""
from __future__ import annotations

import argparse
import random
import warnings
from collections import Counter
from collections.abc import Callable

import hypothesis
import random_loops
import random_models
import random_plans
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

SEEN: Counter[str] = Counter()
_LOOKUPS = (torch.ops.aten.embedding.default, torch.ops.aten.embedding_bag.default, torch.ops.aten.embedding_bag.padding_idx)


def _count(opt) -> None:
    SEEN["models"] += 1
    if opt is None:
        SEEN["the plain model fails"] += 1
        return
    SEEN[f"captured by {opt.report.door}"] += 1
    fused, lookups = opt.report.coverage.get("lookups", (0, 0))
    SEEN["lookups"] += lookups
    SEEN["lookups fused"] += fused
    updated, found = opt.report.coverage.get("updates", (0, 0))
    SEEN["tables"] += found
    SEEN["tables updated by rows"] += updated
    left = [n for n in opt.graph_module.graph.nodes if n.target in _LOOKUPS and n.users]
    assert len(left) <= lookups - fused, f"{left} are in the graph, but the report says\n{opt.report}"


def _optimized_is_plain(rng: random.Random) -> None:
    """The plain loop with the user's own optimizer."""
    program = random_models.program(rng)
    loop = random_loops.loop(rng, program)
    note(f"{program.source}\n{program}\n{loop}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of sparse tensors and of dimensions of size one
            _count(random_loops.train_both(program, loop))
    except random_loops.BrokenProgram:
        hypothesis.reject()


def _plan_is_reference(rng: random.Random) -> None:
    """The plan's own optimizers, in the backward or not, against the formulas in plain torch."""
    program = random_models.program(rng, plain_tables=True)
    plan = random_plans.plan(rng, program)
    note(f"{program.source}\n{program}\n{plan}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _count(random_plans.train_both(program, plan))


def _examples(check: Callable[[random.Random], None], count: int, seed: int | None = None) -> Callable[[], None]:
    """A test of ``count`` models: always the same ones, or those of ``seed``, which are not shrunk."""
    test = given(st.randoms(use_true_random=False) if seed is None else st.builds(random.Random, st.integers(0, 1 << 40)))(check)
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    return settings(
        max_examples=count, derandomize=seed is None, deadline=None, database=None,
        phases=[Phase.generate, Phase.shrink] if seed is None else [Phase.generate],
        suppress_health_check=list(HealthCheck), print_blob=False,
    )(test)  # fmt: skip


def _run(check: Callable[[random.Random], None], count: int, seed: int | None = None) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are small
    try:
        with torch.random.fork_rng():
            _examples(check, count, seed)()
    finally:
        torch.set_num_threads(threads)


def test_optimized_equals_plain():
    _run(_optimized_is_plain, 80)


def test_planned_updates_equal_their_formulas():
    _run(_plan_is_reference, 40)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for each in (_optimized_is_plain, _plan_is_reference):
        SEEN.clear()
        _run(each, options.examples, options.seed)
        print(each.__doc__, ", ".join(f"{n} {what}" for what, n in sorted(SEEN.items())))
