"""``Plan.auto`` with a topology: a plan that agrees with its constraints, prints, and says what does not fit."""
from __future__ import annotations

from dataclasses import replace

import pytest
import tablewright as tw
import torch
import torch.distributed as dist
from small_models import Dot, Tied, dot_batch, tied_batch
from tablewright.rewriter.planner.auto import place
from tablewright.rewriter.planner.model_facts import read_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

SMALL = tw.Topology(ranks=4, memory_gib=0.001, memory_gb_s=100, lookup_gb_s=50, tflops=1, intra_node_gb_s=1, reserved=0, shard_us=0)


def auto(model=None, batch=None, **more):
    return tw.Plan.auto(model or Dot(), sample_inputs=batch or dot_batch(64), topology=more.pop("topology", SMALL), **more)


def test_every_table_has_a_place_and_the_text_reads_back(tmp_path):
    plan = auto(optimizer="adagrad")
    resolved = plan.resolve(["user.weight", "item.weight", "tags.weight"])
    assert all(t.sharding for t in resolved.values())
    plan.save(tmp_path / "plan.yaml")
    assert tw.Plan.load(tmp_path / "plan.yaml") == plan
    text = (tmp_path / "plan.yaml").read_text()
    assert text == str(plan) and "# predicted step" in text and "RUNNER-UP" in text
    plan.save(tmp_path / "plan.json")
    assert tw.Plan.load(tmp_path / "plan.json") == plan
    assert tw.Plan.auto(Dot()) == tw.Plan() and tw.Plan.auto(Dot()).forecast is None


def test_constraints_hold_and_keep_their_other_keys():
    asked = tw.Plan.from_dict({"version": 1, "embedding_optimizer": {"sgd": {"lr": 0.5}}, "tables": {
        "user": {"sharding": "row_wise", "ranks": [3, 1], "exchange": "unique", "communication": {"forward": "fp16"}},
        "i*": {"sharding": "column_wise", "trainable": False},
        "*": {"exchange": "pooled"},
    }})  # fmt: skip
    plan = auto(constraints=asked)
    found = plan.resolve(["user.weight", "item.weight", "tags.weight"])
    user = found["user.weight"]
    assert (user.sharding, user.ranks, user.exchange) == ("row_wise", (3, 1), "unique")
    assert user.communication == tw.Communication(forward="fp16") and user.embedding_optimizer == tw.SGD(lr=0.5)
    assert found["item.weight"].sharding == "column_wise" and found["item.weight"].trainable is False
    assert found["tags.weight"].exchange in ("pooled", None)
    with pytest.raises(tw.PlanError, match="no table matches 'usr'"):
        auto(constraints=tw.Plan(tables={"usr": tw.TablePlan(sharding="row_wise")}))


def test_the_sample_is_counted():
    facts = {t.name: t for t in read_model(Dot(), dot_batch(64), optimizer="adam").tables}
    user, item, tags = (facts[f"{n}.weight"] for n in ("user", "item", "tags"))
    dense, u, i, t = dot_batch(64)
    assert (user.ids, user.unique, user.bags) == (64, len(u.unique()), 64)
    assert (item.ids, item.bags) == (64, 64) and item.pooled is False
    assert (tags.ids, tags.bags, tags.pooled) == (64 * 3, 64, True)
    assert user.state == 8 and user.row_state == 0


def test_a_tied_table_is_one_with_the_ids_of_both():
    facts = {t.name: t for t in read_model(Tied(), tied_batch(6)).tables}
    assert set(facts) == {"query.weight", "wide.weight"}
    assert facts["query.weight"].ids == 6 + 18 and facts["wide.weight"].itemsize == 8
    assert "no optimizer was given" in facts["query.weight"].assumed


class Softmax(nn.Module):
    """The table is also the output layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(40, 4)

    def forward(self, ids):
        return self.items(ids) @ self.items.weight.t()


def test_a_table_that_is_read_as_a_whole_stays_whole():
    plan = auto(Softmax(), (torch.randint(0, 40, (16,)),))
    assert plan.resolve(["items.weight"])["items.weight"].sharding == "data_parallel"
    assert any("'items.weight' is data_parallel: " in note and "reads it as a whole" in note for note in plan.forecast.notes)
    with pytest.raises(tw.PlanError, match="'items.weight' cannot be row_wise: .* reads it as a whole"):
        auto(Softmax(), (torch.randint(0, 40, (16,)),), constraints=tw.Plan(tables={"items": tw.TablePlan(sharding="row_wise")}))


def big(rows: int):
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(rows, 64), nn.Linear(64, 1))
    return model, (torch.randint(0, 1000, (128,)),)


def test_a_model_that_exists_nowhere():
    """Four terabytes on the meta device: planned without memory for them, and left on the meta device."""
    model, batch = big(16_000_000_000)
    plan = tw.Plan.auto(model, sample_inputs=batch, topology="16x8xh100", optimizer="rowwise_adagrad")
    (placed,) = plan.forecast.placed
    assert placed.facts.ids == 128 and placed.facts.unique == len(batch[0].unique())
    assert max(r["held"] for r in plan.forecast.ranks) <= plan.forecast.topology.memory
    assert all(p.is_meta for p in model.parameters())


def test_what_does_not_fit_is_named():
    model, batch = big(16_000_000_000)
    with pytest.raises(tw.PlanError, match=r"table '0.weight' does not fit: .* would lie on one rank .column_wise over 8"):
        tw.Plan.auto(model, sample_inputs=batch, topology="8xa100", optimizer="sgd")
    whole = tw.Plan(tables={"0": tw.TablePlan(sharding="table_wise")})
    with pytest.raises(tw.PlanError, match=r"table '0.weight' does not fit: .*(table_wise, .*).*What to do"):
        tw.Plan.auto(model, sample_inputs=batch, topology="16x8xh100", constraints=whole)


def test_without_a_batch_or_tables():
    with pytest.raises(tw.PlanError, match="sample_inputs is None"):
        tw.Plan.auto(Dot(), topology=SMALL)
    plan = auto(nn.Sequential(nn.Linear(3, 1)), (torch.randn(4, 3),))
    assert plan == tw.Plan() and plan.forecast.step > 0 and "0 tables on 4 ranks" in str(plan)


def test_bytes_on_the_wire_are_those_between_ranks():
    """What ranks send is what the blocks receive and return, from and to every rank but their own."""
    facts = read_model(Dot(), dot_batch(64), optimizer="sgd", plan=tw.Plan(tables={"*": tw.TablePlan(sharding="table_wise", exchange="pooled")}))
    forecast = place(facts, SMALL)
    total = sum(r["sent"] for r in forecast.ranks)
    rows = {"user.weight": (64, 64, 4), "item.weight": (64, 64, 4), "tags.weight": (192, 64, 6)}
    by_hand = 0.0
    for name, (ids, results, dim) in rows.items():
        by_hand += 3 * (4 * (ids + (results if name == "tags.weight" else 0)) + 2 * results * dim * 4)
    dense = 4 * 2 * 3 / 4 * sum(p.numel() * 4 for n, p in Dot().named_parameters() if n.startswith("over"))
    assert total == pytest.approx(by_hand + dense)


def test_predicted_beside_measured():
    forecast = auto().forecast
    text = forecast.beside(tw.Measured(step=2 * forecast.step, sent=[r["sent"] for r in forecast.ranks], phases={"lookup": 0.0}))
    assert "2.00" in text.splitlines()[1] and "rank 3 sent" in text and text.count("1.00") == 4
    with pytest.raises(tw.PlanError, match="sent has 1 numbers; the forecast is for 4 ranks"):
        forecast.beside(tw.Measured(sent=[1.0]))
    with pytest.raises(tw.PlanError, match="phases has no 'lookups'"):
        forecast.beside(tw.Measured(phases={"lookups": 1.0}))


def test_auto_over_ranks_is_planned_on_the_first(tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = Dot()
        opt = tw.optimize(model, "auto", sample_inputs=dot_batch(), mesh=mesh)
        assert {name: t.sharding for name, t in opt.plan.tables.items()} == dict.fromkeys(("user", "item", "tags"), "data_parallel")
        torch.testing.assert_close(opt(*dot_batch()), model(*dot_batch()))
        tiny = replace(SMALL, ranks=1, memory_gib=1e-6)
        monkeypatch.setattr("tablewright.rewriter.planner.auto.here", lambda ranks, nodes, device: tiny)
        with pytest.raises(tw.PlanError, match="plan='auto' found no plan for 1 ranks: .* more than a rank has.* Pass a plan"):
            tw.optimize(Dot(), "auto", sample_inputs=dot_batch(), mesh=mesh)
    finally:
        dist.destroy_process_group()


def test_each_choice_says_why():
    forecast = auto().forecast
    for row in forecast.rows():
        assert row[5] and row[-1], row
    plan = auto(constraints=tw.Plan(tables={"*": tw.TablePlan(sharding="data_parallel")}))
    assert {row[-1] for row in plan.forecast.rows()} == {"the plan says so"}
