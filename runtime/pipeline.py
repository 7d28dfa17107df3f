"""Detection in a stream of images: reading, detecting and finishing overlap, results come out in order.

Threads read images ahead, within a window; images of one size form a batch, so that a batch is padded no more than its
images alone; other threads finish what was detected (drawing, run lengths). NumPy, Pillow and the runtimes release
Python's lock while they work. Memory depends on the window and the sizes of its images, not on their number.
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

_WINDOW_BYTES = 1 << 29  # of decoded images; more are read only where one alone is larger

T = TypeVar("T")


@dataclass(eq=False)
class _Entry(Generic[T]):
    """An image on its way."""

    item: ImageItem
    image: Future[np.ndarray]
    orientation: int = 1
    notes: ImageNotes = field(default_factory=ImageNotes)
    outcome: Future[T] = field(default_factory=Future)
    is_started: bool = False

    def bytes(self) -> int:
        """Of its pixels, as far as they are known."""
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
    """Yields each item with what `finish` made of its detections, in the order of the items.

    Args:
        detector: the loaded model.
        items: images, read as needed.
        finish: called in any thread with the item, its pixels, its EXIF orientation and its detections.
        batch: most images of one call of the model; only images of the same size are in one.
        calls: calls of the model at the same time.
        threads: that read and finish images.

    Yields:
        the item, and the result or the error of the image: that of a file that cannot be read or does not fit the
        model. What was lost in reading is counted in `detector.notes`.
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
            # The model is kept busy; a batch is complete when the window has no more of its size.
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
    """Reads the image of an entry; a failure is its outcome."""
    try:
        image, entry.orientation = entry.item.read(detector.preprocessing, entry.notes)
        entry.image.set_result(image)
    except BaseException as error:
        entry.image.set_exception(error)


def _next_batch(waiting: list[_Entry[T]], batch: int) -> list[_Entry[T]]:
    """The first images of one size that wait, [] if the first cannot be read; waits for them to be read."""
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
    """Detects in the images of a group; of one that fails, each alone."""
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
