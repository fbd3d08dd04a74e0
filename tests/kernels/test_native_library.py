"""A library that is missing, broken or built from other sources is not used, and who built one hears of it."""
from __future__ import annotations

import importlib.machinery
import warnings
from pathlib import Path

import pytest
from tablewright.kernels.native_library import load

NAME = "_native" + importlib.machinery.EXTENSION_SUFFIXES[0]


def test_where_none_was_built_nothing_is_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library, why_not = load(tmp_path, "any_abi", 1)
    assert library is None and "not built" in why_not


def test_one_that_does_not_load_is_warned_of(tmp_path):
    (tmp_path / NAME).write_bytes(b"no library")
    with pytest.warns(RuntimeWarning, match="did not load.*slower"):
        library, why_not = load(tmp_path, "any_abi", 1)
    assert library is None and "did not load" in why_not


def test_one_of_other_sources_is_warned_of():
    from tablewright.kernels.embedding import cpu

    folder = Path(cpu.__file__).parent
    if load(folder, "tw_abi", cpu._ABI)[0] is None:
        pytest.skip("NOT TESTED: the C++ kernels were not built")
    with pytest.warns(RuntimeWarning, match="built from other sources.*wanted -1.*install the package again.*slower"):
        library, why_not = load(folder, "tw_abi", -1)
    assert library is None and "other sources" in why_not
