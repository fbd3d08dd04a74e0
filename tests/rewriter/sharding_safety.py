"""What ranks do in the tests of checkpoints and of ranks that fail; run on every rank."""
from __future__ import annotations

import contextlib
import copy
import os
import resource
import signal
import time

import pytest
import tablewright as tw
import torch
import torch.distributed.checkpoint as dcp
from sharding_cases import Case, block_of, compare_state, compare_weights, mesh_of, plan_of
from sharding_models import TABLES, Everything, ReferenceUpdates, batch_of, loss_of, touched
from torch import nn

CLOSE = dict(rtol=1e-9, atol=1e-11)


def case_of(world: int, sharding: str = "row_wise", mode: str = "step", optimizer: str = "rowwise_adagrad") -> Case:
    return Case(sharding, "pooled", optimizer, mode, "even", world)


def start(rank: int, mesh, case: Case, seed: int = 0):
    torch.manual_seed(seed)
    plain = Everything()
    reference = copy.deepcopy(plain)
    given = torch.optim.Adam(plain.parameters(), lr=0.01) if case.mode == "torch" else None
    found = tw.optimize(plain, plan_of(case), optimizer=given, sample_inputs=batch_of(6, seed=99), mesh=mesh_of(case, mesh))
    model, optimizer = found if given is not None else (found, torch.optim.Adam(found.dense_parameters(), lr=0.01))
    return model, optimizer, reference


def run(rank: int, world: int, model, optimizer, steps: range) -> None:
    for step in steps:
        loss_of(model(*batch_of(6, seed=50 * step + rank))).backward()
        if model.embedding_optimizer is not None:
            model.embedding_optimizer.step()
            model.embedding_optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()


def plain_run(reference, worlds: list[tuple[range, int]], case: Case):
    """The plain model over the same steps; ``worlds``: how many ranks feed which steps."""
    dense = [p for n, p in reference.named_parameters() if n.split(".")[0] not in TABLES]
    theirs = torch.optim.Adam(reference.parameters() if case.mode == "torch" else dense, lr=0.01)
    updates = None if case.mode == "torch" else ReferenceUpdates(case.optimizer, 0.1, 1e-6, weight_decay=0.01)
    for steps, world in worlds:
        for step in steps:
            batches = [batch_of(6, seed=50 * step + r) for r in range(world)]
            (sum(loss_of(reference(*b)) for b in batches) / world).backward()
            if updates is not None:
                updates.step(reference, touched(batches))
            theirs.step()
            reference.zero_grad()
    return theirs, updates


def save(rank: int, world: int, mesh, case: Case, path: str, asynchronous: bool = False) -> None:
    model, optimizer, _ = start(rank, mesh, case)
    run(rank, world, model, optimizer, range(3))
    state = tw.training_state(model, optimizer)
    if asynchronous:
        pending = dcp.async_save(state, checkpoint_id=path)
        run(rank, world, model, optimizer, range(3, 4))  # training goes on: what is saved is what was
        pending.result()
    else:
        dcp.save(state, checkpoint_id=path)


def load(rank: int, world: int, mesh, case: Case, path: str, saved_by: int) -> None:
    """Load what ``saved_by`` ranks saved after three steps, train two more, and compare with the plain model that never stopped."""
    model, optimizer, reference = start(rank, mesh, case)
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.5)  # whatever was there before
    state = tw.training_state(model, optimizer)
    dcp.load(state, checkpoint_id=path)
    tw.load_training_state(model, optimizer, state)
    run(rank, world, model, optimizer, range(3, 5))
    theirs, updates = plain_run(reference, [(range(3), saved_by), (range(3, 5), world)], case)
    compare_weights(model, reference, CLOSE)
    compare_state(model, optimizer if case.mode == "torch" else None, reference, theirs, updates, CLOSE)


def load_plain(path: str, saved_by: int, case: Case) -> None:
    """The same checkpoint into the plain model, in one process without a process group."""
    torch.manual_seed(0)
    reference = Everything()
    plain = Everything()
    state = {"model": plain.state_dict()}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    plain.load_state_dict(state["model"])
    plain_run(reference, [(range(3), saved_by)], case)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], value, **CLOSE)


def states(rank: int, world: int, mesh, sharding: str) -> None:
    """state_dict() speaks of whole tables, takes whole tables, and gathers only when asked."""
    model, _, reference = start(rank, mesh, case_of(world, sharding))
    plain = reference.state_dict()
    held = model.state_dict()
    assert list(held) == list(plain)
    assert all(held[n].shape == plain[n].shape for n in plain)
    for name in TABLES:
        value = held[f"{name}.weight"]
        if isinstance(value, tw.ShardedTable):
            assert value.local.data_ptr() == model.get_parameter(f"{name}.weight").data_ptr()
    whole = model.whole_state_dict()
    assert all(torch.equal(whole[n], plain[n]) for n in plain)
    some = model.whole_state_dict(rank=world - 1)
    assert (some is None) == (rank != world - 1)
    other = {n: v + 1 for n, v in plain.items()}
    model.load_state_dict(other)
    assert all(torch.equal(v, other[n]) for n, v in model.whole_state_dict().items())
    again = model.state_dict()
    model.load_state_dict(again)  # its own blocks
    unoptimized = model.unoptimized()
    assert type(unoptimized) is Everything and all(torch.equal(v, other[n]) for n, v in unoptimized.state_dict().items())


def wrong_ids(rank: int, world: int, mesh) -> str:
    """One rank has an id that its table does not: all stop."""
    model, _, _ = start(rank, mesh, case_of(world, "table_wise"))
    batch = list(batch_of(6, seed=rank))
    if rank == world - 1:
        batch[1] = batch[1].clone().fill_(23)
    try:
        model(*batch)
    except (IndexError, tw.PeerError) as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "nothing"
    model(*batch_of(6, seed=rank))  # and go on together
    return said


def clipped(rank: int, world: int, mesh, case: Case, norm_type: float) -> str:
    """Gradients clipped by their norm equal the plain model's; what torch's own function says instead."""
    model, _, reference = start(rank, mesh, case)
    batches = [batch_of(6, seed=r) for r in range(world)]
    loss_of(model(*batches[rank])).backward()
    (sum(loss_of(reference(*b)) for b in batches) / world).backward()
    said = "nothing"
    try:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05, norm_type)
    except (tw.PlanError, NotImplementedError) as error:
        said = str(error)
    with pytest.raises(tw.PlanError, match="'0' is spread over ranks, and clip_grad_norm_ was called on a module around it"):
        tw.clip_grad_norm_(torch.nn.Sequential(model), 0.05, norm_type)
    norm = tw.clip_grad_norm_(model, 0.05, norm_type)
    wanted = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05, norm_type)
    torch.testing.assert_close(norm, wanted, rtol=1e-9, atol=0)
    assert wanted > 0.05
    for name, param in reference.named_parameters():
        mine = model.get_parameter(name)
        grad = torch.zeros_like(mine) if mine.grad is None else mine.grad.to_dense().as_subclass(torch.Tensor)
        whole = block_of(model, name, param.grad) if name.split(".")[0] in TABLES else param.grad
        torch.testing.assert_close(grad, whole, **CLOSE, msg=lambda t, n=name: f"{n}: {t}")
    return said


def normalised(rank: int, world: int, mesh) -> list[str]:
    """A batch norm sees its rank's batch alone, and the report says so."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Embedding(9, 4, dtype=torch.float64), torch.nn.BatchNorm1d(4, dtype=torch.float64))
    reference = copy.deepcopy(plain)
    ids = torch.arange(5) + rank
    model = tw.optimize(plain, {"version": 1, "tables": {"*": {"sharding": "row_wise"}}}, sample_inputs=(torch.arange(6),), mesh=mesh)
    torch.testing.assert_close(model(ids), reference(ids), **CLOSE)
    torch.testing.assert_close(dict(model.named_buffers())["1.running_mean"], reference[1].running_mean, **CLOSE)
    return [r.reason for r in model.report.records if r.kind == "batch norms over ranks"]


def refused(rank: int, world: int, mesh) -> list[float]:
    """A backward whose update is refused, then a good one: a number of the averaged dense gradients."""
    model, _, _ = start(rank, mesh, case_of(world, "row_wise", "in_backward"))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    try:
        scaler.scale(loss_of(model(*batch_of(6, seed=rank)))).backward()
    except tw.InBackwardError:
        del scaler
    model.zero_grad()
    loss_of(model(*batch_of(6, seed=10 + rank))).backward()
    return [float(p.grad.sum()) for p in model.dense_parameters()]


def failed(rank: int, world: int, mesh) -> list[float]:
    """A backward that ends half-way in an error, then a good one: a number of the averaged dense gradients."""
    model, _, _ = start(rank, mesh, case_of(world, "row_wise"))
    first = next(model.dense_parameters())

    def fail(grad):
        raise RuntimeError("half-way")

    hook = first.register_hook(fail)
    with contextlib.suppress(RuntimeError):
        loss_of(model(*batch_of(6, seed=rank))).backward()
    hook.remove()
    model.zero_grad()
    loss_of(model(*batch_of(6, seed=10 + rank))).backward()
    return [float(p.grad.sum()) for p in model.dense_parameters()]


def kept_gradients(rank: int, world: int, mesh) -> list[bool]:
    """Weights large enough that products write their gradients where they travel from: are they the averages of all ranks' own, over two
    backwards, and does what others were given stay as it was?"""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1))
    table = nn.EmbeddingBag(50, 64, mode="sum")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.dense = table, plain

        def forward(self, ids):
            return self.dense(self.table(ids))

    model = Model()
    batches = [torch.randint(0, 50, (512, 3), generator=torch.Generator().manual_seed(r)) for r in range(world)]
    wanted = [torch.autograd.grad(model(ids).square().mean(), list(plain.parameters())) for ids in batches]
    mean = [sum(grads) / world for grads in zip(*wanted)]
    opt, _ = tw.optimize(model, {"version": 1, "tables": {"*": {"sharding": "table_wise"}}}, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), sample_inputs=(batches[0],), mesh=mesh)
    weight, seen = opt.dense[0].weight, []
    found = []
    for watched in (False, True):
        hook = weight.register_hook(seen.append) if watched else None
        own = torch.autograd.grad(opt(batches[rank]).square().mean(), [weight])[0]
        for times in (1, 2):  # the second adds to the first
            opt(batches[rank]).square().mean().backward()
            found += [torch.allclose(p.grad, times * m, rtol=1e-4, atol=1e-6) for p, m in zip(opt.dense.parameters(), mean)]
        found += [torch.allclose(own, wanted[rank][0], rtol=1e-4, atol=1e-6)]
        found += [torch.allclose(grad, wanted[rank][0], rtol=1e-4, atol=1e-6) for grad in seen]
        for p in opt.parameters():
            p.grad = None
        if hook is not None:
            hook.remove()
    return found


def of_one_table(rank: int, world: int, mesh, case: Case) -> list[str]:
    """Gradients that are asked for of one table at a time, wherever its rows are: are they the plain model's? What is said of updates in the
    backward, which have none; and is a backward of all tables by name then a backward as ever?"""
    model, _, reference = start(rank, mesh, case)
    batches = [batch_of(6, seed=r) for r in range(world)]
    (sum(loss_of(reference(*b)) for b in batches) / world).backward()
    said = []
    for name in [f"{table}.weight" for table in TABLES]:
        table = model.get_parameter(name)
        for ask in (lambda loss, t=table: torch.autograd.grad(loss, [t], allow_unused=True)[0], lambda loss, t=table: loss.backward(inputs=[t])):
            before = table.detach().clone()
            try:
                found = ask(loss_of(model(*batches[rank])))
            except tw.InBackwardError as error:
                said.append(str(error))
            else:
                found = table.grad if found is None else found
                wanted = block_of(model, name, reference.get_parameter(name).grad)
                torch.testing.assert_close(found.to_dense().as_subclass(torch.Tensor), wanted, **CLOSE)
            assert torch.equal(before, table)
            table.grad = None
    loss_of(model(*batches[rank])).backward(inputs=list(model.parameters()))
    if case.mode == "in_backward":
        for name in TABLES:
            whole, table = reference.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.weight")
            moved = block_of(model, f"{name}.weight", whole.grad).ne(0).any(1)
            assert torch.equal(block_of(model, f"{name}.weight", whole).ne(table).any(1), moved), name
    return said


def watched_gradients(rank: int, world: int, mesh) -> list[bool]:
    """A hook on each weight, large or small: is what it gets this rank's own, does that stay so where it keeps it, and does what it changes count?"""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.EmbeddingBag(50, 64, mode="sum"), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1))
    batches = [torch.randint(0, 50, (512, 3), generator=torch.Generator().manual_seed(r)) for r in range(world)]
    dense = list(plain[1:].parameters())
    own = [torch.autograd.grad(plain(ids).square().mean(), dense) for ids in batches]
    mean = [sum(grads) / world for grads in zip(*own)]
    opt, _ = tw.optimize(plain, {"version": 1, "tables": {"*": {"sharding": "table_wise"}}}, optimizer=torch.optim.SGD(plain.parameters(), lr=0.1), sample_inputs=(batches[0],), mesh=mesh)
    dense, found = [p for n, p in opt.named_parameters() if n != "0.weight"], []
    for factor in (1, 2):
        seen: dict[int, tuple] = {}

        def watch(param, seen=seen, factor=factor):
            seen[id(param)] = param.grad.clone(), param.grad
            if factor > 1:
                param.grad = param.grad * factor

        hooks = [p.register_post_accumulate_grad_hook(watch) for p in dense]
        opt(batches[rank]).square().mean().backward()
        for p, mine, both in zip(dense, own[rank], mean):
            found += [torch.allclose(got, mine, rtol=1e-4, atol=1e-6) for got in seen[id(p)]]
            found.append(torch.allclose(p.grad, factor * both, rtol=1e-4, atol=1e-6))
            p.grad = None
        for hook in hooks:
            hook.remove()
    return found


class Parts(nn.Module):
    """Bags and rows of a frozen table and of a trained one, each as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed, self.trained = nn.Embedding(9, 4, dtype=torch.float64), nn.Embedding(7, 4, dtype=torch.float64)
        self.fixed.requires_grad_(False)

    def forward(self, ids):
        return self.fixed(ids), self.trained(ids), self.fixed(ids).sum(1), self.trained(ids).sum(1)


def frozen(rank: int, world: int, mesh, exchange: str) -> list[bool]:
    """Which results need a gradient; that of the trained table is the plain one's."""
    torch.manual_seed(0)
    plain = Parts()
    reference, ids = copy.deepcopy(plain), torch.tensor([[1, 2], [3, 1]])
    tables = {"fixed": {"sharding": "row_wise", "exchange": exchange}, "trained": {"sharding": "table_wise", "ranks": [0], "exchange": exchange}}
    model = tw.optimize(plain, {"version": 1, "tables": tables}, sample_inputs=(ids,), mesh=mesh)
    outs, theirs = model(ids), reference(ids)
    for found in (outs, theirs):
        sum((o * o).sum() for o in found).backward()
    wanted = block_of(model, "trained.weight", reference.trained.weight.grad)
    torch.testing.assert_close(model.trained.weight.grad.to_dense().as_subclass(torch.Tensor), wanted, **CLOSE)
    assert model.fixed.weight.grad is None
    assert [o.requires_grad for o in theirs] == [False, True, False, True]
    return [o.requires_grad for o in outs]


def groups_taken(rank: int, world: int, mesh) -> int:
    """How many process groups the second and third model make."""
    start(rank, mesh, case_of(world))
    before = len(torch.distributed.distributed_c10d._world.pg_map)
    for _ in range(2):
        start(rank, mesh, case_of(world))
    return len(torch.distributed.distributed_c10d._world.pg_map) - before


def other_plans(rank: int, world: int, mesh) -> str:
    try:
        start(rank, mesh, case_of(world, "row_wise" if rank else "table_wise"))
    except tw.PlanError as error:
        return str(error)
    return "nothing"


def epochs(rank: int, world: int, mesh) -> int:
    """Ranks with 3, 4, .. batches all make 3 steps."""
    model, optimizer, _ = start(rank, mesh, case_of(world))
    steps = 0
    for batch in tw.even_batches([batch_of(4, seed=s) for s in range(3 + rank)], mesh):
        loss_of(model(*batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


def killed(rank: int, world: int, mesh, path: str, how: str) -> tuple[str, float]:
    """The last rank dies (or hangs, or stops early) after the checkpoint of step 3."""
    case = case_of(world)
    model, optimizer, _ = start(rank, mesh, case)
    run(rank, world, model, optimizer, range(3))
    dcp.save(tw.training_state(model, optimizer), checkpoint_id=path)
    if rank == world - 1:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    begun = time.monotonic()
    try:
        run(rank, world, model, optimizer, range(3, 6))
    except tw.PeerError as error:
        return str(error), time.monotonic() - begun
    return "nothing", time.monotonic() - begun


class Big(torch.nn.Module):
    """A table of 384 MB and a small one."""

    ROWS = 6_000_000

    def __init__(self) -> None:
        super().__init__()
        self.huge = torch.nn.EmbeddingBag(self.ROWS, 16, mode="sum")
        self.user = torch.nn.Embedding(50, 8, padding_idx=1)
        self.over = torch.nn.Linear(24, 1)

    def forward(self, bags, user):
        return self.over(torch.cat([self.huge(bags), self.user(user)], 1))


def from_meta(rank: int, world: int, mesh) -> dict:
    """A model on the meta device, made in blocks and trained; how much memory that took at the most, in bytes."""
    with torch.device("meta"):
        plain = Big()
    rule = {"rowwise_adagrad": {"lr": 0.1}}
    tables = {"huge": {"sharding": "row_wise", "embedding_optimizer": rule}, "user": {"sharding": "table_wise", "ranks": [0]}}
    others = [*plain.user.parameters(), *plain.over.parameters()]
    optimizer = torch.optim.Adagrad(others, lr=0.1, initial_accumulator_value=0.5)
    sample = torch.randint(0, Big.ROWS, (4, 3)), torch.tensor([1, 2, 3, 4])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model, optimizer = tw.optimize(plain, {"version": 1, "tables": tables}, optimizer=optimizer, sample_inputs=sample, mesh=mesh)
    held = model.get_parameter("huge.weight").detach()
    found = {"held": list(held.shape), "mean": float(held.mean()), "deviation": float(held[:10000].std())}
    for _ in range(2):
        model(*sample).pow(2).mean().backward()
        model.embedding_optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.is_meta for p in plain.parameters())
    if rank == 0:
        found["padding"] = float(model.get_parameter("user.weight").detach()[1].abs().max())
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {**found, "over": model.get_parameter("over.weight").sum().item(), "peak": peak}
