"""Detection in a stream of images. Reading, inference and finishing overlap; results are returned in order.

Threads read images ahead within a window. Only images of one size form a batch, so batching adds no padding. Other
threads finish the detections (drawing, run lengths). NumPy, Pillow and the runtimes release the GIL while they work.
Memory depends on the window and the sizes of its images, not on the total number of images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from maskrcnn.data.images import ImageNotes
from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Detections

if TYPE_CHECKING:
    from maskrcnn.data.sources import ImageItem
    from maskrcnn.runtime.detector import Detector

_WINDOW_BYTES = 1 << 29  # limit of decoded images in memory; exceeded only by a single larger image

T = TypeVar("T")


@dataclass(eq=False)
class _Entry(Generic[T]):
    """An image being processed."""

    item: ImageItem
    image: Future[np.ndarray]
    orientation: int = 1
    notes: ImageNotes = field(default_factory=ImageNotes)
    outcome: Future[T] = field(default_factory=Future)
    is_started: bool = False

    def bytes(self) -> int:
        """Size of the pixels, if known."""
        done = self.image.done() and not self.image.cancelled() and self.image.exception() is None
        return self.image.result().nbytes if done else 0


def detect_images(
    detector: Detector,
    items: Iterable[ImageItem],
    finish: Callable[[ImageItem, np.ndarray, int, Detections], T],
    *,
    batch: int = 1,
    calls: int = 1,
    threads: int = 2,
) -> Iterator[tuple[ImageItem, T | UserError]]:
    """Yields each item with the result of `finish` for its detections, in the order of the items.

    Args:
        detector: the loaded model.
        items: images, read as needed.
        finish: called in any thread with the item, its pixels, its EXIF orientation and its detections.
        batch: maximum number of images per model call; a batch contains only images of the same size.
        calls: number of concurrent model calls.
        threads: number of threads that read and finish images.

    Yields:
        The item, and the result or the error of the image: an error if the file cannot be read or does not fit the
        model. Losses while reading are counted in `detector.notes`.
    """
    window = 2 * (threads + calls * batch)
    order: deque[_Entry[T]] = deque()
    readers = ThreadPoolExecutor(threads, "maskrcnn-images")
    finishers = ThreadPoolExecutor(threads, "maskrcnn-finish")
    models = ThreadPoolExecutor(calls, "maskrcnn-detect")
    source = iter(items)
    try:
        is_open = True
        while True:
            while is_open and len(order) < window and (not order or sum(e.bytes() for e in order) < _WINDOW_BYTES):
                item = next(source, None)
                if item is None:
                    is_open = False
                    break
                entry: _Entry[T] = _Entry(item, Future())
                order.append(entry)
                readers.submit(_read, detector, entry)
            if not order:
                return
            waiting = [entry for entry in order if not entry.is_started]
            # Keep the model busy: a batch is complete when the window has no more images of its size.
            while waiting and (order[0] is waiting[0] or sum(e.is_started for e in order) < calls * batch * 2):
                group = _next_batch(waiting, batch)
                for entry in group:
                    entry.is_started = True
                waiting = [entry for entry in waiting if not entry.is_started]
                if group:
                    models.submit(_detect, detector, group, finish, finishers)
            entry = order[0]
            error = entry.outcome.exception()  # waits
            order.popleft()
            for kind, count in entry.notes.counts.items():
                detector.notes.counts[kind] += count
                detector.notes.examples.setdefault(kind, entry.notes.examples[kind])
            if error is not None and not isinstance(error, UserError):
                raise error
            yield entry.item, error if isinstance(error, UserError) else entry.outcome.result()
    finally:
        for pool in (readers, models, finishers):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (readers, models, finishers):
            pool.shutdown(wait=True)


def _read(detector: Detector, entry: _Entry[T]) -> None:
    """Reads the image of an entry; a failure is stored as its outcome."""
    try:
        image, entry.orientation = entry.item.read(detector.preprocessing, entry.notes)
        entry.image.set_result(image)
    except BaseException as error:
        entry.image.set_exception(error)


def _next_batch(waiting: list[_Entry[T]], batch: int) -> list[_Entry[T]]:
    """The first waiting images of one size, [] if the first cannot be read; waits until they are read."""
    group: list[_Entry[T]] = []
    for entry in waiting:
        if error := entry.image.exception():
            entry.outcome.set_exception(error)
            entry.is_started = True
        elif not group or entry.image.result().shape == group[0].image.result().shape:
            group.append(entry)
        if len(group) == batch:
            break
    return group


def _detect(
    detector: Detector,
    group: list[_Entry[T]],
    finish: Callable[[ImageItem, np.ndarray, int, Detections], T],
    finishers: ThreadPoolExecutor,
) -> None:
    """Detects in the images of a group; if that fails, in each image separately."""
    try:
        found = detector.detect([entry.image.result() for entry in group])
    except UserError as error:
        if len(group) == 1:
            group[0].outcome.set_exception(error)
        for entry in group if len(group) > 1 else ():
            _detect(detector, [entry], finish, finishers)
        return
    except BaseException as error:
        for entry in group:
            entry.outcome.set_exception(error)
        return
    for entry, detections in zip(group, found, strict=True):
        with suppress(RuntimeError):  # the pool is shut down after an interruption
            finishers.submit(_finish, entry, detections, finish)


def _finish(
    entry: _Entry[T], detections: Detections, finish: Callable[[ImageItem, np.ndarray, int, Detections], T]
) -> None:
    try:
        entry.outcome.set_result(finish(entry.item, entry.image.result(), entry.orientation, detections))
    except BaseException as error:
        entry.outcome.set_exception(error)
