"""TensorRT's timing cache in a file: how fast each implementation of a layer was when an engine was built before.

It makes later builds faster, above all those of the same model with other profiles. The file belongs to one version of
TensorRT and one GPU, as its name says; several builds may use it at the same time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from maskrcnn.files import atomic_path
from maskrcnn.plugins import cache
from maskrcnn.runtime.trt.library import Gpu


def timing_path(trt: Any, gpu: Gpu) -> Path:
    """The file for this TensorRT and this GPU, in `tensorrt` beside the cache of compiled plugins."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return cache.folder().parent / "tensorrt" / f"timing-{trt.__version__}-sm{gpu.arch}-{name}.cache"


def attach(config: Any, path: Path) -> None:
    """Gives a builder's configuration the file's entries; none where there is no file or one that does not fit."""
    for content in (_content(path), b""):
        timing = config.create_timing_cache(content)
        # A cache of another version or GPU is refused here, and an empty one takes its place.
        if timing is not None and config.set_timing_cache(timing, ignore_mismatch=False):
            return


def save(config: Any, path: Path) -> bool:
    """Writes the entries of a configuration and those that other builds have put into the file meanwhile.

    Returns:
        whether there was something to write.
    """
    timing = config.get_timing_cache()
    if timing is None:
        return False
    if content := _content(path):
        others = config.create_timing_cache(content)
        if others is not None:
            timing.combine(others, ignore_mismatch=False)
    with atomic_path(path) as draft:
        draft.write_bytes(timing.serialize())
    return True


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
