"""The errors a person meets. Each message says what happened, where (module path, file:line), why, and what to do."""
from __future__ import annotations

import difflib

from ..kernels.errors import InBackwardError as InBackwardError
from ..kernels.errors import TablewrightError as TablewrightError


class CaptureError(TablewrightError):
    """The model cannot be turned into a graph that is sure to compute the same thing."""


class PlanError(TablewrightError):
    """A plan that does not fit: an unknown key or pass, a table pattern that matches nothing, a refused combination."""


class PassError(TablewrightError):
    """A rewrite could not be carried out where nothing may be rolled back."""


class VerifyError(TablewrightError):
    """A rewritten graph is not the plain model any more."""


class ExportError(TablewrightError):
    """A serving artifact cannot be written or read."""


def explain(what: str, *, where: str = "", why: str = "", fix: str = "") -> str:
    """The one form of message: what happened, where, why, what to do. Empty parts are left out."""
    parts = [f"{what} at {where}" if where else what]
    if why:
        parts.append(f"Why: {why}")
    if fix:
        parts.append(f"What to do: {fix}")
    return ". ".join(part.rstrip(".") for part in parts) + "."


def nearest(name: str, known) -> str:
    """`` (did you mean 'x'?)`` for a misspelt ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
