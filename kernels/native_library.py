"""Find and load one of the package's C++ libraries (plain C functions, called through ctypes).

Libraries load after torch, so they share its OpenMP runtime and ``torch.set_num_threads`` holds for them too.
"""
from __future__ import annotations

import ctypes
import importlib.machinery
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path


def load(folder: Path, version_function: str, version: int) -> tuple[ctypes.CDLL | None, str]:
    """The library ``_native`` in ``folder``, or None and why not; ``version_function`` must return ``version``. One that is there and of no use is
    warned of too: nobody built it to run on slower PyTorch instead."""
    found = [p for s in importlib.machinery.EXTENSION_SUFFIXES if (p := folder / f"_native{s}").exists()]
    if not found:
        return None, f"the C++ kernels were not built (no _native library in {folder}): install the package where a C++ compiler is"
    try:
        library = ctypes.CDLL(str(found[0]))
        built = getattr(library, version_function)()
    except (OSError, AttributeError) as error:
        why_not = f"the C++ kernels did not load: {error}"
    else:
        if built == version:
            return library, ""
        why_not = f"{found[0]} was built from other sources (interface {built}, wanted {version}); install the package again"
    warnings.warn(f"{why_not}. Until then PyTorch does its work, slower; tiers and dynamic ids cannot do without theirs", RuntimeWarning, stacklevel=2)
    return None, why_not


def declare(library: ctypes.CDLL, prefix: str, signatures: Mapping[str, tuple[type | None, Sequence[type]]]) -> None:
    """Say what the functions ``prefix`` + name of ``library`` return and take: ctypes types, by name."""
    for name, (result, arguments) in signatures.items():
        function = getattr(library, prefix + name)
        function.restype, function.argtypes = result, arguments
