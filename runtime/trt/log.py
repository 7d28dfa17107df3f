"""What TensorRT says, of which one logger keeps the warnings and errors for as long as the process lives.

TensorRT takes a logger wherever it makes something, but what it says outside of that goes to the first one that it ever
got. Were that freed with the engine that it was made for, TensorRT would call into memory that is no logger any more.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

_KEPT = 500  # messages; a build that fails says why at its end


@dataclass(frozen=True)
class Message:
    """One message; `severity` as TensorRT names it."""

    severity: str
    text: str


class Log:
    """What TensorRT says from some moment on.

    Args:
        logger: for TensorRT's constructors.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.restart()

    def restart(self) -> None:
        """Leaves out what has been said so far."""
        self._start = self.logger.record.count

    @property
    def messages(self) -> list[Message]:
        """Warnings and errors, the newest `_KEPT` of them, of all threads: TensorRT builds in several."""
        return [said.message for said in self.logger.record.since(self._start)]

    def take(self) -> list[Message]:
        """Those of the calling thread, which are forgotten then; where it has none, those of all.

        For what TensorRT does in the calling thread, so that errors of other engines and of earlier runs do not count.
        """
        return self.logger.record.take(self._start) or self.messages


@dataclass
class _Said:
    number: int
    thread: int
    message: Message
    is_taken: bool = False


class _Record:
    """The newest messages, numbered; any thread may add to it."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: deque[_Said] = deque(maxlen=_KEPT)
        # Reentrant, as TensorRT says something, too, when Python frees an object of its amid these lines.
        self._lock = threading.RLock()

    def add(self, message: Message) -> None:
        with self._lock:
            self._kept.append(_Said(self.count, threading.get_ident(), message))
            self.count += 1

    def since(self, start: int) -> list[_Said]:
        with self._lock:
            kept = list(self._kept)
        return [said for said in kept if said.number >= start and not said.is_taken]

    def take(self, start: int) -> list[Message]:
        mine = [said for said in self.since(start) if said.thread == threading.get_ident()]
        for said in mine:
            said.is_taken = True
        return [said.message for said in mine]


# By module. Python keeps a module that was imported, and so its logger, which TensorRT refers to. Only those that play
# TensorRT in tests are freed, and weak keys let their loggers go with them.
_LOGGERS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_LOGGERS_LOCK = threading.Lock()


def listen(trt: Any) -> Log:
    """What TensorRT says from now on, but for information and verbose messages.

    Args:
        trt: the tensorrt module.
    """
    with _LOGGERS_LOCK:
        if trt not in _LOGGERS:
            _LOGGERS[trt] = _new_logger(trt)
        return Log(_LOGGERS[trt])


def _new_logger(trt: Any) -> Any:
    base, severity = trt.ILogger, trt.ILogger.Severity  # and not `trt`, which the class would keep alive
    ignored = (severity.VERBOSE, severity.INFO)  # hundreds of thousands of them

    class RecordingLogger(base):
        def __init__(self) -> None:
            base.__init__(self)  # the bindings want it called by name
            self.record = _Record()

        def log(self, severity: Any, msg: str) -> None:
            if severity not in ignored:
                self.record.add(Message(severity.name, msg))

    return RecordingLogger()
