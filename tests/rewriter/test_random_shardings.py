"""Random plans over real processes: every table sharded in its own way, on its own ranks, trained beside the plain model.

A few here; more by hand: ``python tests/rewriter/test_random_shardings.py --examples 300 --seed 1`` (about a second each).
"""
from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

from ranks import Pools
from sharding_cases import BATCHES, MODES, OPTIMIZERS, SHARDINGS, Case, agree, train
from sharding_models import TABLES


def _ranks(rng: random.Random, sharding: str, world: int) -> list[int] | None:
    """Ranks that go with a sharding, in any order; ``None``: wherever there is room. Of four ranks two are a node."""
    if sharding == "data_parallel" or rng.randrange(3) == 0:
        return None
    if sharding == "table_wise":
        return [rng.randrange(world)]
    if sharding in ("row_wise", "column_wise"):
        return rng.sample(range(world), rng.randint(1, world))
    nodes = [[0, 1], [2, 3]] if world == 4 else [list(range(world))]
    each = rng.randint(1, len(nodes[0]))
    chosen = rng.sample(nodes, 1 if sharding == "table_row_wise" else rng.randint(1, len(nodes)))
    return [rank for node in chosen for rank in rng.sample(node, each)]


def _case(rng: random.Random) -> Case:
    world = rng.choice((1, 2, 2, 3, 3, 4, 4))
    tables = {}
    for name in TABLES:
        sharding = rng.choice(SHARDINGS)
        entry = {"sharding": sharding, "exchange": rng.choice(("pooled", "unique", "auto")), "ranks": _ranks(rng, sharding, world)}
        if sharding in ("row_wise", "table_row_wise"):
            entry["split"] = rng.choice((None, "sample"))
        if sharding in ("table_row_wise", "grid_shard") and rng.randrange(3) == 0:
            entry["reduce_in_node"] = False
        if sharding == "row_wise" and world == 4 and entry["ranks"] is None and entry["exchange"] != "unique":
            entry["reduce_in_node"] = rng.choice((None, True))
        tables[f"{name}.weight"] = {key: value for key, value in entry.items() if value is not None}
    if all(entry["sharding"] == "data_parallel" for entry in tables.values()):
        tables["user.weight"] = {"sharding": "row_wise"}
    return Case(
        "random", "random", rng.choice(OPTIMIZERS), rng.choice(MODES), rng.choice(BATCHES), world, seed=rng.randrange(1 << 16),
        tables=json.dumps(tables),
    )  # fmt: skip


def _run(count: int, seed: int | None = None) -> int:
    pools, seen = Pools(), []

    def check(rng: random.Random) -> None:
        case = _case(rng)
        note(f"{case} {case.tables}")
        agree(pools(case.world).run(train, case))
        seen.append(case.world)

    test = given(st.randoms(use_true_random=False) if seed is None else st.builds(random.Random, st.integers(0, 1 << 40)))(check)
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    test = settings(
        max_examples=count, derandomize=seed is None, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), print_blob=False,
    )(test)  # fmt: skip
    try:
        test()
    finally:
        pools.close()
    return len(seen)


def test_random_plans_train_as_the_plain_model():
    assert _run(12) == 12


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(f"{_run(options.examples, options.seed)} random plans trained as the plain model")
