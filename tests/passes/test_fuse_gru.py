"""GRUs: which are taken, which stay with a reason, and that the model's numbers stay what they were."""
from __future__ import annotations

import pytest
import torch
from pass_harness import again, assert_sound, rewrite
from tablewright.passes.fuse_gru import FuseGru
from torch import nn

FUSE = FuseGru(measure=False)


class Session(nn.Module):
    """What a session-based recommender makes of its clicks: every state, or the last one."""

    def __init__(self, last: bool = False, given: bool = False, **how):
        super().__init__()
        self.gru, self.last = nn.GRU(6, 5, **how), last
        self.start = nn.Parameter(torch.randn(self.gru.num_layers, 1, 5)) if given else None

    def forward(self, x):
        batch = x.shape[0 if self.gru.batch_first else 1]
        states, last = self.gru(x) if self.start is None else self.gru(x, self.start.expand(-1, batch, -1))
        return last[-1] if self.last else states * 2


@pytest.mark.parametrize("batch", [7, 1])
@pytest.mark.parametrize(
    "how",
    [{"batch_first": True}, {}, {"num_layers": 2, "bias": False, "batch_first": True}, {"num_layers": 2, "last": True}, {"given": True, "last": True}],
    ids=str,
)
def test_taken(how, batch):
    torch.manual_seed(0)
    x = torch.randn(batch, 4, 6) if how.get("batch_first") else torch.randn(4, batch, 6)
    done = rewrite(Session(**how), (x,), FUSE)
    assert len(done.of("APPLIED")) == 1 and len(done.nodes("gru")) == 1
    assert str(done.nodes("gru")[0].target) == "tablewright.gru.default"
    assert_sound(done)


@pytest.mark.parametrize(
    ("how", "x", "why"),
    [
        ({"bidirectional": True}, torch.randn(4, 3, 6), "both directions"),
        ({"num_layers": 2, "dropout": 0.5}, torch.randn(4, 3, 6), "drops 0.5"),
        ({"dtype": torch.float64}, torch.randn(4, 3, 6, dtype=torch.float64), "torch.float64"),
    ],
    ids=["both ways", "dropout", "float64"],
)
@pytest.mark.filterwarnings("ignore:dropout option")
def test_others_stay_with_a_reason(how, x, why):
    done = rewrite(Session(**how), (x,), FUSE)
    (found,) = done.records
    assert found.status == "SKIPPED" and why in found.reason
    assert str(done.nodes("gru")[0].target) == "aten.gru.input"


def test_without_shapes():
    done = rewrite(Session(), (torch.randn(4, 3, 6),), FUSE, budget=0)
    for node in done.before.nodes:
        node.meta.pop("val", None)
    (found,) = again(done.shell, done.before, [], FUSE).records
    assert found.status == "SKIPPED" and "not known without sample_inputs" in found.reason


def test_budget():
    assert len(rewrite(Session(), (torch.randn(4, 3, 6),), FUSE, budget=0).of("DISABLED")) == 1
