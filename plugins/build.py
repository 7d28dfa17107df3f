"""The kernels and the TensorRT plugins as libraries, compiled by nvcc and kept in the cache.

`libmaskrcnn_kernels` exports the C interface of csrc/kernels.h and needs CUDA alone; `libmaskrcnn_plugins` holds the
same kernels behind TensorRT's C++ plugin interface and needs TensorRT's headers; beside it lies
`libmaskrcnn_plugins_register`, for programs that do no more than load a library. csrc/CMakeLists.txt builds the same,
for those who have their own build.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.files import atomic_path, make_folder, write_json
from maskrcnn.plugins.toolchain import HOST_COMPILER, NVCC, TENSORRT_HEADERS, Absence, Toolchain

# Where compiled plugins are kept: a folder for each set of sources, compiler, architectures and flags.
#
# A folder appears whole or not at all, so any number of processes can build at the same time: they compile in folders
# of their own, and the first to finish is kept.

SOURCES = Path(__file__).with_name("csrc")
RECORD = "build.json"  # in each folder: what it was made from


def folder() -> Path:
    """`plugins` in $MASKRCNN_CACHE, by default in ~/.cache/maskrcnn.

    Raises:
        UserError: for a user without a home folder, where the variable is not set.
    """
    root = os.environ.get("MASKRCNN_CACHE")
    try:
        return (Path(root) if root else Path.home() / ".cache" / "maskrcnn") / "plugins"
    except RuntimeError as error:
        came = "no home folder to keep compiled plugins in"
        raise UserError(came, "one, or MASKRCNN_CACHE", "set MASKRCNN_CACHE to a folder of this user alone") from error


def sources_hash(paths: Iterable[Path]) -> str:
    """A hash over names and bytes of source files, and of all headers, as any of them may include any."""
    digest = hashlib.sha256()
    headers = (path for suffix in ("h", "cuh") for path in SOURCES.rglob(f"*.{suffix}"))
    for path in sorted({*paths, *headers}):
        digest.update(os.path.relpath(path, SOURCES).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def key_of(record: Mapping[str, Any]) -> str:
    """The name of the folder for what a record says."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]


def find(record: Mapping[str, Any], name: str) -> Path | None:
    """A file made from exactly this, or None."""
    path = folder() / key_of(record) / name
    return path if path.is_file() else None


def records() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every folder with its record, the newest first; none where there can be no cache."""
    found = []
    try:
        paths = list(folder().glob(f"[!.]*/{RECORD}"))
    except (OSError, UserError):
        paths = []
    for path in paths:
        try:
            found.append((path.stat().st_mtime, path.parent, json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError):  # removed meanwhile, or not ours
            continue
    yield from ((parent, record) for _, parent, record in sorted(found, key=lambda entry: entry[0], reverse=True))


def store(record: Mapping[str, Any], name: str, make: Callable[[Path], None], *, force: bool = False) -> Path:
    """The file of this record; `make` writes it to the path it is given, unless it is there.

    Args:
        record: what the file depends on, as JSON holds it.
        name: of the file.
        make: may write further files beside it; may raise, and then nothing is kept.
        force: make it even if it is there.

    Raises:
        UserError: where the cache's folder cannot be made or written to.
    """
    if not force and (path := find(record, name)):
        return path
    make_folder(folder())
    with _draft() as draft:
        make(draft / name)
        write_json(draft / RECORD, dict(record))
        final = folder() / key_of(record)
        try:
            os.rename(draft, final)
        except OSError:  # the folder is there: another process was faster, or it is to be replaced, or broken
            while force or not (final / name).is_file():
                _set_aside(final)
                try:
                    os.rename(draft, final)
                    break
                except OSError:
                    if not final.exists():
                        raise
                    force = False  # somebody else's came between, which is as fresh as ours
    return final / name


@contextmanager
def _draft() -> Iterator[Path]:
    try:
        path = Path(tempfile.mkdtemp(dir=folder(), prefix=".draft-"))
    except OSError as error:
        came, expected = f"{folder()} cannot be written to ({error.strerror})", "a folder for compiled plugins"
        raise UserError(came, expected, "set MASKRCNN_CACHE to another folder") from error
    try:
        path.chmod(0o755)  # mkdtemp's own mode would hide a shared cache from other users
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _set_aside(path: Path) -> None:
    """Removes a folder, under another name first: whoever has its library open keeps it."""
    aside = path.with_name(f".old-{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


# Of the GPUs that this package meets: Turing, Ampere (data centre, others), Ada, Hopper, Blackwell (the same two).
COMMON_ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
_FLAGS = (
    *("-O3", "-std=c++17", "-lineinfo", "--cudart", "static", "--threads", "0"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"),
    *("-Xlinker", "--exclude-libs,ALL,--no-undefined"),
)
_REGISTER = "libmaskrcnn_plugins_register.so"
_SHOWN_LINES = 25  # of a failing compiler's output


class Library(str, Enum):
    """What can be built."""

    KERNELS = "kernels"
    PLUGINS = "plugins"

    @property
    def file_name(self) -> str:
        """Of the library on Linux."""
        return f"libmaskrcnn_{self.value}.so"

    @property
    def companions(self) -> tuple[str, ...]:
        """Files that belong beside it."""
        return (_REGISTER,) if self is Library.PLUGINS else ()


def architectures(toolchain: Toolchain, wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """What to compile for: what is wanted, else this machine's GPUs, else the common ones that nvcc knows.

    A GPU that is newer than nvcc gets the newest architecture that nvcc knows: each library carries that one's PTX
    too, from which the driver compiles.

    Raises:
        UserError: for an architecture that nvcc does not know.
    """
    known = _nvcc(toolchain).architectures
    if unknown := sorted(set(wanted) - set(known)):
        raise UserError(
            f"architecture {', '.join(map(str, unknown))}",
            f"some of {', '.join(map(str, known))}, which {toolchain.nvcc.path} compiles for",
            "choose among these, or get a newer CUDA toolkit",
        )
    if wanted:
        return tuple(sorted(set(wanted)))
    older = [[arch for arch in known if arch <= gpu] for gpu in toolchain.gpus]
    return tuple(sorted({max(some) for some in older if some} or set(COMMON_ARCHITECTURES) & set(known)))


def obstacle(kind: str | Library, toolchain: Toolchain) -> Absence | None:
    """What is missing to build a library, or None."""
    wanted = [(NVCC, toolchain.nvcc), (HOST_COMPILER, toolchain.host_compiler)]
    if Library(kind) is Library.PLUGINS:
        wanted.append((TENSORRT_HEADERS, toolchain.tensorrt))
    return next((absence for absence, found in wanted if not found), None)


def build_library(
    kind: str | Library, *, arch: Sequence[int], toolchain: Toolchain, out: Path | None = None, force: bool = False
) -> Path:
    """Compiles a library, unless the cache has it.

    Args:
        kind: `kernels` or `plugins`.
        arch: compute capabilities, 90 for 9.0, as `architectures` gives them; machine code for each, and PTX of the
            newest for GPUs to come.
        toolchain: what to compile with.
        out: a folder to copy the library to, with its companions.
        force: compile even if the cache has it.

    Returns:
        The library in `out`, or else in the cache.

    Raises:
        UserError: where something is missing, or when the compiler fails.
    """
    kind = Library(kind)
    record = _record(kind, architectures(toolchain, arch), toolchain)
    path = store(record, kind.file_name, lambda draft: _compile(kind, record, toolchain, draft), force=force)
    if out is None:
        return path
    for name in (*kind.companions, kind.file_name):
        with atomic_path(out / name) as draft:
            shutil.copyfile(path.with_name(name), draft)
    return out / kind.file_name


def cached_library(kind: str | Library, *, arch: Sequence[int], toolchain: Toolchain) -> Path | None:
    """The library that `build_library` would not have to compile, or None."""
    kind = Library(kind)
    return find(_record(kind, architectures(toolchain, arch), toolchain), kind.file_name)


def find_library(kind: str | Library, arch: int | None = None, *, tensorrt: str | None = None) -> Path | None:
    """A library of the present sources in the cache, without looking for a compiler.

    Args:
        kind: `kernels` or `plugins`.
        arch: compute capability it must run on, 90 for 9.0; one compiled for exactly that is preferred.
        tensorrt: version of TensorRT that is to load the plugins, as its `__version__` says it: only a library
            compiled against headers of the same major version will do.

    Returns:
        The newest that fits, or None.
    """
    kind = Library(kind)
    sources = sources_hash(source_files(kind))
    fitting = []
    for folder, record in records():
        path = folder / kind.file_name
        compiled_for = record.get("architectures") or [0]
        is_ours = record.get("library") == kind.value and record.get("sources") == sources
        if is_ours and _is_for(record, tensorrt) and path.is_file():
            if arch is None or arch in compiled_for:
                return path
            if runs_on(compiled_for, arch):
                fitting.append(path)
    return fitting[0] if fitting else None


def _is_for(record: dict[str, Any], tensorrt: str | None) -> bool:
    major = record.get("tensorrt", "").partition(".")[0]
    return tensorrt is None or major == tensorrt.partition(".")[0]


def runs_on(compiled_for: Sequence[int], arch: int) -> bool:
    """Whether a GPU runs a library: its machine code within a generation, the newest's PTX from there on.

    Source: CUDA Programming Guide, binary and PTX compatibility.
    """
    same_generation = any(have // 10 == arch // 10 and have <= arch for have in compiled_for)
    return same_generation or max(compiled_for) <= arch


def source_files(kind: Library) -> list[Path]:
    """The files that a library is compiled from."""
    suffixes = ("cu", "cpp") if kind is Library.PLUGINS else ("cu",)
    found = [path for suffix in suffixes for path in SOURCES.rglob(f"*.{suffix}")]
    return sorted(path for path in found if path.name != "aot.cu")  # which NVRTC compiles, op by op


def _record(kind: Library, arch: tuple[int, ...], toolchain: Toolchain) -> dict[str, Any]:
    """Everything the library depends on."""
    if missing := obstacle(kind, toolchain):
        raise UserError(f"no {missing.what} on this machine", f"one, for {missing.enables}", missing.remedy)
    record = {
        "library": kind.value,
        "architectures": list(arch),
        "sources": sources_hash(source_files(kind)),
        "compiler": f"nvcc {toolchain.nvcc.version}",
        "host_compiler": str(toolchain.host_compiler),
        "flags": list(_FLAGS),
    }
    return record | ({"tensorrt": toolchain.tensorrt.version} if kind is Library.PLUGINS else {})


def _compile(kind: Library, record: dict[str, Any], toolchain: Toolchain, output: Path) -> None:
    if not sys.platform.startswith("linux"):
        raise UserError(
            f"a build on {sys.platform}", "Linux", "use WSL 2, or the CMakeLists.txt beside the sources in csrc"
        )
    common = _command(kind, record["architectures"], toolchain)
    _run([*common, "-o", str(output), *map(str, source_files(kind))], output)
    if kind is Library.PLUGINS:
        beside, source = output.with_name(_REGISTER), str(SOURCES / "tensorrt" / "register.cpp")
        _run([*common, "-DMASKRCNN_REGISTER_WHEN_LOADED", "-o", str(beside), source], beside)


def _command(kind: Library, arch: Sequence[int], toolchain: Toolchain) -> list[str]:
    """nvcc with everything but sources and output."""
    nvcc, newest = _nvcc(toolchain).path, max(arch)
    codes = [(number, f"sm_{number}") for number in arch] + [(newest, f"compute_{newest}")]
    targets = [word for number, code in codes for word in ("-gencode", f"arch=compute_{number},code={code}")]
    includes = [f"-I{SOURCES}"]
    if kind is Library.PLUGINS:
        includes += ["-isystem", str(toolchain.tensorrt.folder)]
    # A wheel's nvcc looks for the CUDA runtime in lib64, but its wheel brings lib.
    libraries = nvcc.resolve().parents[1] / "lib"
    found = [f"-L{libraries}"] if (libraries / "libcudart_static.a").is_file() else []
    host = ["-ccbin", str(toolchain.host_compiler)]
    return [str(nvcc), "-shared", *_FLAGS, *host, *targets, *includes, *found, "-ldl"]


def _run(command: list[str], output: Path) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0 or not output.is_file():
        shown = "\n".join(done.stdout.splitlines()[-_SHOWN_LINES:])
        raise UserError(
            f"{command[0]} failed with code {done.returncode} on {output.name}:\n{shown}",
            "sources that it compiles",
            "try another CUDA or host compiler (NVCC_CCBIN names one); if neither helps, report this with the output",
        )


def _nvcc(toolchain: Toolchain):
    if toolchain.nvcc is None:
        raise UserError("no nvcc on this machine", f"one, for {NVCC.enables}", NVCC.remedy)
    return toolchain.nvcc
