"""``python -m tablewright``: see :mod:`tablewright.rewriter.cli`."""
from .rewriter.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
