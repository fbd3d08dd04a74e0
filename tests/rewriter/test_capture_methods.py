"""``optimize(..., methods=[...])``: methods besides forward are rewritten too, the others run plainly, all on the same weights."""
import copy
import io

import pytest
import tablewright as tw
import torch
from tablewright.kernels.embedding.op import OP
from tablewright.rewriter.errors import InBackwardError, PlanError
from torch import nn


class Interaction:
    """A batch as dataset packages make it: columns by name, in a class of their own."""

    def __init__(self, columns):
        self.interaction = columns

    def __getitem__(self, name):
        return self.interaction[name]


class Ranking(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(50, 8), nn.Embedding(70, 8)
        self.regular = 0.01

    def forward(self, user, item):
        return self.user(user), self.item(item)

    def calculate_loss(self, batch):
        user, good = self.forward(batch["user"], batch["item"])
        bad = self.item(batch["bad"])
        self.margin = (user * good).sum(-1) - (user * bad).sum(-1)
        return -nn.functional.logsigmoid(self.margin).mean() + self.regular * user.pow(2).sum()

    def predict(self, batch):
        """Scores of pairs."""
        user, item = self.forward(batch["user"], batch["item"])
        return (user * item).sum(-1)

    def everything(self, batch):
        return self.user(batch["user"]) @ self.item.weight.t()

    def describe(self, what: str = "model") -> str:
        return f"{what} of {self.item.num_embeddings} items"


def batch(rows=8, cls=Interaction):
    return cls({"user": torch.randint(0, 50, (rows,)), "item": torch.randint(0, 70, (rows,)), "bad": torch.randint(0, 70, (rows,))})


def fused(opt, entry):
    return sum(node.target is OP for v in opt._variants if v.captured.entry == entry for g in v.graphs for node in g.nodes)


@pytest.mark.parametrize("cls", [Interaction, dict])
def test_training_through_a_method(cls):
    model = Ranking()
    plain = copy.deepcopy(model)
    theirs = torch.optim.Adagrad(plain.parameters(), lr=0.1)
    given = batch(cls=cls)
    opt, mine = tw.optimize(
        model, optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1), methods=["calculate_loss", "predict"],
        sample_inputs={"forward": (given["user"], given["item"]), "calculate_loss": (given,), "predict": (given,)})
    assert [v.captured.entry for v in opt._variants] == ["forward", "calculate_loss", "predict"]
    assert all(fused(opt, entry) for entry in ("forward", "calculate_loss", "predict"))
    assert opt.report.coverage["updates"] == (2, 2) and "calculate_loss(): captured by" in str(opt.report)
    for rows in (8, 5, 1):
        given = batch(rows, cls)
        for each, optim in ((plain, theirs), (opt, mine)):
            optim.zero_grad()
            each.calculate_loss(given).backward()
            optim.step()
        torch.testing.assert_close(opt.user.weight, plain.user.weight)
        torch.testing.assert_close(opt.item.weight, plain.item.weight)
        torch.testing.assert_close(opt.margin, plain.margin)
        torch.testing.assert_close(opt.predict(given), plain.predict(given))
        torch.testing.assert_close(opt(given["user"], given["item"]), plain(given["user"], given["item"]))
    assert opt.user.weight.grad.is_sparse


def test_unnamed_methods_run_plainly_on_the_shared_weights():
    model = Ranking()
    given = batch()
    opt, optim = tw.optimize(model, optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1), sample_inputs=(given["user"], given["item"]))
    plain = copy.deepcopy(model)
    theirs = torch.optim.Adagrad(plain.parameters(), lr=0.1)
    torch.testing.assert_close(opt.predict(given), plain.predict(given))
    assert opt.describe() == "model of 70 items" and opt.describe(what="table") == "table of 70 items"
    for _ in range(2):  # a dense gradient, through an optimizer that expects a sparse one; then both kinds in one step
        for each, step in ((plain, theirs), (opt, optim)):
            step.zero_grad()
            user, item = each(given["user"], given["item"])
            (each.calculate_loss(given) + (user * item).sum()).backward()
            step.step()
        torch.testing.assert_close(opt.item.weight, plain.item.weight)
        torch.testing.assert_close(opt.everything(given), plain.everything(given))


def test_the_inputs_of_forward_serve_a_method_that_takes_them():
    class Same(Ranking):
        def score(self, user, item):
            return (self.user(user) * self.item(item)).sum(-1)

    model = Same()
    given = batch()
    pair = given["user"], given["item"]
    opt = tw.optimize(model, methods=["score", "predict"], sample_inputs=pair)
    assert fused(opt, "score") and not fused(opt, "predict")
    assert "predict() has no sample inputs: it is captured at its first call" in str(opt.report)
    torch.testing.assert_close(opt.predict(given), model.predict(given))
    assert fused(opt, "predict")
    torch.testing.assert_close(opt.score(*pair), model.score(*pair))
    torch.testing.assert_close(opt.score(item=pair[1], user=pair[0]), model.score(*pair))


def test_forward_without_inputs_of_its_own():
    model = Ranking()
    opt = tw.optimize(model, methods=["calculate_loss"], sample_inputs={"calculate_loss": (batch(),)})
    given = batch()
    torch.testing.assert_close(opt.calculate_loss(given), model.calculate_loss(given))
    torch.testing.assert_close(opt(given["user"], given["item"]), model(given["user"], given["item"]))


def test_modes_copies_and_files():
    model = Ranking()
    opt = tw.optimize(model, methods=["predict"], sample_inputs={"predict": (batch(cls=dict),)})
    given = batch(cls=dict)
    expected = model.predict(given).detach()
    twin = copy.deepcopy(opt)
    file = io.BytesIO()
    torch.save(opt, file)
    with torch.no_grad():
        model.item.weight.zero_()
    assert not opt.predict(given).any()
    torch.testing.assert_close(twin.predict(given), expected)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded.predict(given), expected)
    assert loaded.predict.__doc__ == "Scores of pairs." and fused(loaded, "predict")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval().predict(given), expected)


def test_an_attribute_that_a_method_read_is_guarded():
    model = Ranking()
    given = batch(cls=dict)
    opt = tw.optimize(model, methods=["calculate_loss"], sample_inputs={"calculate_loss": (given,)})
    model.regular = 0.5
    torch.testing.assert_close(opt.calculate_loss(given), model.calculate_loss(given))


def test_names_that_are_no_methods():
    given = batch()
    with pytest.raises(PlanError, match="methods names 'predicts', which is no method of Ranking.*did you mean 'predict'"):
        tw.optimize(Ranking(), methods=["predicts"], sample_inputs=(given["user"], given["item"]))
    with pytest.raises(PlanError, match="no method"):
        tw.optimize(Ranking(), methods=["state_dict"], sample_inputs=(given["user"], given["item"]))


def test_in_the_backward_with_methods():
    plan = tw.Plan(embedding_optimizer=tw.RowwiseAdagrad(lr=0.1, in_backward=True))
    model = Ranking()
    given = batch(cls=dict)
    opt = tw.optimize(model, plan, methods=["calculate_loss"], sample_inputs={"calculate_loss": (given,)})
    before = model.user.weight.detach().clone()
    opt.calculate_loss(given).backward()
    changed = (model.user.weight != before).any(1).nonzero().flatten()
    assert set(changed.tolist()) == set(given["user"].tolist())
    with pytest.raises(InBackwardError, match="name it in optimize"):
        opt.predict(given)
    with torch.no_grad():
        torch.testing.assert_close(opt.predict(given), model.predict(given))
    assert opt.describe()
