"""Compressed interaction networks: two layers in every spelling, and convolutions that only look like one."""
from __future__ import annotations

import pytest
import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.fuse_cin import FuseCin
from torch import nn

FUSE = FuseCin(measure=False)
FIELDS, DIM = 4, 3


def by_einsum(x, y):
    return torch.einsum("bhd,bmd->bhmd", x, y).view(x.shape[0], -1, x.shape[2])


SPELLINGS = {
    "einsum (FuxiCTR)": by_einsum,
    "other letters, reshape (DeepCTR)": lambda x, y: torch.einsum("bij, bkj -> bikj", x, y).reshape(x.shape[0], x.shape[1] * y.shape[1], -1),
    "broadcast (pytorch-fm)": lambda x, y: (x.unsqueeze(2) * y.unsqueeze(1)).view(x.size(0), x.size(1) * y.size(1), x.size(2)),
    "sizes of the products": lambda x, y: (z := x.unsqueeze(2) * y.unsqueeze(1)).view(z.shape[0], z.shape[1] * z.shape[2], z.shape[3]),
    "broadcast, other side": lambda x, y: (y[:, None] * x[:, :, None]).flatten(1, 2),
}


class Network(nn.Module):
    """Two layers; half of the first one's outputs go on, the other half out, as in the paper."""

    def __init__(self, products, **conv):
        super().__init__()
        self.products = products
        self.first, self.second = nn.Conv1d(FIELDS * FIELDS, 6, 1), nn.Conv1d(FIELDS * 3, 5, **{"kernel_size": 1, **conv})

    def forward(self, x):
        out, following = self.first(self.products(x, x)).relu().split(3, 1)
        return torch.cat([out.sum(2), self.second(self.products(x, following)).sum(-1)], 1)


@pytest.mark.parametrize("batch", [5, 1])
@pytest.mark.parametrize("products", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(products, batch):
    torch.manual_seed(0)
    done = rewrite(Network(products), (torch.randn(batch, FIELDS, DIM),), FUSE)
    assert len(done.of("APPLIED")) == 2 and len(done.nodes("cin_layer")) == 2
    assert not any(done.nodes(name) for name in ("conv1d", "einsum", "mul"))
    assert_sound(done)


@pytest.mark.parametrize("products", SPELLINGS.values(), ids=SPELLINGS)
def test_timed_at_a_training_batch(products):
    """Sizes that the views ask for do not tie the timing to the sample's batch."""
    done = rewrite(Network(products), (torch.randn(5, FIELDS, DIM),), FuseCin())
    assert all(t.rows == 2048 for t in done.context.timings.values()) and len(done.context.timings) == 2


def test_without_bias():
    done = rewrite(Network(by_einsum, bias=False), (torch.randn(5, FIELDS, DIM),), FUSE)
    assert len(done.nodes("cin_layer")) == 2
    assert_sound(done)


@pytest.mark.parametrize("conv", [{"kernel_size": 3}, {"kernel_size": 1, "groups": 1, "padding": 1}, {"stride": 2}], ids=str)
def test_other_convolutions_stay(conv):
    done = rewrite(Network(by_einsum, **conv), (torch.randn(5, FIELDS, DIM),), FUSE)
    assert len(done.of("APPLIED")) == 1 and len(done.nodes("conv1d")) == 1
    assert "not of width 1" in done.of("SKIPPED")[0].reason
    assert_sound(done)


class LookAlike(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.how = nn.Conv1d(FIELDS * FIELDS, 2, 1), how

    def forward(self, x):
        return self.how(x, self.conv)


@pytest.mark.parametrize(
    "how",
    [
        lambda x, conv: conv(z := by_einsum(x, x)).sum(1) + z.sum(1),
        lambda x, conv: conv(torch.einsum("bhd,bmd->bmhd", x, x.exp()).flatten(1, 2)),
        lambda x, conv: conv(torch.einsum("bhd,bmd->bhmd", x, x).transpose(1, 3).reshape(len(x), -1, DIM)),
        lambda x, conv: by_einsum(x, x).relu(),
    ],
    ids=["the products are read again", "other order", "transposed", "no convolution"],
)
def test_look_alikes(how):
    torch.manual_seed(0)
    done = rewrite(LookAlike(how), (torch.randn(5, FIELDS, DIM),), FUSE)
    assert not done.nodes("cin_layer")
    assert_sound(done)


def test_budget_and_missing_inputs():
    assert len(rewrite(Network(by_einsum), (torch.randn(4, FIELDS, DIM),), FUSE, budget=1).of("DISABLED")) == 1
    assert not rewrite(Network(by_einsum), None, FUSE).of("APPLIED")
