"""PyTorch → ONNX, and passes over the ONNX graph. It passes only files to `maskrcnn.runtime`.

The package itself is callable: `maskrcnn.export(...)` is `maskrcnn.api.export.export`, the command `maskrcnn export`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """`maskrcnn.export` is both the name of this package and of the API function."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Exports a model to ONNX, see `maskrcnn.api.export.export`."""
        return importlib.import_module("maskrcnn.api.export").export(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
