"""One sharded training run on every rank against the plain model: outputs, all weights, optimizer state."""
from __future__ import annotations

import copy
import functools
import itertools
import json
from dataclasses import dataclass

import tablewright as tw
import torch
from sharding_models import TABLES, Alike, Everything, ReferenceUpdates, batch_of, loss_of, touched
from tablewright.kernels.collectives import work
from tablewright.kernels.collectives.exchange_ids import EXCHANGE
from tablewright.kernels.collectives.spec import decode
from tablewright.kernels.collectives.work import group_of
from tablewright.passes.graph import arguments, packet_name
from tablewright.passes.shard_tables import exchanges
from torch import Tensor

STEPS = 5
SHARDINGS = ("data_parallel", "table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard")
OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")
MODES = ("step", "in_backward", "torch")
BATCHES = ("even", "uneven", "empty")


@dataclass(frozen=True)
class Case:
    sharding: str
    exchange: str
    optimizer: str
    mode: str
    batches: str
    world: int
    dtype: str = "float64"
    seed: int = 0
    tables: str = ""  # JSON: what the plan says of each table; else ``sharding`` and ``exchange`` for all
    reduced: bool | None = None  # the plan's ``reduce_in_node``

    def __str__(self) -> str:
        said = "" if self.reduced is None else f"reduced={self.reduced}"
        return "-".join(str(v) for v in (self.sharding, self.exchange, self.optimizer, self.mode, self.batches, self.world, said) if v != "")


def rows_per_rank(case: Case, step: int) -> list[int]:
    if case.batches == "even":
        return [6] * case.world
    if case.batches == "uneven":
        return [3 + (rank + step) % 4 for rank in range(case.world)]
    return [0 if rank == step % case.world and case.world > 1 else 5 for rank in range(case.world)]


def plan_of(case: Case, **more) -> dict:
    if case.reduced is not None:
        more["reduce_in_node"] = case.reduced
    tables = json.loads(case.tables) if case.tables else {"*": {"sharding": case.sharding, "exchange": case.exchange, **more}}
    plan = {"version": 1, "tables": tables}
    if case.mode != "torch":
        options = {"lr": 0.1, "weight_decay": 0.01, "in_backward": case.mode == "in_backward"}
        if case.optimizer != "sgd":
            options["eps"] = 1e-6
        plan["embedding_optimizer"] = {case.optimizer: options}
    elif case.optimizer == "adam":
        plan["numerics"] = "approximate"
    return plan


def torch_optimizer(kind: str, model):
    params = list(model.parameters())
    if kind == "sgd":
        return torch.optim.SGD(params, lr=0.1)
    if kind == "adagrad":
        return torch.optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.2)
    if kind == "rowwise_adagrad":  # torch has none: one that keeps dense gradients instead
        return torch.optim.SGD(params, lr=0.05, momentum=0.9)
    return torch.optim.RMSprop(params, lr=0.01)


def train(rank: int, world: int, mesh, case: Case) -> dict:
    """Train both for a few steps. Raises AssertionError at the first difference; returns what was seen."""
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(case.seed)
    plain = Everything(dtype)
    reference = copy.deepcopy(plain)
    if rank:
        with torch.no_grad():  # weights start as rank 0 has them
            for p in plain.parameters():
                p.normal_()
    untouched = {n: p.detach().clone() for n, p in plain.named_parameters() if n.split(".")[0] in TABLES} if rank == 0 else {}
    given = torch_optimizer(case.optimizer, plain) if case.mode == "torch" else None
    sample = batch_of(6, seed=99, dtype=dtype)
    result = tw.optimize(plain, plan_of(case), optimizer=given, sample_inputs=sample, mesh=mesh_of(case, mesh))
    model, optimizer = result if given is not None else (result, None)
    mine = torch.optim.SGD(model.dense_parameters(), lr=0.1) if given is None else None
    if given is None:
        dense = [p for n, p in reference.named_parameters() if n.split(".")[0] not in TABLES]
        theirs, updates = torch.optim.SGD(dense, lr=0.1), ReferenceUpdates(case.optimizer, 0.1, 1e-6, weight_decay=0.01)
    else:
        theirs, updates = torch_optimizer(case.optimizer, reference), None
    close = dict(rtol=1e-9, atol=1e-11) if case.dtype == "float64" else dict(rtol=2e-4, atol=2e-5)
    for step in range(STEPS):
        batches = [batch_of(rows, seed=1000 * case.seed + 50 * step + r, dtype=dtype) for r, rows in enumerate(rows_per_rank(case, step))]
        out = model(*batches[rank])
        loss_of(out).backward()
        outs = [reference(*b) for b in batches]
        (sum(loss_of(o) for o in outs) / world).backward()
        torch.testing.assert_close(out, outs[rank], **close, msg=lambda t, s=step: f"outputs of step {s}: {t}")
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        else:
            if case.mode == "step":
                model.embedding_optimizer.step()
                model.embedding_optimizer.zero_grad()
            mine.step()
            mine.zero_grad()
        if updates is not None:
            updates.step(reference, touched(batches))
        theirs.step()
        reference.zero_grad()
    compare_weights(model, reference, close)
    compare_state(model, optimizer, reference, theirs, updates, close)
    for name, value in untouched.items():
        if model._sharded.layouts[name].replicated is False:
            assert torch.equal(plain.get_parameter(name), value), f"the user's own {name} changed"
    collectives = []
    for node in exchanges(model.graph_module.graph):
        group = arguments(node)["group"]
        collectives.append((packet_name(node), tuple(torch.distributed.get_process_group_ranks(group_of(group)))))
    return {"plan": model._sharded.digest, "collectives": collectives}


def train_and_copy(rank: int, world: int, mesh, case: Case) -> dict:
    """:func:`train`, where each rank copies even the smallest part that it sends itself."""
    usual, work.OWN_LEAST = work.OWN_LEAST, 1
    try:
        return train(rank, world, mesh, case)
    finally:
        work.OWN_LEAST = usual


def train_alike(rank: int, world: int, mesh, sharding: str) -> None:
    """Lookups that share their offsets: what a rank answers another travels bag by bag. Raises AssertionError where it does not, or at a difference."""
    torch.manual_seed(0)
    plain = Alike()
    reference = copy.deepcopy(plain)
    given, theirs = (torch.optim.Adagrad(m.parameters(), lr=0.1) for m in (plain, reference))
    plan = {"version": 1, "tables": {"*": {"sharding": sharding}}}
    model, optimizer = tw.optimize(plain, plan, optimizer=given, sample_inputs=Alike.batch(4, seed=9), mesh=mesh)
    start = next(n for n in model.graph_module.graph.nodes if n.target is EXCHANGE)
    assert decode(arguments(start)["spec"]).beside
    for step in range(STEPS):
        batches = [Alike.batch((step + 2 * r) % 5, seed=10 * step + r) for r in range(world)]
        out, outs = model(*batches[rank]), [reference(*b) for b in batches]
        torch.testing.assert_close(out, outs[rank], rtol=1e-9, atol=1e-11)
        loss_of(out).backward()
        (sum(loss_of(o) for o in outs) / world).backward()
        for each in (optimizer, theirs):
            each.step()
            each.zero_grad()
    compare_weights(model, reference, dict(rtol=1e-9, atol=1e-11))


def agree(found: list[dict]) -> None:
    """Raises AssertionError where ranks have other plans, or other collectives among those that both take part in, or too many."""
    for r, s in itertools.combinations(range(len(found)), 2):
        mine, theirs = ([c for c in found[i]["collectives"] if r in c[1] and s in c[1]] for i in (r, s))
        assert mine == theirs, f"ranks {r} and {s} differ in the order of collectives: {mine}, {theirs}"
        assert found[r]["plan"] == found[s]["plan"]
    for each in found:  # rows and ids; an exchange for each of two launches at most; the same across nodes and inside them
        of_all = [c for c in each["collectives"] if len(c[1]) == len(found)]
        assert len(of_all) <= 4 and len(each["collectives"]) <= (12 if len(found) == 4 else 4), each["collectives"]


def mesh_of(case: Case, mesh):
    """Two nodes of half the ranks, where there are four."""
    several = case.tables or case.sharding in ("table_row_wise", "grid_shard") or case.reduced is not None
    return nodes() if case.world == 4 and several else mesh


@functools.cache
def nodes():
    """Two nodes of two ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2))


def block_of(model, name: str, whole: Tensor) -> Tensor:
    """The part of ``whole`` that this rank holds."""
    layout = model._sharded.layouts[name]
    if layout.replicated:
        return whole
    s = model._sharded.mine(layout)
    rows = whole[s.row : s.row + s.rows]
    return rows[:, s.column : s.column + s.columns] if whole.dim() == 2 else rows


def compare_weights(model, reference, close: dict) -> None:
    mine, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert list(mine) == list(theirs)
    for name, whole in theirs.items():
        wanted = block_of(model, name, whole) if name in model._sharded.layouts else whole
        torch.testing.assert_close(mine[name].detach(), wanted.detach(), **close, msg=lambda t, n=name: f"{n}: {t}")


def compare_state(model, optimizer, reference, theirs, updates, close: dict) -> None:
    for name in TABLES:
        param, whole = model.get_parameter(f"{name}.weight"), reference.get_parameter(f"{name}.weight")
        wanted = updates.state.get(name, {}) if updates is not None else theirs.state[whole]
        held = (optimizer or model.embedding_optimizer).state.get(param, {})
        if param.numel():
            assert set(wanted) - {"step"} <= set(held), f"{name}: state {list(held)}, expected {list(wanted)}"
        for key, value in wanted.items():
            if isinstance(value, Tensor) and value.dim() and key in held:
                given = block_of(model, f"{name}.weight", value)
                torch.testing.assert_close(held[key].to(given.dtype), given, **close, msg=lambda t, n=name, k=key: f"{n}.{k}: {t}")


def pairs(axes: dict[str, tuple]) -> list[dict]:
    """Combinations in which every two values of any two axes meet (greedy all-pairs)."""
    import random

    names, rng = list(axes), random.Random(1)
    missing = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]}

    def covered(chosen: dict) -> set:
        return {(a, chosen[a], b, chosen[b]) for a, b in itertools.combinations(names, 2)} & missing

    found = []
    while missing:
        a, x, b, y = min(missing, key=str)
        tries = [{**{n: rng.choice(axes[n]) for n in names}, a: x, b: y} for _ in range(40)]
        best = max(tries, key=lambda c: len(covered(c)))
        missing -= covered(best)
        found.append(best)
    return found


NODE_AXES = {
    "sharding": ("table_row_wise", "grid_shard", "row_wise"), "reduced": (True,), "optimizer": OPTIMIZERS, "mode": MODES, "batches": BATCHES,
}  # fmt: skip
AXES = {
    "sharding": SHARDINGS, "exchange": ("pooled", "unique"), "optimizer": OPTIMIZERS, "mode": MODES, "batches": BATCHES,
    "world": (1, 2, 3, 4),
}  # fmt: skip
