"""Which GPU is the calling thread's: ours for as long as we work on it, and afterwards what it was before.

CUDA works on the context that is current in the calling thread. Ours is bound through the driver, and so is what was
there before: going back with cudaSetDevice would make a context on GPU 0, with all the memory that this takes, for a
caller who had none, and would replace the context of one who made his own, as PyCUDA does.

Source: CUDA Driver API, context management; CUDA Runtime API, interactions with the CUDA Driver API.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.runtime.backend import missing_library


def import_driver() -> Any:
    """The module `cuda.bindings.driver`.

    Raises:
        UserError: where it is not installed.
    """
    return import_bindings("driver")


def import_bindings(name: str) -> Any:
    """A module of `cuda.bindings`.

    Raises:
        UserError: where it is not installed.
    """
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        install = "pip install 'cuda-bindings>=12.6'"
        raise missing_library("cuda-bindings", "use a GPU's memory", install) from error


@contextmanager
def bound(driver: Any, context: Any) -> Iterator[None]:
    """Lets the calling thread work in a context of the driver, and then in its own again, if it had one.

    Raises:
        RuntimeError: where CUDA is lost.
    """
    before = _current(driver)
    status = driver.cuCtxSetCurrent(context)[0]
    if int(status) != 0:
        came = f"cuCtxSetCurrent answers {status.name}"
        raise RuntimeError(f"came: {came}; expected: success; do: start the program anew")
    try:
        yield
    finally:
        driver.cuCtxSetCurrent(before)


@contextmanager
def as_before() -> Iterator[None]:
    """Whatever is done inside, the calling thread's GPU is afterwards the one that it was.

    For libraries that choose a GPU and leave it chosen. Without cuda-bindings or a driver nothing is done about it.
    """
    try:
        driver = import_driver()
        before = _current(driver)
    except (UserError, RuntimeError):  # the bindings look for the driver's library at the first call
        driver = before = None
    try:
        yield
    finally:
        if driver is not None:
            driver.cuCtxSetCurrent(before)


def _current(driver: Any) -> Any:
    """The calling thread's context, or a null one, as before the driver is initialised."""
    status, context = driver.cuCtxGetCurrent()
    return context if int(status) == 0 else driver.CUcontext(0)
