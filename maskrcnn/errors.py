"""The errors that a user is meant to read, and how a program prints them."""

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

# What stands for the signs of our messages where an output encoding lacks them.
_SIGNS = {"→": "->", "×": "x", "…": "...", "·": "*", "±": "+/-", "≤": "<=", "≥": ">=", "−": "-", "σ": "sigma", "–": "-"}
# What to install for a module of another name.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "onnx_ir": "onnxscript",
    "torch": "torch torchvision",
    "torchvision": "torch torchvision",
    "yaml": "pyyaml",
}
_OURS = ("", "maskrcnn")  # modules that no installation of another package provides
SMALLEST_POSITIVE = 1e-12  # lower bound of values that must be above 0
_MEMORY_TEXTS = ("can't allocate memory", "out of memory", "bad_alloc", "Failed to allocate memory", "bad allocation")


class UserError(Exception):
    """Something outside the program is not as it must be: a file, a flag, a missing library.

    Args:
        found: what was found, naming the file, line or object.
        expected: what would have been right.
        fix: what the user can do about it, a command where there is one.
    """

    def __init__(self, found: str, expected: str, fix: str) -> None:
        self.found, self.expected, self.fix = found, expected, fix
        super().__init__(f"{found}\n  expected: {expected}\n  fix:      {fix}")

    def __reduce__(self) -> tuple:
        """So that it survives the way between processes."""
        return type(self), (self.found, self.expected, self.fix)


def missing_library(name: str, enables: str, install: str) -> UserError:
    """The error for a backend whose library is not installed."""
    return UserError(f"no Python package {name}", f"{name}, to {enables}", f"`{install}`; see `maskrcnn doctor`")


def check_range(name: str, value: float | None, low: float, high: float = math.inf) -> None:
    """Raise a UserError unless low ≤ value ≤ high and the value is finite; None stands for a default."""
    if value is not None and not (low <= value <= high and math.isfinite(value)):
        least = "above 0 and " if low == SMALLEST_POSITIVE else f"at least {low} and " if math.isfinite(low) else ""
        bounds = f"{least}finite" if high == math.inf else f"{low} to {high}"
        raise UserError(f"{name} {value}", bounds, f"set {name} to a value in this range")


def did_you_mean(given: object, choices: Iterable[str]) -> str:
    """`; did you mean …?` if a choice resembles what was given, else an empty text; to be appended to a fix."""
    near = difflib.get_close_matches(str(given), [*choices], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def reason_of(error: BaseException | str) -> str:
    """The whole text of another library's error on one line; the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy, PyTorch or a runtime says that memory ran out."""
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    return type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in _MEMORY_TEXTS)


def require_memory(needed_bytes: float, what: str, fix: str) -> None:
    """Refuse work that cannot fit into memory before it begins: Linux ends a process that fills it without a word.

    Args:
        needed_bytes: lower bound of what is needed.
        what: what needs it, for the error.
        fix: how to need less.

    Raises:
        UserError: if more is needed than this machine, or the container's limit, has left.
    """
    available = _available_bytes()
    if available is not None and needed_bytes > available:
        found = f"{what}, which takes at least {needed_bytes / 1e9:.1f} GB of memory"
        raise UserError(found, f"at most the {available / 1e9:.1f} GB that are available", fix)


def _available_bytes() -> float | None:
    """Memory that can be taken without swapping; None where the system does not say (Windows, macOS)."""
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
    """Ends a program whatever happens inside this context with a message and an exit code, and without a traceback.

    A `UserError` is printed to standard error, with exit code 1; so are errors of the system and of memory. Any other
    exception is a fault of the program: the message says where its traceback was written. An interruption gives 130.
    Standard output and error get replacements for characters that their encoding lacks.

    Args:
        show_traceback: called with an error at hand: whether to print its traceback too.
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
    except BrokenPipeError:  # the reader has seen enough
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
            "files, folders and disks that can be read and written",
            "check the path, its permissions and the space on the disk; --verbose shows where it happened",
        )
    return UserError(
        f"internal error, {type(error).__name__}: {error}",
        "a result, or an error that explains itself",
        f"report it with its traceback: {_saved_traceback()}",
    )


def _saved_traceback() -> str:
    """Writes the traceback of the error at hand to a temporary file; returns its path, or the traceback itself."""
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
    """Lets the interpreter's last flush of standard output succeed."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _replacement(error: UnicodeError) -> tuple[str | bytes, int]:
    """Our signs in ASCII; anything else, such as a file name that is not UTF-8, as escapes."""
    if not isinstance(error, UnicodeEncodeError):
        return codecs.backslashreplace_errors(error)
    text = error.object[error.start : error.end]
    replaced = "".join(_SIGNS.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in text)
    return replaced, error.end
