"""``tables: {glob: {compress: ...}}``: the same as a model written by hand over the same smaller tables, under plain names."""
from __future__ import annotations

import copy
import io
import json

import pytest
import tablewright as tw
import torch
from small_models import Tied, gradients_of, tied_batch, weights_of
from tablewright.rewriter.errors import PlanError
from torch import Tensor, nn

USERS, ITEMS, TAGS, DIM = 700, 903, 605, 8
FORMS = {
    "hashing": {"hashing": {"rows": 30}},
    "multiply": {"quotient_remainder": {"buckets": 40, "combine": "multiply"}},
    "add": {"quotient_remainder": {"buckets": 40, "combine": "add"}},
    "mixed": {"mixed_dim": {"dim": 3}},
    "quantized": {"product_quantization": {"parts": 2}},
}
TRAINED = [name for name in FORMS if name != "quantized"]


class Model(nn.Module):
    """Single ids, with and without a padding row; bags with offsets and a padding row, and weighted ones of two dimensions."""

    def __init__(self, mode: str = "mean") -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(USERS, DIM), nn.Embedding(ITEMS, DIM, padding_idx=ITEMS - 1)
        self.tags = nn.EmbeddingBag(TAGS, DIM, mode=mode, padding_idx=2)
        self.seen = nn.EmbeddingBag(TAGS, DIM, mode="sum")
        self.out = nn.Linear(4 * DIM, 1)

    def forward(self, user: Tensor, item: Tensor, tags: Tensor, offsets: Tensor, seen: Tensor, weights: Tensor) -> Tensor:
        parts = [self.user(user), self.item(item), self.tags(tags, offsets), self.seen(seen, per_sample_weights=weights)]
        return self.out(torch.cat(parts, 1)).squeeze(1)


def batch(rows: int = 9, seed: int = 0) -> tuple[Tensor, ...]:
    """Duplicates, the largest and the padding id, and empty bags."""
    g = torch.Generator().manual_seed(seed)

    def ids(table: int, *shape: int) -> Tensor:
        drawn = torch.randint(0, table, shape, generator=g)
        drawn.view(-1)[:3] = torch.tensor([table - 1, 5, 5])[: drawn.numel()]
        return drawn

    tags = ids(TAGS, 2 * rows)
    tags[:: 3] = 2
    offsets = torch.randint(0, 2 * rows + 1, (rows,), generator=g).sort().values
    offsets[:1] = 0
    return ids(USERS, rows), ids(ITEMS, rows), tags, offsets, ids(TAGS, rows, 4), torch.randn(rows, 4, generator=g)


def planned(form: str, **more) -> tw.Plan:
    tables = {"*": {"compress": FORMS[form]}}
    if form == "multiply":  # bags are pooled, and sums of products are no products of sums
        tables = {glob: {"compress": FORMS["add" if glob in ("tags", "seen") else form]} for glob in ("user", "item", "tags", "seen")}
    return tw.Plan(numerics="approximate", tables=tables, **more)


def row(parts: dict[str, Tensor], i: int, form: str, padding: int | None) -> Tensor:
    """Row ``i`` of a table of these parts, by the formula; the padding row is not trained."""
    if form == "hashing":
        return parts["hashed"][30].detach() if i == padding else parts["hashed"][i % 30]
    if form in ("multiply", "add"):
        a, b = (parts["quotient"], i // 40), (parts["remainder"], i % 40)
        q, r = (a[0][-1].detach(), b[0][-1].detach()) if i == padding else (a[0][a[1]], b[0][b[1]])
        return q * r if form == "multiply" else q + r
    if form == "mixed":
        return (parts["base"][i].detach() if i == padding else parts["base"][i]) @ parts["projection"]
    books = parts["codebooks"].view(2, 257, DIM // 2)
    return torch.cat([books[p, 256 if i == padding else int(parts["codes"][i, p])] for p in range(2)])


class ByHand(nn.Module):
    """The same model over the parts of an optimized one, without any embedding op."""

    def __init__(self, opt: nn.Module, form: str, mode: str = "mean") -> None:
        super().__init__()
        self.form, self.mode, self.out = form, mode, copy.deepcopy(opt.out)
        self.tables = nn.ModuleDict()
        for name in ("user", "item", "tags", "seen"):
            self.tables[name] = holder = nn.Module()
            for key, p in opt.get_submodule(name).named_parameters():
                holder.register_parameter(key, nn.Parameter(p.detach().clone()))
            for key, b in opt.get_submodule(name).named_buffers():
                holder.register_buffer(key, b.clone())

    def rows(self, name: str, ids: Tensor, padding: int | None = None) -> Tensor:
        form = "add" if self.form == "multiply" and name in ("tags", "seen") else self.form
        held = self.tables[name]
        parts = dict([*held.named_parameters(), *held.named_buffers()])
        found = [row(parts, i, form, padding) for i in ids.flatten().tolist()]
        return torch.stack(found) if found else next(iter(parts.values())).new_zeros(0, DIM)

    def forward(self, user, item, tags, offsets, seen, weights):
        bags = []
        for first, last in zip(offsets.tolist(), [*offsets.tolist()[1:], len(tags)]):
            kept = tags[first:last][tags[first:last] != 2]
            pool = {"mean": lambda rows: rows.mean(0), "sum": lambda rows: rows.sum(0), "max": lambda rows: rows.amax(0)}[self.mode]
            bags.append(pool(self.rows("tags", kept, 2)) if len(kept) else torch.zeros(DIM))
        tagged = torch.stack(bags) if bags else torch.zeros(0, DIM)
        summed = (self.rows("seen", seen).view(*seen.shape, DIM) * weights[..., None]).sum(1)
        return self.out(torch.cat([self.rows("user", user), self.rows("item", item, ITEMS - 1), tagged, summed], 1)).squeeze(1)


def named(model: nn.Module) -> dict[str, Tensor]:
    return {n.removeprefix("tables."): v for n, v in weights_of(model).items()}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert set(a) == set(b) and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    ("form", "mode"), [*((form, mode) for form in FORMS for mode in ("mean", "sum")), ("hashing", "max"), ("quantized", "max")]
)
def test_outputs_and_gradients_are_those_by_hand(form, mode):
    torch.manual_seed(0)
    plain = Model(mode)
    before = weights_of(plain)
    opt = tw.optimize(plain, planned(form), sample_inputs=batch())
    hand = ByHand(opt, form, mode)
    assert opt.report.coverage["lookups"][0] == opt.report.coverage["lookups"][1] and opt.report.launches == 1
    assert opt.report.coverage["compressed tables"] == (4, 4)
    for rows in (9, 1, 0):
        opt.zero_grad(), hand.zero_grad()
        outs = [m(*batch(rows, seed=rows)) for m in (opt, hand)]
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
        for out in outs:
            out.square().sum().backward()
        close({n.removeprefix("tables."): g for n, g in gradients_of(hand).items()}, gradients_of(opt))
    with torch.no_grad():
        torch.testing.assert_close(opt.eval()(*batch()), hand(*batch()), rtol=1e-4, atol=1e-5)
        rows = torch.cat([hand.rows("item", torch.arange(ITEMS), ITEMS - 1)])
        torch.testing.assert_close(opt.state_dict()["item.weight"], rows, rtol=1e-5, atol=1e-6)
    assert not opt.state_dict()["item.weight"][-1].any(), "the padding row is what it was"
    close(before, weights_of(plain)), "the plain model keeps its tables"
    assert opt.check(*batch())


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "planned"])
@pytest.mark.parametrize("form", TRAINED)
def test_training_steps_are_those_by_hand(form, kind):
    torch.manual_seed(0)
    plain = Model()
    make = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}.get(kind)
    if make is not None:
        given = make(plain.named_parameters() if kind == "adagrad" else plain.parameters(), lr=0.1)
        opt, optimizer = tw.optimize(plain, planned(form), optimizer=given, sample_inputs=batch())
        optimizers = [optimizer]
        assert {id(p) for p in opt.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
        assert kind != "adagrad" or optimizer.param_groups[0]["param_names"] == [n for n, _ in opt.named_parameters()]
    else:
        opt = tw.optimize(plain, planned(form, embedding_optimizer=tw.Adagrad(lr=0.1, eps=1e-10, in_backward=True)), sample_inputs=batch())
        optimizers = [torch.optim.Adagrad(opt.dense_parameters(), lr=0.1)]
    updates = {r.subject for r in opt.report.records if r.kind == "updates" and r.status == "APPLIED"}
    assert not any("projection" in n for n in updates) and {n for n in updates if "user" in n}, "row by row"
    hand = ByHand(opt, form)
    twin = (make or torch.optim.Adagrad)(hand.parameters(), lr=0.1)
    for step in range(3):
        for model, steps in ((opt, optimizers), (hand, [twin])):
            model(*batch(seed=step)).square().sum().backward()
            for each in steps:
                each.step()
                each.zero_grad()
    close(named(hand), named(opt))
    assert not opt.state_dict()["item.weight"][-1].any()


@pytest.mark.parametrize("form", FORMS)
def test_ids_outside_of_the_table_are_refused(form):
    opt = tw.optimize(Model(), planned(form), sample_inputs=batch())
    for place, rows in ((0, USERS), (1, ITEMS), (2, TAGS), (4, TAGS)):
        for bad in (rows, rows + 1, rows + 17, -1, -rows):
            given = [t.clone() for t in batch()]
            given[place].view(-1)[4] = bad
            with pytest.raises((IndexError, RuntimeError), match="out of range|outside"):
                opt(*given)


@pytest.mark.parametrize("form", FORMS)
def test_state_dicts_have_plain_rows_and_bring_the_parts_back(form):
    torch.manual_seed(0)
    opt = tw.optimize(Model(), planned(form), sample_inputs=batch())
    with torch.no_grad():
        for p in opt.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if form == "mixed":
            opt.item.base[-1] = 0
    state = opt.state_dict()
    assert {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in Model().state_dict().items()}
    plain = Model()
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(plain(*batch()), opt(*batch()), rtol=1e-5, atol=1e-5)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    others = [tw.optimize(Model(), planned(form), sample_inputs=batch()) for _ in range(2)]
    others[0].load_state_dict(torch.load(file, weights_only=True), strict=True)
    parts = dict([*opt.named_parameters(), *opt.named_buffers()])
    for name, part in [*others[0].named_parameters(), *others[0].named_buffers()]:
        assert torch.equal(part, parts[name]), f"{name}: bit for bit"
    others[1].load_state_dict(dict(state), strict=True)  # without the metadata: fitted
    torch.testing.assert_close(others[1](*batch()), opt(*batch()), rtol=1e-3, atol=1e-3)
    state["user.weight"][3] += 1  # rows that are not those of the parts
    held = opt.get_submodule("user").parts()
    kept = {n: t.data_ptr() for n, t in held.items()}
    opt.load_state_dict(state, strict=True, assign=True)
    assert {n: t.data_ptr() for n, t in opt.get_submodule("user").parts().items()} == kept, "in place: optimizers hold these"
    assert not torch.equal(opt.state_dict()["user.weight"][3], plain.user.weight[3])
    for wrong, words in (({**plain.state_dict(), "user.weight": torch.zeros(3, DIM)}, "size mismatch"), ({"out.bias": plain.out.bias}, "Missing key")):
        before = opt.state_dict()["user.weight"]
        with pytest.raises(RuntimeError, match=words):
            opt.load_state_dict(wrong)
        assert torch.equal(opt.state_dict()["user.weight"], before)
    with pytest.raises(RuntimeError, match="Unexpected key.*user.other"):
        opt.load_state_dict({**plain.state_dict(), "user.other": plain.out.bias})


@pytest.mark.parametrize("form", FORMS)
def test_copies_and_the_way_back(form):
    torch.manual_seed(0)
    opt = tw.optimize(Model(), planned(form), sample_inputs=batch())
    with torch.no_grad():
        for p in opt.parameters():
            p.mul_(1.5)
    twin = copy.deepcopy(opt)
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    for other in (twin, again):
        held = dict([*other.named_parameters(), *other.named_buffers()])
        assert all(torch.equal(held[n], t) and held[n] is not t for n, t in [*opt.named_parameters(), *opt.named_buffers()])
        assert torch.equal(other(*batch()), opt(*batch()))
    plain = opt.unoptimized()
    assert type(plain.user) is nn.Embedding and type(plain.tags) is nn.EmbeddingBag and plain.user.weight.requires_grad
    assert list(plain.state_dict()) == list(Model().state_dict()) and "buckets" not in plain.user.__dict__
    torch.testing.assert_close(plain(*batch()), opt(*batch()), rtol=1e-5, atol=1e-5)
    assert copy.deepcopy(twin)(*batch(2)).shape == (2,)


def test_without_sample_inputs_and_compiled():
    torch.manual_seed(0)
    form = "multiply"
    blind = tw.optimize(Model(), planned(form))
    opt = tw.optimize(blind.unoptimized(), planned(form), sample_inputs=batch())
    torch.testing.assert_close(blind(*batch()), opt(*batch()), rtol=1e-3, atol=1e-3)
    narrow = [t.int() if not t.is_floating_point() else t for t in batch()]
    torch.testing.assert_close(opt(*narrow), opt(*batch()))
    compiled = torch.compile(opt, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch()), opt(*batch()))


def test_the_report_says_what_was_saved():
    opt = tw.optimize(Model(), tw.Plan(numerics="approximate", tables={"user": {"compress": FORMS["add"]}, "tags": {"compress": {"hashing": {"rows": 605}}}}))
    (done,) = [r for r in opt.report.records if r.kind == "compressed tables" and r.status == "APPLIED"]
    after = (18 + 40) * DIM * 4
    assert done.subject == "user.weight" and f"{after:,} bytes instead of {USERS * DIM * 4:,}" in done.detail
    assert opt.report.copied_bytes == after and f"1 tables in smaller forms have {after:,} bytes" in str(opt.report)
    (left,) = [r for r in opt.report.skipped() if r.kind == "compressed tables"]
    assert left.subject == "tags.weight" and "by hashing it would have" in left.reason and type(opt.tags) is nn.EmbeddingBag
    assert "quotient and remainder by 40 buckets, added" in opt.explain("user")
    assert sum(p.numel() for n, p in opt.named_parameters() if n.startswith("user")) * 4 == after


def test_tied_and_frozen_tables():
    model = Tied().requires_grad_(False)
    model.query.weight.requires_grad_(True)
    opt = tw.optimize(model, tw.Plan(numerics="approximate", tables={"document": {"compress": {"mixed_dim": {"dim": 1}}}}), sample_inputs=tied_batch())
    assert opt.query.base is opt.document.base and opt.query.projection is opt.document.projection
    back = opt.unoptimized()
    assert back.query.weight is back.document.weight
    torch.testing.assert_close(back(*tied_batch()), opt(*tied_batch()))
    frozen = tw.optimize(Model(), planned("add").from_dict({**planned("add").to_dict(), "tables": {"*": {"compress": FORMS["add"], "trainable": False}}}),
                         sample_inputs=batch())  # fmt: skip
    frozen(*batch()).sum().backward()
    assert frozen.user.quotient.grad is None and frozen.out.weight.grad is not None


# --- what cannot be ------------------------------------------------------------------------------------------------------------


def test_plans_round_trip_and_errors_are_named():
    for form in FORMS:
        plan = planned(form)
        assert tw.Plan.from_dict(plan.to_dict()) == plan and hash(plan) == hash(tw.Plan.from_dict(plan.to_dict()))
    assert planned("hashing").tables["*"].compress == tw.Hashing(30)
    for raw, words in (
        ({"hashin": {"rows": 3}}, r"tables.user.compress has no key 'hashin' \(did you mean 'hashing'\?\)"),
        ({"hashing": {"row": 3}}, r"compress.hashing has no key 'row' \(did you mean 'rows'\?\)"),
        ({"hashing": {}}, "compress.hashing says no rows"),
        ({"hashing": {"rows": 0}}, "tables.user.compress.hashing.rows is 0; it must be a whole number above 0"),
        ({"mixed_dim": {"dim": 1.5}}, "compress.mixed_dim.dim is 1.5"),
        ({"quotient_remainder": {"buckets": 4, "combine": "ad"}}, r"combine is 'ad' \(did you mean 'add'\?\)"),
        ("hashing", "compress is 'hashing'; it must be one of hashing, quotient_remainder"),
        ({"hashing": {"rows": 3}, "mixed_dim": {"dim": 2}}, "it must be one of"),
    ):
        with pytest.raises(PlanError, match=words):
            tw.Plan(numerics="approximate", tables={"user": {"compress": raw}})
    with pytest.raises(PlanError, match="user.compress: hashing gives a table fewer numbers, which is approximate, and the plan allows numerics: reass"):
        tw.Plan(tables={"user": {"compress": {"hashing": {"rows": 3}}}})
    with pytest.raises(PlanError, match="must be one of tw.Hashing"):
        tw.TablePlan(compress={"hashing": {"rows": 3}})  # type: ignore[arg-type]


class Odd(nn.Module):
    """Tables that cannot be compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.raw, self.own = nn.Parameter(torch.randn(50, 4)), type("Own", (nn.Embedding,), {})(50, 4)
        self.renormed, self.counted = nn.Embedding(50, 4, max_norm=1.0), nn.Embedding(50, 4, scale_grad_by_freq=True)
        self.tied, self.back = nn.Embedding(50, 4), nn.Linear(4, 50, bias=False)
        self.back.weight = self.tied.weight
        self.padded, self.low = nn.Embedding(50, 4, padding_idx=1), nn.Embedding(50, 4).half()
        self.biggest, self.bag = nn.EmbeddingBag(50, 4, mode="max"), nn.EmbeddingBag(50, 4)
        self.first, self.second = nn.Embedding(50, 4, padding_idx=0), nn.Embedding(50, 4)
        self.second.weight = self.first.weight
        with torch.no_grad():
            self.padded.weight[1] = 1

    def forward(self, ids: Tensor) -> Tensor:
        names = ("own", "renormed", "counted", "tied", "padded", "first", "second")
        x = sum(self.get_submodule(n)(ids) for n in names) + self.raw[ids] + self.low(ids).float()
        return self.back(x + self.biggest(ids[:, None]) + self.bag(ids[:, None]))


@pytest.mark.parametrize(
    ("glob", "how", "words"),
    [
        ("raw", "hashing", "'raw' is to be compressed, and it is no weight of an nn.Embedding"),
        ("own", "hashing", "a Own holds it"),
        ("renormed", "hashing", "max_norm"),
        ("counted", "hashing", "scale_grad_by_freq"),
        ("tied", "hashing", "a Linear holds it"),
        ("low", "hashing", "float16"),
        ("biggest", "add", "take the largest value"),
        ("bag", "multiply", "a sum of products is no product of sums"),
        ("padded", "mixed", r"padding_idx \(1\) is not zero"),
        ("first", "hashing", "padding_idx None and 0"),
        ("bag", "parts", "4 numbers, which are not 3 equal parts"),
        ("nothing", "hashing", "no table matches 'nothing'"),
    ],
)
def test_tables_that_cannot_be_compressed_are_named(glob, how, words):
    form = {"hashing": {"rows": 5}} if how == "hashing" else {"product_quantization": {"parts": 3}} if how == "parts" else FORMS[how]
    with pytest.raises(PlanError, match=words):
        tw.optimize(Odd(), tw.Plan(numerics="approximate", tables={glob: {"compress": form}}), sample_inputs=(torch.tensor([1, 2]),))


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_do_not_spread(how, bad):
    name = "user.weight"
    opt = tw.optimize(Model(), tw.Plan(numerics="approximate", tables={"user": {"compress": FORMS[how]}}), sample_inputs=batch())
    state, held = opt.state_dict(), opt.state_dict()[name].clone()
    state[name] = held.clone()
    state[name][7, 1] = bad
    with pytest.raises(RuntimeError, match="user.weight holds numbers that are not finite"):
        opt.load_state_dict(state)
    assert torch.equal(opt.state_dict()[name], held)
    model = Model()
    with torch.no_grad():
        model.user.weight[7, 1] = bad
    with pytest.raises(PlanError, match="numbers that are not finite"):
        tw.optimize(model, tw.Plan(numerics="approximate", tables={"user": {"compress": FORMS[how]}}), sample_inputs=batch())


def test_combinations_that_cannot_be():
    with pytest.raises(PlanError, match="it is the whole model"):
        tw.optimize(nn.Embedding(50, 4), planned("hashing"), sample_inputs=(torch.tensor([1, 2]),))
    both = {"compress": FORMS["hashing"], "dtype": "bf16", "trainable": False}
    for more, words in ((both, "compress and dtype: bf16"), ({"compress": FORMS["hashing"], "sharding": "row_wise"}, "compress and sharding: row_wise"),
                        ({"compress": FORMS["hashing"], "storage": {"cache": "1MB", "path": "rows"}}, "compress and storage: ")):  # fmt: skip
        with pytest.raises(PlanError, match=words):
            tw.optimize(Model(), tw.Plan(numerics="approximate", tables={"user": more}), sample_inputs=batch())
    for form, kind, words in (("quantized", torch.optim.SGD, "train first"), ("mixed", torch.optim.SparseAdam, "takes sparse gradients only"),
                              ("hashing", torch.optim.LBFGS, "a list of its parameters of its own")):  # fmt: skip
        model = Model()
        with pytest.raises(PlanError, match=words):
            tw.optimize(model, planned(form), optimizer=kind(model.parameters()), sample_inputs=batch())
    model = Model()
    with pytest.raises(PlanError, match="nobody would train its projection"):
        tw.optimize(model, planned("mixed", embedding_optimizer=tw.SGD()), optimizer=torch.optim.SGD(model.out.parameters(), lr=1.0), sample_inputs=batch())


def test_an_error_leaves_the_optimizer_as_it_was():
    model = Model()
    optimizer = torch.optim.Adagrad(model.named_parameters(), lr=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    plan = tw.Plan(numerics="approximate", tables={"user": {"compress": FORMS["add"]}, "usr": {"trainable": False}})
    with pytest.raises(PlanError, match="no table matches 'usr'"):
        tw.optimize(model, plan, optimizer=optimizer, sample_inputs=batch())
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"] and list(after["state"]) == list(before["state"])


class ReadsWeights(nn.Module):
    def __init__(self, read) -> None:
        super().__init__()
        self.table, self.read = nn.Embedding(50, 3), read

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum() + self.read(self.table.weight, ids)


@pytest.mark.parametrize("read", [lambda w, ids: w[ids].sum(), lambda w, ids: w.norm()], ids=["rows", "norm"])
def test_other_reads_of_a_compressed_table_are_refused(read):
    """They would compute the whole table at each step."""
    with pytest.raises(PlanError, match="'table' is compressed, and .* reads its weight; only tables that are read by calling"):
        plan = tw.Plan(numerics="approximate", tables={"table": {"compress": {"hashing": {"rows": 5}}}})
        tw.optimize(ReadsWeights(read), plan, sample_inputs=(torch.tensor([1, 2]),))


def test_every_form_is_served(tmp_path):
    torch.manual_seed(0)
    chosen = {"user": "multiply", "item": "hashing", "tags": "mixed", "seen": "quantized"}
    plan = tw.Plan(numerics="approximate", tables={name: {"compress": FORMS[form]} for name, form in chosen.items()})
    opt = tw.optimize(Model(), plan, sample_inputs=batch()).eval()
    where = tw.export_serving(opt, batch(), tmp_path / "served")
    stored = tw.load_serving(where)
    names = ("user", "item", "tags", "offsets", "seen", "weights")
    for rows in (6, 1):
        given = batch(rows, seed=rows)
        torch.testing.assert_close(torch.from_numpy(stored(**{n: t.numpy() for n, t in zip(names, given)})), opt(*given).detach(), rtol=1e-5, atol=1e-5)
    tables = json.loads((where / "manifest.json").read_text())["tables"]
    assert {n: (t["rows"], t["dim"]) for n, t in tables.items()} == {
        "user.quotient": (18, DIM), "user.remainder": (40, DIM), "item.hashed": (31, DIM), "tags.base": (TAGS, 3), "seen.codebooks": (514, DIM // 2),
    }  # fmt: skip
