"""Pickled NumPy arrays, read without running anything that stands in the file.

A pickle is a program: it names functions and calls them. This reader knows the few that rebuild arrays, and stops
at every other name before anything of that name is looked up.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.errors import UserError

SUFFIX = ".pkl"


def _encoded(text: str, encoding: str) -> bytes:
    """Stands for `_codecs.encode`, by which Python 3 writes bytes into pickles that Python 2 can read."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stands for `bytes`, which Python 3 calls so for empty ones; with an argument it could fill the memory."""
    return b""


# The first element of what pickle stores of an array, or a scalar, is the function that rebuilds it.
_REBUILDING = {
    "multiarray._reconstruct": np.zeros(1).__reduce__()[0],
    "numeric._frombuffer": np.zeros(1).__reduce_ex__(5)[0],
    "multiarray.scalar": np.float32(0).__reduce__()[0],
}
_ADMITTED = {
    "numpy.dtype": np.dtype,
    "numpy.ndarray": np.ndarray,
    **{f"numpy.core.{name}": function for name, function in _REBUILDING.items()},  # NumPy 1
    **{f"numpy._core.{name}": function for name, function in _REBUILDING.items()},  # NumPy 2
    "_codecs.encode": _encoded,
    "__builtin__.bytes": _no_bytes,
    "collections.OrderedDict": OrderedDict,
}


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that finds nothing but `_ADMITTED`; a path for its messages is all it knows besides."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file, encoding="latin1")  # as NumPy asks for arrays that Python 2 pickled
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle means by a name.

        Raises:
            UserError: for anything that arrays do not need.
        """
        found = _ADMITTED.get(f"{module}.{name}")
        if found is None:
            raise UserError(
                f"{self.path}: a pickle that calls {module}.{name}",
                "NumPy arrays, numbers, texts and containers, which need no such thing",
                "save plain arrays; a pickle can run any program, so be sure where this one comes from",
            )
        return found


def read_pickle(path: Path) -> Any:
    """What a file of pickled NumPy arrays in lists and dictionaries holds.

    Raises:
        UserError: when the file is missing, is no pickle, is cut short, or names any other class or function;
            nothing of it has been run then.
    """
    if not path.is_file():
        raise UserError(f"no file {path}", "a pickle of weights", "check the path given with --weights")
    try:
        with open(path, "rb") as file:
            return _ArraysOnly(file, path).load()
    except UserError:
        raise
    except Exception as error:  # a broken pickle can end in nearly any error
        raise UserError(
            f"{path}: not a whole pickle of NumPy arrays ({type(error).__name__}: {str(error)[:120]})",
            "a file such as Detectron2's model zoo has",
            "download it again and compare its size; a file of torch.save has the ending .pth",
        ) from error
