"""How far TensorRT is with building, and stopping it.

TensorRT builds inside one long call that holds no Python lock, so Ctrl-C would wait for its end. The call runs in a
thread of its own here: the main thread hears Ctrl-C, and TensorRT asks the monitor after every step whether to go on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from maskrcnn.errors import UserError

Result = TypeVar("Result")
_TICK_S = 0.1  # how long the main thread may take to hear Ctrl-C


class Progress(Protocol):
    """What is told of the phases of a build. Phases nest; names repeat only after they ended. Any thread calls."""

    def started(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins, inside another one or on its own."""

    def completed(self, phase: str, step: int) -> None:
        """A step is done, counted from 0."""

    def finished(self, phase: str) -> None:
        """A phase ends, maybe before its last step."""


class Silent:
    """A progress that nobody looks at."""

    def started(self, phase: str, parent: str | None, steps: int) -> None: ...

    def completed(self, phase: str, step: int) -> None: ...

    def finished(self, phase: str) -> None: ...


def make_monitor(trt: Any, progress: Progress, stop: threading.Event) -> Any:
    """A `trt.IProgressMonitor` that tells `progress` and ends the build once `stop` is set.

    An exception of `progress` would have to pass through TensorRT's own code, which ends the process; so it stops the
    build instead, and lies in the monitor's `fault` afterwards.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # the bindings want it called by name
            self.fault: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tell(progress.started, phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self._tell(progress.finished, phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(progress.completed, phase_name, step)
            return not stop.is_set()

        def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
            try:
                function(*arguments)
            except BaseException as error:
                self.fault = self.fault or error
                stop.set()

    return Monitor()


def run_stoppable(work: Callable[[threading.Event], Result]) -> Result:
    """What `work` returns, which runs in another thread; Ctrl-C sets the event that it is given, and waits.

    Raises:
        UserError: after Ctrl-C.
        Exception: what `work` raised.
    """
    begin, stop, done, outcome = threading.Event(), threading.Event(), threading.Event(), {}

    def run() -> None:
        begin.wait()  # for the main thread to listen
        try:
            outcome["result"] = work(stop)
        except BaseException as error:
            outcome["error"] = error
        finally:
            done.set()

    threading.Thread(target=run, name="tensorrt-build", daemon=True).start()
    if _wait(begin, done, stop):
        raise UserError(
            "a build that was stopped by Ctrl-C",
            "some minutes of patience; --optimization-level 0 to 2 builds faster",
            "run it again: what was measured so far is in the timing cache",
        ) from outcome.get("error")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _wait(begin: threading.Event, done: threading.Event, stop: threading.Event) -> bool:
    """Sets the first event and waits for the second; whether Ctrl-C came meanwhile, which sets the third.

    Not by joining the thread: before Python 3.13, Ctrl-C in `Thread.join` makes a running thread look as if it had
    ended (bpo-45274).
    """
    was_interrupted = False
    while True:
        try:
            begin.set()
            while not done.wait(_TICK_S):
                pass
            return was_interrupted
        except KeyboardInterrupt:
            was_interrupted = True
            stop.set()
