"""Find and load one of the package's C++ libraries (plain C functions, called through ctypes).

Libraries load after torch, so they share its OpenMP runtime and ``torch.set_num_threads`` holds for them too.
"""
from __future__ import annotations

import ctypes
import importlib.machinery
from collections.abc import Mapping, Sequence
from pathlib import Path


def load(folder: Path, version_function: str, version: int) -> tuple[ctypes.CDLL | None, str]:
    """The library ``_native`` in ``folder``, or None and why not; ``version_function`` must return ``version``."""
    found = [p for s in importlib.machinery.EXTENSION_SUFFIXES if (p := folder / f"_native{s}").exists()]
    if not found:
        return None, f"the C++ kernels were not built (no _native library in {folder}): install the package where a C++ compiler is"
    try:
        library = ctypes.CDLL(str(found[0]))
        built = getattr(library, version_function)()
    except (OSError, AttributeError) as error:
        return None, f"the C++ kernels did not load: {error}"
    if built != version:
        return None, f"{found[0]} was built from other sources (interface {built}, wanted {version}); install the package again"
    return library, ""


def declare(library: ctypes.CDLL, prefix: str, signatures: Mapping[str, tuple[type | None, Sequence[type]]]) -> None:
    """Say what the functions ``prefix`` + name of ``library`` return and take: ctypes types, by name."""
    for name, (result, arguments) in signatures.items():
        function = getattr(library, prefix + name)
        function.restype, function.argtypes = result, arguments
