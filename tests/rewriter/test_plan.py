"""A plan is data: exact round trips, named errors with the nearest match, and what its entries mean."""
from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import tablewright as tw
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Dot, dot_batch
from tablewright.rewriter.placement import CODECS, EXCHANGES, SHARDINGS

EXAMPLE = """
version: 1
embedding_optimizer: {rowwise_adagrad: {lr: 0.01, eps: 1.0e-8, in_backward: true}}
tables:
  "user*": {embedding_optimizer: {adagrad: {lr: 0.02}}}
  "frozen.*": {trainable: false}
passes: {group_tables: true}
numerics: reassociated
"""


def test_the_example_of_the_documentation(tmp_path):
    (tmp_path / "plan.yaml").write_text(EXAMPLE)
    plan = tw.Plan.load(tmp_path / "plan.yaml")
    assert plan == tw.Plan(
        embedding_optimizer=tw.RowwiseAdagrad(lr=0.01, eps=1e-8, in_backward=True),
        tables={"user*": tw.TablePlan(embedding_optimizer=tw.Adagrad(lr=0.02)), "frozen.*": tw.TablePlan(trainable=False)},
        passes={"group_tables": True},
    )


def _optimizers():
    number = st.floats(0, 10, allow_nan=False)
    settings_ = {"lr": number, "weight_decay": number, "in_backward": st.booleans()}
    eps, beta = {"eps": number}, st.floats(0, 1, exclude_max=True)
    return st.one_of(
        st.builds(tw.SGD, **settings_),
        st.builds(tw.Adagrad, **settings_, **eps),
        st.builds(tw.RowwiseAdagrad, **settings_, **eps),
        st.builds(tw.Adam, **settings_, **eps, betas=st.tuples(beta, beta)),
    )


def _plans():
    maybe = st.one_of(st.none(), _optimizers())
    table = st.builds(
        tw.TablePlan, embedding_optimizer=maybe, trainable=st.sampled_from([None, True, False]),
        sharding=st.sampled_from([None, *SHARDINGS]), exchange=st.sampled_from([None, *EXCHANGES]),
        ranks=st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
        reduce_in_node=st.sampled_from([None, True, False]),
        communication=st.none() | st.builds(tw.Communication, st.sampled_from(CODECS), st.sampled_from(CODECS)),
    )  # fmt: skip
    passes = st.fixed_dictionaries(
        {},
        optional={
            "group_tables": st.one_of(st.booleans(), st.fixed_dictionaries({}, optional={"max_tables": st.integers(1, 99)})),
            "remove_zero_dropout": st.booleans(),
        },
    )
    numerics = st.sampled_from(["exact", "reassociated", "approximate"])
    globs = st.dictionaries(st.text(min_size=1, max_size=8), table, max_size=3)
    low = st.sampled_from(["fp32", "bf16", "fp16"])
    plans = st.builds(tw.Plan, embedding_optimizer=maybe, tables=globs, passes=passes, numerics=numerics)
    return st.builds(lambda plan, p: plan if plan.numerics == "exact" else dataclasses.replace(plan, precision=p), plans, low)


@settings(max_examples=60, deadline=None)
@given(_plans())
def test_round_trips_are_exact(tmp_path_factory, plan):
    folder = tmp_path_factory.mktemp("plans")
    for name in ("plan.yaml", "plan.json"):
        plan.save(folder / name)
        again = tw.Plan.load(folder / name)
        assert again == plan and hash(again) == hash(plan)
        assert list(again.tables) == list(plan.tables), "the order of entries has a meaning"
    assert tw.Plan.from_dict(plan.to_dict()) == plan == pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    (tmp_path / "p.yml").write_text("version: 1\nembedding_optimizer: {adagrad: {lr: 1e-2, eps: 1e-10}}\n")
    assert tw.Plan.load(tmp_path / "p.yml").embedding_optimizer == tw.Adagrad(lr=0.01, eps=1e-10)


def test_a_plan_cannot_be_changed():
    plan = tw.Plan(tables={"a": tw.TablePlan(trainable=False)}, passes={"group_tables": {"max_tables": 3}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.numerics = "exact"
    with pytest.raises(TypeError):
        plan.tables["b"] = tw.TablePlan()
    with pytest.raises(TypeError):
        plan.passes["group_tables"] = False
    plan.to_dict()["passes"]["group_tables"]["max_tables"] = 4
    assert plan.passes["group_tables"]["max_tables"] == 3


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"embeding_optimizer": None}, ["the plan has no key 'embeding_optimizer'", "did you mean 'embedding_optimizer'"]),
        ({"passes": {"group_table": False}}, ["passes has no pass 'group_table'", "did you mean 'group_tables'"]),
        ({"passes": {"group_tables": {"max_table": 3}}}, ["passes.group_tables has no option 'max_table'", "'max_tables'"]),
        ({"passes": {"group_tables": {"max_tables": 0}}}, ["passes.group_tables.max_tables is 0", "above 0"]),
        ({"passes": {"group_tables": {"max_tables": "9"}}}, ["passes.group_tables.max_tables is '9'"]),
        ({"passes": {"group_tables": 3}}, ["passes.group_tables is 3", "true, false or a mapping"]),
        ({"embedding_optimizer": {"adagard": {}}}, ["no optimizer 'adagard'", "did you mean 'adagrad'"]),
        ({"embedding_optimizer": {"adagrad": {"lrr": 1}}}, ["embedding_optimizer.adagrad has no option 'lrr'", "'lr'"]),
        ({"embedding_optimizer": {"adagrad": {"lr": "fast"}}}, ["embedding_optimizer.adagrad.lr is 'fast'", "a number >= 0"]),
        ({"embedding_optimizer": {"adagrad": {"lr": -1}}}, ["lr is -1", ">= 0"]),
        ({"embedding_optimizer": {"adagrad": {"in_backward": 1}}}, ["in_backward is 1", "true or false"]),
        ({"embedding_optimizer": {"adam": {"betas": [0.9, 1.0]}}}, ["betas", "two numbers in [0, 1)"]),
        ({"embedding_optimizer": {"adam": {"betas": 0.9}}}, ["betas", "two numbers in [0, 1)"]),
        ({"embedding_optimizer": {"adam": {}, "sgd": {}}}, ["embedding_optimizer", "one optimizer"]),
        ({"embedding_optimizer": "adagrad"}, ["embedding_optimizer", "{adagrad: {lr: 0.01}}"]),
        ({"tables": {"a": {"trainabel": True}}}, ["tables.a has no key 'trainabel'", "did you mean 'trainable'"]),
        ({"tables": {"a": {"trainable": "no"}}}, ["trainable is 'no'", "true or false"]),
        ({"tables": {"a": {"trainable": 0}}}, ["trainable is 0", "true or false"]),
        ({"tables": {3: {"trainable": False}}}, ["a key of tables is 3", "glob"]),
        ({"tables": {"a": False}}, ["tables.a is False", "mapping"]),
        ({"tables": ["a"]}, ["tables", "mapping"]),
        ({"numerics": "bitwise"}, ["numerics is 'bitwise'", "exact | reassociated | approximate"]),
        ({"precision": "fp8"}, ["precision is 'fp8'", "fp32 | bf16 | fp16"]),
        ({"precision": "bf16", "numerics": "exact"}, ["precision is bf16, which numerics: exact forbids"]),
        ({"version": True}, ["version is True", "1"]),
        ({"version": 2}, ["version is 2", "1"]),
    ],
    ids=lambda v: str(v)[:60] if isinstance(v, dict) else "",
)
def test_what_is_wrong_is_named(raw, words):
    with pytest.raises(tw.PlanError) as error:
        tw.Plan.from_dict({"version": 1, **raw})
    for word in words:
        assert word in str(error.value)


def test_a_plan_without_version_and_a_file_that_is_none(tmp_path):
    with pytest.raises(tw.PlanError, match="version"):
        tw.Plan.from_dict({})
    for name, text in (("a.yaml", "{version: 1"), ("a.json", "{"), ("b.yaml", "- 1"), ("c.yaml", "version: 1\nnumeric: exact")):
        (tmp_path / name).write_text(text)
        with pytest.raises(tw.PlanError, match=name):
            tw.Plan.load(tmp_path / name)


def test_a_glob_that_matches_nothing_names_the_nearest_table():
    with pytest.raises(tw.PlanError, match="no table matches 'usr'.*did you mean 'user'.*user, item, tags"):
        tw.optimize(Dot(), tw.Plan(tables={"usr": tw.TablePlan(trainable=False)}), sample_inputs=dot_batch())


def test_entries_apply_key_by_key_the_earlier_one_winning():
    slow, fast = tw.SGD(lr=0.1), tw.Adagrad(lr=0.5)
    plan = tw.Plan(
        embedding_optimizer=tw.Adam(),
        tables={
            "user": tw.TablePlan(trainable=True),
            "u*": tw.TablePlan(trainable=False, embedding_optimizer=slow),
            "*.weight": tw.TablePlan(embedding_optimizer=fast),
        },
    )
    found = plan.resolve(["user.weight", "unit.weight", "item.weight"])
    assert found == {
        "user.weight": tw.TablePlan(trainable=True, embedding_optimizer=slow),
        "unit.weight": tw.TablePlan(trainable=False, embedding_optimizer=slow),
        "item.weight": tw.TablePlan(embedding_optimizer=fast),
    }
    assert tw.Plan(embedding_optimizer=slow).resolve(["a"]) == {"a": tw.TablePlan(embedding_optimizer=slow)}


@pytest.mark.parametrize(("numerics", "expected"), [("exact", (0, 3)), ("reassociated", (3, 3)), ("approximate", (3, 3))])
def test_numerics_disable_looser_passes_and_the_report_says_so(numerics, expected):
    model = Dot()
    opt = tw.optimize(model, tw.Plan(numerics=numerics), sample_inputs=dot_batch())
    assert opt.report.coverage["lookups"] == expected
    disabled = [r for r in opt.report.records if r.status == "DISABLED" and r.kind == "lookups"]
    assert len(disabled) == 3 - expected[0]
    for row in disabled:
        assert row.reason == "it is reassociated, and the plan allows exact at most"
    if disabled:
        assert "3 of lookups disabled" in str(opt.report)
        assert torch.equal(opt(*dot_batch()), model(*dot_batch())), "an exact plan keeps the bits"


def test_a_pass_turned_off_is_in_the_report_and_options_reach_the_pass():
    opt = tw.optimize(Dot(), tw.Plan(passes={"group_tables": False}), sample_inputs=dot_batch())
    assert {(r.status, r.reason) for r in opt.report.records if r.kind == "lookups"} == {
        ("DISABLED", "the plan says passes.group_tables: false")
    }
    opt = tw.optimize(Dot(), {"version": 1, "passes": {"group_tables": {"max_tables": 1}}}, sample_inputs=dot_batch())
    assert opt.report.launches == 3 and opt.report.coverage["lookups"] == (3, 3)


def test_auto_is_a_plan_one_can_read_and_edit(tmp_path):
    model = Dot()
    plan = tw.Plan.auto(model, sample_inputs=dot_batch())
    assert tw.optimize(model, "auto", sample_inputs=dot_batch()).plan == plan
    plan.save(tmp_path / "p.yaml")
    assert tw.optimize(model, str(tmp_path / "p.yaml"), sample_inputs=dot_batch()).plan == plan
    assert tw.optimize(model, plan.to_dict(), sample_inputs=dot_batch()).plan == plan
    assert yaml.safe_load((tmp_path / "p.yaml").read_text())["version"] == 1
    with pytest.raises(tw.PlanError, match="plan is 'fastest'"):
        tw.optimize(model, "fastest", sample_inputs=dot_batch())
