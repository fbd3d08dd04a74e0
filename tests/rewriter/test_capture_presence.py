"""What Python asks of a model besides the values of its attributes: their order, and whether they are there."""
from collections import OrderedDict

import pytest
import tablewright as tw
import torch
from torch import nn


def ids():
    return torch.randint(0, 20, (5, 3))


class Ordered(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.table, self.weights = nn.Embedding(20, 4), weights

    def forward(self, ids):
        x = self.table(ids).sum(1)
        x = x * next(iter(self.weights.values()))
        return x + 1 if hasattr(self, "bias") else x


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_the_order_of_a_dict_is_guarded(kind):
    model, given = Ordered(kind(a=2.0, b=3.0)), ids()
    opt = tw.optimize(model, sample_inputs=(given,))
    torch.testing.assert_close(opt(given), model(given))
    model.weights["a"] = model.weights.pop("a")
    torch.testing.assert_close(opt(given), model(given))
    model.weights["b"] = 5.0
    torch.testing.assert_close(opt(given), model(given))


def test_an_attribute_that_was_missing_is_guarded():
    model, given = Ordered({"a": 2.0}), ids()
    opt = tw.optimize(model, sample_inputs=(given,))
    torch.testing.assert_close(opt(given), model(given))
    model.bias = True
    torch.testing.assert_close(opt(given), model(given))
    del model.bias
    torch.testing.assert_close(opt(given), model(given))


def test_more_forms_than_are_captured_run_plainly():
    model, given = Ordered({"a": 1.0}), ids()
    opt = tw.optimize(model, sample_inputs=(given,))
    with pytest.warns(UserWarning, match="run plainly"):
        for number in range(20):
            model.weights["a"] = float(number)
            torch.testing.assert_close(opt(given), model(given))
    assert "something that Python reads changes at every call" in str(opt.report)
