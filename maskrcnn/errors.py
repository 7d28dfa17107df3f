"""Errors meant for the user, and how a program prints them."""

from __future__ import annotations

import codecs
import difflib
import math
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

# ASCII replacements for characters of our messages that an output encoding lacks.
_SIGNS = {"→": "->", "×": "x", "…": "...", "·": "*", "±": "+/-", "≤": "<=", "≥": ">=", "−": "-", "σ": "sigma", "–": "-"}
# Packages to install for modules of another name.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "onnx_ir": "onnxscript",
    "torch": "torch torchvision",
    "torchvision": "torch torchvision",
    "yaml": "pyyaml",
}
_OURS = ("", "maskrcnn")  # modules that no other package provides
SMALLEST_POSITIVE = 1e-12  # lower bound of values that must be above 0
_MEMORY_TEXTS = ("can't allocate memory", "out of memory", "bad_alloc", "Failed to allocate memory", "bad allocation")


class UserError(Exception):
    """Something outside the program is wrong: a file, an option, a missing library.

    Args:
        found: what was found, with the file, line or object.
        expected: what would have been valid.
        fix: what the user can do about it, if possible a command.
    """

    def __init__(self, found: str, expected: str, fix: str) -> None:
        self.found, self.expected, self.fix = found, expected, fix
        super().__init__(f"{found}\n  expected: {expected}\n  fix:      {fix}")

    def __reduce__(self) -> tuple:
        """Pickles the three parts, so that the error can be sent between processes."""
        return type(self), (self.found, self.expected, self.fix)


def missing_library(name: str, enables: str, install: str) -> UserError:
    """The error for a backend whose library is not installed."""
    return UserError(f"no Python package {name}", f"{name}, to {enables}", f"`{install}`; see `maskrcnn doctor`")


def check_range(name: str, value: float | None, low: float, high: float = math.inf) -> None:
    """Raise a UserError unless low ≤ value ≤ high and the value is finite; None (a default) is accepted."""
    if value is not None and not (low <= value <= high and math.isfinite(value)):
        least = "above 0 and " if low == SMALLEST_POSITIVE else f"at least {low} and " if math.isfinite(low) else ""
        bounds = f"{least}finite" if high == math.inf else f"{low} to {high}"
        raise UserError(f"{name} {value}", bounds, f"set {name} to a value in this range")


def did_you_mean(given: object, choices: Iterable[str]) -> str:
    """Returns `; did you mean …?`, to be appended to a fix, if choices resemble or contain what was given; else ""."""
    names = [*choices]
    near = difflib.get_close_matches(str(given), names, n=1) or [name for name in names if str(given) in name][:3]
    return f"; did you mean {' or '.join(near)}?" if given and near else ""


def reason_of(error: BaseException | str) -> str:
    """The whole text of another library's error on one line; the name of its class if the text is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy, PyTorch or a runtime means that memory ran out."""
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    return type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in _MEMORY_TEXTS)


def require_memory(needed_bytes: float, what: str, fix: str) -> None:
    """Refuse work that cannot fit into memory before it begins, as Linux would kill the process without a message.

    Args:
        needed_bytes: lower bound of the memory needed.
        what: what needs the memory, for the error.
        fix: how to reduce the need.

    Raises:
        UserError: if more is needed than is available on this machine or within the container's limit.
    """
    available = _available_bytes()
    if available is not None and needed_bytes > available:
        found = f"{what}, which takes at least {needed_bytes / 1e9:.1f} GB of memory"
        raise UserError(found, f"at most the {available / 1e9:.1f} GB that are available", fix)


def _available_bytes() -> float | None:
    """Memory available without swapping, in bytes; None where the system does not report it (Windows, macOS)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
    limits = [kilobytes * 1024.0]
    with suppress(OSError, ValueError):  # a container's; "max" without one
        limit, used = (float(_read(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
        limits.append(limit - used)
    return min(limits)


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


@contextmanager
def report_errors(show_traceback: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Ends the program on any exception in this context with a message and an exit code, without a traceback.

    A `UserError` is printed to standard error, with exit code 1; so are operating system and out-of-memory errors. Any
    other exception is a fault of the program: the message says where its traceback was written. An interruption exits
    with 130. On standard output and error, characters that the encoding lacks are replaced.

    Args:
        show_traceback: called when an exception was caught; returns whether to print its traceback too.
    """
    codecs.register_error("maskrcnn", _replacement)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="maskrcnn")
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # here rather than at exit, where a full disk could not be reported
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except BrokenPipeError:  # the reader closed the pipe
        _silence_output()
        sys.exit(1)
    except Exception as error:
        if show_traceback():
            traceback.print_exc()
        _end(f"Error: {_explained(error)}", 1)


def _explained(error: Exception) -> UserError:
    """The error in the three parts of a `UserError`."""
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        return UserError(
            f"out of memory ({reason_of(error)})",
            "work that fits into memory",
            "use smaller images (--size, --min-size, --max-size), a smaller batch, or fewer processes",
        )
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) not in _OURS:
        return missing_library(package, "run this command", f"pip install {_DISTRIBUTIONS.get(package, package)}")
    if isinstance(error, OSError) and error.strerror:
        where = " ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return UserError(
            f"{where or 'a file'}: {error.strerror}",
            "files and folders that can be read and written",
            "check the path, its permissions and the disk space; --verbose shows where it happened",
        )
    return UserError(
        f"internal error, {type(error).__name__}: {error}",
        "a result, or an error with an explanation",
        f"report it with its traceback: {_saved_traceback()}",
    )


def _saved_traceback() -> str:
    """Writes the traceback of the current exception to a temporary file; returns its path, or else the traceback."""
    text = f"{shlex.join(sys.argv)}\nPython {sys.version}\n{traceback.format_exc()}"
    try:
        with tempfile.NamedTemporaryFile(prefix="maskrcnn-", suffix=".txt", delete=False) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
        return file.name
    except OSError:
        return text


def _end(message: str, code: int) -> NoReturn:
    with suppress(OSError, ValueError):
        if sys.stdout is not None:
            sys.stdout.flush()
    with suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def _silence_output() -> None:
    """Redirects standard output to the null device, so that the interpreter's final flush succeeds."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _replacement(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replaces our own characters by ASCII; anything else, such as a file name that is not UTF-8, by escapes."""
    if not isinstance(error, UnicodeEncodeError):
        return codecs.backslashreplace_errors(error)
    text = error.object[error.start : error.end]
    replaced = "".join(_SIGNS.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in text)
    return replaced, error.end
