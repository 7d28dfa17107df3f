"""`maskrcnn benchmark`."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import typer


def benchmark(context: typer.Context) -> None:
    """Measure latency and AP of every model file on every backend of this machine.

    The same program as benchmarks/run.py; its options: maskrcnn benchmark --help.
    """
    spec = find_spec("maskrcnn.benchmarks")
    assert spec is not None and spec.origin is not None  # part of the package
    # The programs import each other by module name, as if Python had started one of them.
    sys.path.insert(0, str(Path(spec.origin).parent))
    sys.argv[0] = "maskrcnn benchmark"  # shown in the usage line
    importlib.import_module("run").main(context.args)
