"""The user's own model after ``optimize``: the shell holds the same parameters and buffers, so what replaces one there must be
noticed. A buffer is followed, as ``model.double()`` replaces every one; a parameter or a submodule is an error.
"""
from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import CaptureError, explain

_HOMES = ("_parameters", "_buffers", "_modules")
_AGAIN = "load into the optimized model instead, or call optimize() again"


class Watched(NamedTuple):
    """One ``home`` ("_parameters", "_buffers" or "_modules") of one module of the user's: ``seen`` is what it held when it was last
    looked at (of parameters only the names), ``ours`` that of the shell, and ``first`` what ``ours`` held at first."""

    module: weakref.ref
    path: str
    home: str
    seen: dict[str, Any]
    ours: dict[str, Any]
    first: dict[str, Any]

    @property
    def expected(self) -> dict[str, Any]:
        """What the module holds if nothing was replaced: of parameters what is ours, as those may not come apart."""
        return self.ours if self.home == "_parameters" else self.seen


def watch(model: nn.Module, shell: nn.Module) -> list[Watched]:
    """All that the shell of ``model`` shares with it. Keeps nothing alive that ``model`` no longer holds."""
    modules, found = dict(shell.named_modules()), []
    for path, module in model.named_modules():
        for home in _HOMES:
            seen, ours = dict(module.__dict__[home]), modules[path].__dict__[home]
            if home == "_parameters":  # those that are shared: a table may be stored apart
                seen = dict.fromkeys(name for name, value in seen.items() if value is not None and ours.get(name) is value)
            if seen:
                first = weakref.WeakValueDictionary({n: v for n, v in ours.items() if v is not None})
                ref = weakref.ref(module, lambda _, seen=seen: seen.clear())
                found.append(Watched(ref, path, home, seen, ours, first))  # type: ignore[arg-type]
    return found


def follow(watched: list[Watched], strict: bool = True) -> tuple[bool, str]:
    """Put buffers that were replaced on the user's model into the shell. Returns whether there were any and, where one now has
    another shape, dtype or device, a sentence that says so: graphs were captured with the old one.

    Raises CaptureError, if ``strict``, for a parameter or submodule that was replaced and for a buffer that was taken away.
    """
    any_new, changed = False, ""
    for each in watched:
        module = each.module()
        if module is None or (each.home != "_buffers" and not strict):
            continue
        held = module.__dict__[each.home]
        for name in each.seen:
            now, before = held.get(name), each.expected.get(name)
            if now is before:
                continue
            path = f"{each.path}.{name}" if each.path else name
            ours = each.ours.get(name)
            if each.home != "_buffers":
                if ours is not None and ours is each.first.get(name) and not (each.home == "_modules" and now is None):
                    raise _replaced(each.home, path)
            elif ours is before:  # else ours by now: the graph, .to() or an assignment put it there
                if not isinstance(now, Tensor):
                    if not strict:
                        return any_new, changed
                    raise CaptureError(explain(f"buffer '{path}' of the plain model was taken away since optimize()", fix=_AGAIN))
                each.ours[name], any_new = now, True
                if before is None or (now.shape, now.dtype, now.device) != (before.shape, before.dtype, before.device):
                    changed = f"buffer '{path}' of the plain model was replaced by one of another shape, dtype or device"
        if each.home != "_parameters":
            each.seen.clear()
            each.seen.update(held)
    return any_new, changed


def _replaced(home: str, path: str) -> CaptureError:
    kind, how = ("submodule", "an assignment") if home == "_modules" else ("parameter", "an assignment, or load_state_dict(assign=True)")
    return CaptureError(
        f"{kind} '{path}' of the plain model was replaced by another object since optimize() ({how}), so the two no longer share "
        f"weights: {_AGAIN}"
    )
