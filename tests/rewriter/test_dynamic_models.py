"""Models whose ids are any numbers: the same training as with ids numbered one after another, checkpoints, snapshots, captures, refusals."""
from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import tablewright as tw
import torch
from dynamic_training import PADDING, VOCABULARY, Model, batch, made, plan, train
from tablewright.kernels import dynamic_ids, tiers
from tablewright.kernels.dynamic_ids import IdMapError
from tablewright.kernels.tiers import Part, TierError
from tablewright.rewriter.errors import PlanError
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.skipif(bool(dynamic_ids.available() or tiers.available()), reason=f"NOT TESTED: {dynamic_ids.available() or tiers.available()}")
def renumbered(step):
    """The same batch with ids from 0 on; the padding id stays."""
    query, words, user, wanted = batch(step)
    numbers = _numbers()
    return _as(query, numbers), _as(words, numbers), user, wanted


def _numbers():
    order = [i for i in VOCABULARY.tolist() if i != PADDING]
    order.insert(PADDING, PADDING)
    return {i: n for n, i in enumerate(order)}


def _as(ids, numbers):
    return torch.tensor([numbers[i] for i in ids.flatten().tolist()]).view(ids.shape)


def dense_twin():
    """The plain model with a row for each id, which starts as that id's row does."""
    torch.manual_seed(0)
    twin, given = Model(), Model(rows=300)
    given.load_state_dict({**twin.state_dict(), **{n: torch.zeros(300, 8) for n in ("query.weight", "asked.weight", "words.weight")}})
    rows = Part(8, "normal", 0.0, 0.5).rows(0, 9, torch.tensor(list(_numbers())))
    with torch.no_grad():
        given.words.weight.copy_(rows)
        rows[PADDING] = 0
        given.query.weight.copy_(rows)
    return given


def same_rows(opt, twin, states=()):
    """Rows (and what an optimizer keeps: pairs of export() and a tensor) of all ids that have one are those of the twin."""
    numbers, found = _numbers(), 0
    whole = dict(twin.named_parameters())
    for name, table in opt.dynamic_ids.items():
        ids, rows = table.export()
        assert torch.equal(rows, whole[name].detach()[_as(ids, numbers)]), name
        for part, held in enumerate(states, 1):
            value = held(name)
            assert torch.equal(table.export(part)[1], value.view(len(value), -1)[_as(ids, numbers)]), name
        found += len(ids)
    assert found > 500


USERS = {
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.2), ("sum",)),
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.01), ()),
}


@pytest.mark.parametrize("name", USERS)
def test_the_users_optimizer_trains_as_with_numbered_ids(name):
    optimizer, keys = USERS[name]
    opt, optim = made(optimizer=optimizer)
    twin = dense_twin()
    dense, dense_optim = tw.optimize(twin, tw.Plan(), optimizer=optimizer(twin.parameters()), sample_inputs=renumbered(0)[:3])
    for step in range(25):
        train(opt, optim, step, step + 1)
        train(dense, dense_optim, step, step + 1, renumbered)
        assert torch.equal(opt(*batch(step)[:3]), dense(*renumbered(step)[:3]))
        optim.step()  # lets go of the rows of that forward
    assert opt.report.coverage["dynamic ids"] == (2, 2)
    whole = dict(dense.named_parameters())
    same_rows(opt, dense, [lambda n, key=key: dense_optim.state[whole[n]][key] for key in keys])
    assert torch.equal(opt.top.weight, dense.top.weight) and torch.equal(opt.user.weight, dense.user.weight)


@pytest.mark.parametrize("inside", [True, False], ids=["in_backward", "step"])
@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
def test_the_plans_optimizer_trains_as_with_numbered_ids(kind, inside):
    chosen = {kind: {"lr": 0.1, "in_backward": inside}}
    torch.manual_seed(0)
    opt = tw.optimize(Model(), plan(chosen), sample_inputs=batch(0)[:3])
    dense = tw.optimize(dense_twin(), tw.Plan.from_dict({"version": 1, "embedding_optimizer": chosen}), sample_inputs=renumbered(0)[:3])
    for step in range(25):
        for each, at in ((opt, batch), (dense, renumbered)):
            train(each, None if inside else each.embedding_optimizer, step, step + 1, at)
    states = [lambda n: dense.embedding_optimizer.state[dict(dense.named_parameters())[n]]["sum"]] if kind != "sgd" else []
    same_rows(opt, dense, states)
    opt.eval(), dense.eval()
    with torch.no_grad():
        assert torch.equal(opt(*batch(3)[:3]), dense(*renumbered(3)[:3]))


def test_what_is_not_admitted_reads_the_default_trains_nothing_and_is_counted():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Embedding(4, 2)

        def forward(self, ids):
            return self.query(ids)

    model = One()
    the_plan = tw.Plan.from_dict({"version": 1, "tables": {"query": {"ids": {"dynamic": True, "capacity": 10, "admit_after": 3, "default": 0.5}}}})
    opt, optim = tw.optimize(model, the_plan, optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1), sample_inputs=(torch.tensor([2**60, -8]),))
    ids = torch.tensor([2**60, -8, 2**60])
    for expected in (3, 1, 0):
        out = opt(ids)
        assert int((out == 0.5).all(1).sum()) == expected
        out.sum().backward()
        optim.step()
        optim.zero_grad()
    before = opt.state_dict()
    opt.eval()
    assert int((opt(torch.tensor([2**60, 77, -77])) == 0.5).all(1).sum()) == 2
    assert all(torch.equal(before[k], v) for k, v in opt.state_dict().items())
    said = "2 ids have a row (at most 10, admitted after 3, lru); 4 of 9 ids looked up in training and 2 of 3 in evaluation read the default (0.5)"
    assert said in str(opt.report)


def test_state_dicts_restore_an_interrupted_run(tmp_path):
    """Few rows, so that ids leave; later evictions and admissions are those of the run that went on."""
    the_plan = plan(capacity=170, admit_after=3, evict="lfu")
    straight, optim = made(the_plan)
    train(straight, optim, 0, 15)
    torch.save([straight.state_dict(), optim.state_dict()], tmp_path / "kept.pt")
    straight.snapshot(tmp_path / "snapshot", optim)
    train(straight, optim, 15, 30)
    assert straight.dynamic_ids["query.weight"].counters().evicted and straight.dynamic_ids["query.weight"].counters().waiting
    for loads in (True, False):
        again, other = made(the_plan)
        train(again, other, 40, 45)  # of which nothing stays
        if loads:
            model_state, optim_state = torch.load(tmp_path / "kept.pt")
            again.load_state_dict(model_state)
            other.load_state_dict(optim_state)
        else:
            again.restore(tmp_path / "snapshot", other)
        train(again, other, 15, 30)
        for (name, one), two in zip(straight.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(one, two), name
        for one, two in zip(optim.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
            assert one.keys() == two.keys() and all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(two[k])) for k in one)


def test_wrong_states_are_refused():
    opt, optim = made()
    train(opt, optim, 0, 3)
    earlier = optim.state_dict()
    train(opt, optim, 3, 6)
    with pytest.raises(RuntimeError, match="does not fit.*load the model's state_dict first"):
        optim.load_state_dict(earlier)
    with pytest.raises(RuntimeError, match=r"table 'query.weight' has dynamic ids.*opt.dynamic_ids\['query.weight'\].load"):
        opt.load_state_dict(Model().state_dict())
    state = opt.state_dict()
    with pytest.raises(RuntimeError, match="401 ids do not fit a capacity of 400"):
        opt.load_state_dict({**state, **{f"{n}.weight{k}": v for n in ("query", "asked") for k, v in (
            ("", torch.zeros(401, 8)), (".ids", torch.arange(401)), (".uses", torch.ones(401)))}})  # fmt: skip
    ids, rows = opt.dynamic_ids["words.weight"].export()
    opt.dynamic_ids["words.weight"].load(ids[:5], rows[:5])
    assert opt.state_dict()["words.weight.ids"].tolist() == ids[:5].tolist()


def test_a_table_takes_memory_as_it_grows_and_nothing_moves():
    code = """
import resource, torch, tablewright as tw
from torch import nn
model = nn.Sequential(nn.Embedding(1, 16))
plan = tw.Plan.from_dict({"version": 1, "huge_pages": False, "tables": {"0": {"ids": {"dynamic": True, "capacity": 50_000_000}}}})
opt, optim = tw.optimize(model, plan, optimizer=torch.optim.Adagrad(model.parameters()), sample_inputs=(torch.tensor([2**40, 3]),))
param = dict(opt.named_parameters())["0.weight"]
place, peak = param.data_ptr(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for step in range(5):
    opt(torch.arange(2000) * 2**40 + step).sum().backward()
    optim.step()
    optim.zero_grad()
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
assert dict(opt.named_parameters())["0.weight"] is param and param.data_ptr() == place and param in optim.state
print(opt.dynamic_ids["0.weight"].counters().rows, grown)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(tw.__file__).parent.parent, check=True).stdout.split()
    assert found[0] == "10000" and int(found[1]) < 300_000, found  # KiB; the capacity is 6.4 GB with its state


def test_any_ids_pass_every_door():
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Embedding(7, 4)

        def forward(self, ids):
            return self.query.weight[ids]

    model = Indexed()
    ids = torch.tensor([-1, 2**62, 5])
    the_plan = tw.Plan.from_dict({"version": 1, "tables": {"query": {"ids": {"dynamic": True, "capacity": 10}}}})
    opt, optim = tw.optimize(model, the_plan, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), sample_inputs=(ids,))
    opt(ids).sum().backward()
    optim.step()
    assert set(opt.dynamic_ids["query.weight"].export()[0].tolist()) == set(ids.tolist())
    assert torch.equal(opt.query.weight[:3], Part(4, "normal", 0, 1).rows(0, 0, ids) - 1)  # -1 is an id, not the last row

    class Exported(Model):
        def forward(self, query, words, user):
            return torch.special.i0e(super().forward(query, words, user))

    opt, optim = made(model=Exported())
    train(opt, optim, 0, 2)
    assert opt.report.door == "export" and opt.report.coverage["dynamic ids"] == (2, 2)

    class Branches(Model):
        def forward(self, query, words, user, scale=None):
            out = super().forward(query, words, user) * len(list(query.shape))
            return out if scale is None else out * scale

    opt, optim = made(model=Branches())
    twice = opt(*batch(1)[:3], torch.tensor(2.0))  # captured anew, with ids that have no row in the plain model
    assert torch.equal(twice, opt(*batch(1)[:3]) * 2)


def test_meta_tables_and_pipelines():
    torch.manual_seed(0)
    plain, model = Model(), Model(device="meta")
    model.user, model.top = plain.user, plain.top
    opt, optim = made(model=model)
    other, other_optim = made()
    loader = [batch(k) for k in range(6)]
    for step, (*inputs, wanted) in enumerate(tw.pipeline(loader, opt, inputs=lambda b: b[:3])):
        ((opt(*inputs) - wanted) ** 2).mean().backward()
        optim.step()
        optim.zero_grad()
        train(other, other_optim, step, step + 1)
    assert all(torch.equal(one, two) for one, two in zip(opt.state_dict().values(), other.state_dict().values(), strict=True))


def test_beside_a_table_in_tiers(tmp_path):
    ids = {"dynamic": True, "capacity": 400}
    tables = {"query": {"ids": ids}, "words": {"ids": ids}, "user": {"storage": {"cache": 30_000, "path": str(tmp_path / "user")}}}
    opt, optim = made(tw.Plan.from_dict({"version": 1, "tables": tables}))
    other, other_optim = made(tw.Plan.from_dict({"version": 1, "tables": {"query": {"ids": ids}, "words": {"ids": ids}}}))
    train(opt, optim, 0, 8)
    opt.snapshot(tmp_path / "kept", optim)
    train(other, other_optim, 0, 8)
    for (name, one), two in zip(opt.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert list(opt.tiers) == ["user.weight"] and list(opt.dynamic_ids) == ["query.weight", "words.weight"]


def test_refusals(tmp_path):
    opt, optim = made(plan(capacity=100))
    with pytest.raises(IdMapError, match="table '.*.weight': .* are to be admitted, and of 100 rows .* give `capacity` more rows"):
        for step in range(20):
            opt(*batch(step)[:3])
    for call in (lambda: copy.deepcopy(opt), lambda: torch.save(opt, tmp_path / "x"), lambda: opt.check(*batch(0)[:3]), opt.unoptimized):
        with pytest.raises(PlanError, match="the plan gives query.weight, words.weight dynamic ids: state_dict.. has the ids and rows"):
            call()

    def refused(words, the_plan, model=None, **more):
        model = Model() if model is None else model
        with pytest.raises(PlanError, match=words):
            tw.optimize(model, the_plan, sample_inputs=batch(0)[:3], **{"optimizer": torch.optim.Adagrad(model.parameters()), **more})

    refused("nobody updates it row by row: no optimizer was given", plan(), optimizer=None)
    refused("is to have dynamic ids, and is torch.float64", plan(), Model().double())
    refused("verify='numerics' runs copies", plan(), verify="numerics")

    class Whole(Model):
        def forward(self, *inputs):
            return super().forward(*inputs) + self.words.weight.sum()

    class Apart(Model):
        def forward(self, *inputs):
            return super().forward(*inputs) + nn.functional.embedding(inputs[0], self.query.weight).sum()

    refused("table 'words.weight' is to have dynamic ids, but .* reads it as a whole", plan(), Whole())
    refused("lookups have different padding_idx", plan(), Apart())


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ({"dynamic": True}, "says no capacity"), ({"capacity": 5}, "says no dynamic"), ({"dynamic": False, "capacity": 5}, "must be true"), (5, "must be a mapping"),
        ({"dynamic": True, "capacity": 0}, "capacity is 0"), ({"dynamic": True, "capacity": 5, "evict": "lfo"}, "lfu"), ({"dynamic": True, "capacity": 5, "evicts": "lru"}, "no key 'evicts'.*evict"),
        ({"dynamic": True, "capacity": 5, "admit_after": 0}, "admit_after is 0"), ({"dynamic": True, "capacity": 5, "admit_after": 2**64}, "admit_after is"),
        ({"dynamic": True, "capacity": 5, "default": 1e39}, "default is 1e"), ({"dynamic": True, "capacity": 5, "default": 10**400}, "default is 1000"), ({"dynamic": True, "capacity": 5, "default": "zeros"}, "default is 'zeros'"),
        ({"dynamic": True, "capacity": 5, "init": {"xavier": 1}}, "ids.init"),
    ],
)  # fmt: skip
def test_bad_plans(ids, words):
    with pytest.raises(PlanError, match=words):
        tw.Plan.from_dict({"version": 1, "tables": {"query": {"ids": ids}}})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"training": {"accumulate": 2}}, "dynamic ids and training.accumulate is 2"),
        ({"pipeline": {"staleness": 1}, "numerics": "approximate"}, "dynamic ids and pipeline.staleness is 1"),
        ({"training": {"in_backward": "all"}}, "has dynamic ids, and Adagrad updates it"),
    ],
)
def test_loops_that_slots_cannot_follow_are_refused(more, words):
    with pytest.raises(PlanError, match=words):
        made(tw.Plan.from_dict({**plan().to_dict(), **more}))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_is_computed_again_is_refused(reentrant):
    opt, _ = made(plan(admit_after=2))
    *inputs, _ = batch(0)
    scale = torch.ones(32, requires_grad=True)
    out = checkpoint(lambda *given: opt(*given[:3]) * given[3], *inputs, scale, use_reentrant=reentrant)
    with pytest.raises(IdMapError, match="looked up again inside a backward.*training: {checkpoint"):
        out.sum().backward()


@pytest.mark.parametrize("inside", [True, False], ids=["in_backward", "step"])
def test_a_backward_from_before_a_step_trains_no_new_owner(inside):
    """Its slots are all held again, by other ids."""
    table = {"embedding_optimizer": {"sgd": {"lr": 0.1, "in_backward": inside}}, "ids": {"dynamic": True, "capacity": 4}}
    opt = tw.optimize(nn.Sequential(nn.Embedding(1, 4)), tw.Plan.from_dict({"version": 1, "tables": {"0": table}}), sample_inputs=(torch.tensor([1, 2]),))
    old = opt(torch.tensor([1, 2, 3, 4])).sum()
    opt(torch.tensor([1])).sum().backward()
    if not inside:
        opt.embedding_optimizer.step()
        opt.zero_grad()
    new = opt(torch.tensor([5, 6, 7, 8]))
    rows = opt.dynamic_ids["0.weight"].export()[1]
    with pytest.raises(RuntimeError, match="before the last update, and their rows may belong to other ids"):
        old.backward()
    assert torch.equal(opt.dynamic_ids["0.weight"].export()[1], rows)
    new.sum().backward()  # its own is still good


@pytest.mark.parametrize("ours", [True, False], ids=["plan's optimizer", "user's"])
def test_a_gradient_that_was_stepped_is_not_added_to(ours):
    """All its slots are held again, by other ids: the sum would train those for what the first ones did."""
    ids = {"ids": {"dynamic": True, "capacity": 4}, **({"embedding_optimizer": {"sgd": {"lr": 0.1}}} if ours else {})}
    model = nn.Sequential(nn.Embedding(1, 4))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    made = tw.optimize(model, tw.Plan.from_dict({"version": 1, "tables": {"0": ids}}), optimizer=None if ours else sgd, sample_inputs=(torch.tensor([1, 2]),))
    opt, optimizer = (made, made.embedding_optimizer) if ours else made

    def backward(*ids: int):
        opt(torch.tensor(ids)).sum().backward()

    backward(1, 2, 3, 4)
    backward(3, 4)  # before a step gradients add up
    optimizer.step()
    before = opt.dynamic_ids["0.weight"].export()[1]
    with pytest.raises(TierError, match="still the one of the last step.*Call zero_grad"):
        backward(5, 6, 7, 8)
    opt.zero_grad()
    backward(5, 6, 7, 8)
    backward(5, 6)
    optimizer.step()
    after = opt.dynamic_ids["0.weight"]
    assert set(after.export()[0].tolist()) == {5, 6, 7, 8} and len(before) == 4
    for set_to_none in (True, False):
        optimizer.zero_grad(set_to_none=set_to_none)
        held, rows = after.export()
        backward(5)
        optimizer.step()
        changed = (after.export()[1][after.export()[0].argsort()] - rows[held.argsort()]).abs().sum(1)
        assert changed.count_nonzero() == 1 and changed[0] > 0


def test_steps_that_take_a_closure():
    opt, optimizer = made(plan(capacity=300))
    plainly, other = made(plan(capacity=300))
    for step in range(4):
        *inputs, wanted = batch(step)

        def closure():
            optimizer.zero_grad()
            loss = ((opt(*inputs) - wanted) ** 2).mean()  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
    train(plainly, other, 0, 4)
    for (name, a), b in zip(opt.state_dict().items(), plainly.state_dict().values()):
        assert torch.equal(a, b), name


def test_plans_round_trip(tmp_path):
    given = plan(evict="age", admit_after=2, default=0.25)
    given.save(tmp_path / "plan.yaml")
    assert tw.Plan.load(tmp_path / "plan.yaml") == given and hash(given) == hash(tw.Plan.from_dict(given.to_dict()))
    for other in ({"storage": {"cache": "1MB", "path": "x"}}, {"sharding": "row_wise"}, {"dtype": "bf16"}):
        both = tw.Plan.from_dict({"version": 1, "tables": {"query": {"ids": {"dynamic": True, "capacity": 5}, **other}}})
        with pytest.raises(PlanError, match="dynamic ids"):
            both.resolve(["query.weight"])
