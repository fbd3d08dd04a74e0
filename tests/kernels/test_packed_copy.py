"""Tensors of a batch in one buffer: the same values, dtypes and shapes, whatever they were."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tablewright.kernels.packed_copy import ALIGNMENT, Arriving, can_pack, pack, unpack

DTYPES = [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


def _values(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 100, (*shape,), generator=generator)
    return (bits > 50) if dtype == torch.bool else bits.to(dtype)


def _check(tensors):
    buffer, places = pack(tensors)
    copy = buffer.clone()
    buffer.zero_()  # what is read lies in the copy
    for made, wanted in zip(unpack(copy, places), tensors, strict=True):
        assert made.dtype == wanted.dtype and made.shape == wanted.shape and torch.equal(made, wanted)
        assert made.is_contiguous() and (not made.numel() or (made.data_ptr() - copy.data_ptr()) % ALIGNMENT == 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_any_dtypes_and_shapes(asked):
    _check([_values(shape, dtype, i) for i, (dtype, shape) in enumerate(asked)])


def test_layouts_that_are_not_contiguous():
    base = torch.arange(60).reshape(3, 4, 5)
    _check([base.permute(2, 0, 1), base[:, ::2], base[1:].flip(0), torch.tensor(3.0).expand(4, 5), base[0, 0, :0], torch.empty(0, 3)[:, 1]])


def test_a_write_to_one_is_no_write_to_another():
    made = Arriving([torch.ones(3), torch.ones(3)], torch.device("cpu")).tensors
    before = made[1]._version
    made[0].add_(1)
    assert made[1]._version == before and made[1].tolist() == [1, 1, 1] and made[0].tolist() == [2, 2, 2]


def test_gradients_flow_past_what_was_unpacked():
    x, y = Arriving([torch.ones(3), torch.full((3,), 2.0)], torch.device("cpu")).tensors
    weight = torch.ones(3, requires_grad=True)
    product = weight * y
    x.mul_(5)  # beside y in memory, saved for the backward: no error, and y is what it was
    product.sum().backward()
    assert weight.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, requires_grad=True), torch.ones(2, device="meta"), torch.ones(2).to_sparse(), torch.nn.Parameter(torch.ones(2)), torch.ones(2, dtype=torch.complex64).conj(), 3]
)
def test_what_is_no_plain_tensor_of_the_cpu_is_not_packed(tensor):
    assert not can_pack(tensor) and can_pack(torch.ones(2))
