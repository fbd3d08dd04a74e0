"""Capture: a plain nn.Module becomes an FX graph of ATen ops, the guards under which it holds, and a live way to run it."""
from .frontend import Captured, capture, verify
from .guards import Guards
from .shell import attach, clone_shell, deep_copy
from .turns import CAPTURING

__all__ = ["CAPTURING", "Captured", "Guards", "attach", "capture", "clone_shell", "deep_copy", "verify"]
