"""Row codecs: the bounds and the layout that ``kernels/codecs/op.py`` states, in every form."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tablewright.kernels.codecs import cpu
from tablewright.kernels.codecs.op import CODECS, DECODE, ENCODE, decode, encode, reference_decode, reference_encode, row_bytes

needs_library = pytest.mark.skipif(cpu._lib is None, reason=f"NOT TESTED: {cpu.describe()}")
FORMS = [pytest.param(None, id="PyTorch"), *(pytest.param(i, id=n, marks=needs_library) for i, n in enumerate(cpu._LEVELS))]


@pytest.fixture(params=FORMS)
def form(request):
    """(encode, decode): the reference, then the C++ kernels with each instruction set that this machine has."""
    if request.param is None:
        yield reference_encode, reference_decode
        return
    before = cpu._lib.twc_level(-1)
    if cpu._lib.twc_level(request.param) != request.param:
        pytest.skip("this processor does not have it")
    yield encode, decode
    cpu._lib.twc_level(before)


def through(form, rows, codec, dtype=torch.float32):
    payload = form[0](rows, codec)
    assert payload.dtype == torch.uint8 and payload.shape == (len(rows), row_bytes(codec, rows.shape[1]))
    return form[1](payload, codec, rows.shape[1], dtype)


def bound(rows, codec):
    """The largest error that the docstring allows, for each value, in float64."""
    x = rows.double()
    if codec == "int8":
        extent = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
        scale = (extent / 255).clamp_min(2.0**-126)
        return scale / 2 * (1 + 2.0**-18) + 2.0**-21 * x.abs().amax(1, keepdim=True)
    return {"fp16": x.abs() * 2.0**-11 + 2.0**-25, "bf16": x.abs() * 2.0**-8 + 2.0**-134, "fp32": 0 * x}[codec]


floats = st.floats(-(2.0**15), 2.0**15, width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1e-38, 1.0, 2.0**-130])
matrices = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 70)), elements=floats)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=60, deadline=None)
@given(matrices)
@example(np.zeros((2, 5), "f4"))
@example(np.array([[-65519.0, 65504.0]], "f4"))
def test_error_stays_within_the_bound(codec, values):
    rows = torch.from_numpy(values)
    for form in ((reference_encode, reference_decode), (encode, decode)):
        error = (through(form, rows, codec).double() - rows.double()).abs()
        assert (error <= bound(rows, codec)).all(), (error, bound(rows, codec))


@pytest.mark.parametrize("dim", [1, 2, 7, 15, 16, 17, 64, 100, 129])
def test_all_forms_make_the_same_bytes_and_the_same_values(form, dim):
    torch.manual_seed(dim)
    rows = torch.randn(70, dim) * torch.logspace(-44, 38, 70)[:, None]
    rows[3], rows[4], rows[5, 0], rows[6, -1], rows[7, 0] = 0, -2.5, torch.nan, -torch.inf, -0.0
    payload = form[0](rows, "int8")
    assert torch.equal(payload[:, :dim], reference_encode(rows, "int8")[:, :dim])
    tails = [p[:, dim:].contiguous().view(torch.float32) for p in (payload, reference_encode(rows, "int8"))]
    assert torch.equal(tails[0].nan_to_num(12345.0), tails[1].nan_to_num(12345.0))
    ours, plain = form[1](payload, "int8", dim, torch.float32), reference_decode(payload, "int8", dim, torch.float32)
    assert torch.equal(ours.nan_to_num(12345.0), plain.nan_to_num(12345.0))


def test_rows_of_one_value_and_least_values_are_exact(form):
    rows = torch.tensor([0.0, -0.0, 3.25, -1e-30, 1e38, 1e-45]).view(-1, 1).repeat(1, 9)
    assert torch.equal(through(form, rows, "int8"), rows)
    mixed = torch.randn(50, 12)
    at = mixed.argmin(1, keepdim=True)
    assert torch.equal(through(form, mixed, "int8").gather(1, at), mixed.gather(1, at))


def test_ties_go_to_even(form):
    """With least value 0 and largest 255 the scale is 1, so halves are ties."""
    rows = torch.tensor([[0.0, 0.5, 1.5, 2.5, 253.5, 254.5, 255.0]])
    assert through(form, rows, "int8").tolist() == [[0.0, 0.0, 2.0, 2.0, 254.0, 254.0, 255.0]]


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("codec", CODECS)
def test_nan_and_infinity_stay_visible(form, codec, bad):
    rows = torch.randn(3, 20)
    rows[1, 4] = bad
    out = through(form, rows, codec)
    assert out[::2].isfinite().all()
    if codec == "int8":
        assert out[1].isnan().all()
    else:
        assert torch.equal(out[1, 4].nan_to_num(7.0), rows[1, 4].nan_to_num(7.0)) and out[1].isfinite().sum() == 19


def test_what_fp16_cannot_hold_is_infinite():
    assert decode(encode(torch.tensor([[65519.9, 65520.0, -1e9]]), "fp16"), "fp16", 3).tolist() == [[65504.0, torch.inf, -torch.inf]]


def test_a_range_beyond_float32_decodes_to_nan(form):
    assert through(form, torch.tensor([[-3e38, 0.0, 3e38]]), "int8").isnan().all()


def test_numpy_reads_the_payload_as_documented():
    rows = torch.randn(6, 13)
    payload = encode(rows, "int8").numpy()
    codes, tail = payload[:, :13], np.ascontiguousarray(payload[:, 13:]).view("<f4")
    values = codes.astype("f4") * tail[:, :1] + tail[:, 1:]
    assert np.array_equal(values, decode(torch.from_numpy(payload), "int8", 13).numpy())
    assert np.array_equal(encode(rows, "fp16").numpy().view("<f2"), rows.half().numpy())
    assert np.array_equal(encode(rows, "fp32").numpy().view("<f4"), rows.numpy())
    assert torch.equal(encode(rows, "bf16").view(torch.bfloat16), rows.bfloat16())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_go_through_float32(codec, dtype):
    rows = torch.randn(5, 11, dtype=dtype)
    payload = encode(rows, codec)
    assert torch.equal(payload, encode(rows.float(), codec))
    assert torch.equal(decode(payload, codec, 11, dtype), decode(payload, codec, 11).to(dtype))


@pytest.mark.parametrize("codec", CODECS)
def test_strided_and_empty_rows(form, codec):
    wide = torch.randn(9, 40)
    for rows in (wide[:, 3:20], wide[::2], wide.t(), wide[:, ::3], wide[:0]):
        payload = form[0](rows, codec)
        assert torch.equal(payload, form[0](rows.contiguous(), codec))
        inside = torch.zeros(len(payload), payload.shape[1] + 5, dtype=torch.uint8)
        inside[:, 1:-4] = payload
        out = form[1](inside[:, 1:-4], codec, rows.shape[1], torch.float32)
        assert torch.equal(out, form[1](payload, codec, rows.shape[1], torch.float32)) and out.shape == rows.shape


def test_many_rows_over_threads(form):
    rows = torch.randn(5000, 40)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(through(form, rows, "int8"), reference_decode(reference_encode(rows, "int8"), "int8", 40, torch.float32))
    finally:
        torch.set_num_threads(before)


def test_results_share_no_memory_with_arguments():
    rows = torch.ones(2, 4)
    payload = encode(rows, "fp32")
    out = decode(payload, "fp32", 4)
    payload.zero_()
    assert torch.equal(out, rows) and torch.equal(rows, torch.ones(2, 4))


@pytest.mark.parametrize("codec", CODECS)
def test_the_ops(codec):
    rows = torch.randn(4, 6)
    torch.library.opcheck(ENCODE, (rows, codec), raise_exception=True)
    torch.library.opcheck(DECODE, (ENCODE(rows, codec), codec, 6, torch.bfloat16), raise_exception=True)
    both = torch.compile(lambda x: DECODE(ENCODE(x, codec), codec, 6, torch.float32), backend="aot_eager", fullgraph=True)
    assert torch.equal(both(rows), decode(encode(rows, codec), codec, 6))


def test_bad_input():
    rows = torch.randn(3, 4)
    with pytest.raises(ValueError, match="codec is 'int4'.*int8"):
        encode(rows, "int4")
    for other in (rows[0], rows[:, :0], rows.long()):
        with pytest.raises(ValueError, match=r"rows are .*\[n, dim\]"):
            encode(other, "fp16")
    payload = encode(rows, "int8")
    for call in (lambda: decode(payload, "int8", 5), lambda: decode(payload.float(), "int8", 4), lambda: decode(payload[0], "int8", 4)):
        with pytest.raises(ValueError, match="the payload is"):
            call()
    with pytest.raises(ValueError, match="floating"):
        decode(payload, "int8", 4, torch.int32)
    for run in (encode, ENCODE):
        with pytest.raises(RuntimeError, match="require a gradient"):
            run(rows.clone().requires_grad_(), "int8")
    with torch.no_grad():
        assert torch.equal(encode(rows.clone().requires_grad_(), "int8"), payload)
