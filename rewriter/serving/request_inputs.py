"""Is a request one that the model takes? Checked against the manifest before anything is looked up. numpy only."""
from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...kernels.errors import InputError, InputTypeError

BATCH = "batch"


class Inputs:
    """The inputs of one version. ``described``: the manifest's list; ``shared``: names whose batch may be 1 beside a larger one."""

    def __init__(self, described: Sequence[Mapping[str, Any]], shared: Sequence[str] = ()) -> None:
        self._all = [
            (d["name"], np.dtype(d["dtype"]), tuple(_size(s, f"{d['name']}_{i}") for i, s in enumerate(d["shape"])),
             {int(k): v for k, v in d.get("least", {}).items()}) for d in described
        ]  # fmt: skip
        self._names = {d["name"] for d in described}
        self._shared = set(shared)

    def checked(self, given: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], int | None, bool]:
        """Arrays of the model's dtypes, the batch size (``None``: no input has it), and whether the shared inputs are given once for
        the whole batch. Raises :class:`InputError` or :class:`InputTypeError` naming the input."""
        if given.keys() != self._names:
            self._wrong_names(given)
        arrays: dict[str, np.ndarray] = {}
        sizes: dict[str, tuple[int, str]] = {}
        single: tuple[int, str] | None = None
        for name, dtype, shape, least in self._all:
            array = given[name]
            if type(array) is not np.ndarray or array.dtype is not dtype:
                array = _cast(array, dtype, name)
            if array.ndim != len(shape):
                raise InputError(f"input '{name}' has shape {list(array.shape)}; {_text(shape)} was needed")
            for axis, (size, wanted) in enumerate(zip(array.shape, shape)):
                if type(wanted) is int:
                    if size != wanted:
                        raise InputError(f"input '{name}' has shape {list(array.shape)}; {_text(shape)} was needed")
                    continue
                if size < least.get(axis, 0):
                    raise InputError(f"input '{name}' has shape {list(array.shape)}; dimension {axis} must be {least[axis]} at least")
                if wanted == BATCH and name in self._shared:
                    if single is not None and single[0] != size:
                        raise InputError(f"inputs '{single[1]}' and '{name}' have {single[0]} and {size} rows; shared inputs have the same number")
                    single = (size, name)
                    continue
                if " + " in wanted:  # "batch + 1": offsets that end with the number of ids
                    wanted, more = wanted.split(" + ")
                    size -= int(more)
                known = sizes.setdefault(wanted, (size, name))
                if known[0] != size:
                    what = "rows" if wanted == BATCH else f"as '{wanted}'"
                    raise InputError(f"inputs '{known[1]}' and '{name}' have {known[0]} and {size} {what}; they must be equal")
            arrays[name] = array if array.flags.c_contiguous else np.ascontiguousarray(array)
        batch = sizes[BATCH][0] if BATCH in sizes else None
        if single is None:
            return arrays, batch, False
        if batch is None or single[0] == batch:
            return arrays, single[0], False
        if single[0] != 1:
            raise InputError(f"shared input '{single[1]}' has {single[0]} rows beside a batch of {batch}; it must have 1 or {batch}")
        return arrays, batch, True

    def _wrong_names(self, given: Mapping[str, Any]) -> None:
        missing, extra = [n for n, *_ in self._all if n not in given], [n for n in given if n not in self._names]
        said = [f"input '{n}' is missing" for n in missing]
        for name in extra:
            close = difflib.get_close_matches(name, self._names, n=1)
            said.append(f"there is no input '{name}'" + (f" (did you mean '{close[0]}'?)" if close else ""))
        raise InputError(f"{'; '.join(said)}. The model's inputs: {', '.join(n for n, *_ in self._all)}")


def _cast(value: Any, dtype: np.dtype, name: str) -> np.ndarray:
    """``value`` as an array of ``dtype`` where nothing is lost by it."""
    plain = not hasattr(value, "dtype")  # lists of Python numbers have no dtype that could be wrong
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"input '{name}' is not an array: {error}") from None
    kind, wanted = array.dtype.kind, dtype.kind
    if array.size == 0 and plain:
        return array.astype(dtype)
    if wanted in "iu" and kind in "iu":
        if array.size and not np.can_cast(array.dtype, dtype):
            limits = np.iinfo(dtype)
            if int(array.max()) > limits.max or int(array.min()) < limits.min:
                raise InputTypeError(f"input '{name}' holds numbers that {dtype} does not; the model takes {dtype}")
        return array.astype(dtype)
    if wanted == "f" and (kind in "iu" and plain or kind == "f" and (plain or np.can_cast(array.dtype, dtype))):
        return array.astype(dtype)
    if wanted == kind:
        if array.dtype == dtype:
            return array  # another object for the same dtype
    raise InputTypeError(f"input '{name}' is {array.dtype}; the model takes {dtype}, and it cannot be cast without loss. Pass {dtype}")


def _size(size: Any, free: str) -> Any:
    """A number, a name, or "name + number"; any other expression only says that the size is free."""
    return size if type(size) is int or re.fullmatch(r"\w+( \+ \d+)?", size) else f"{free} (free)"


def _text(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"
