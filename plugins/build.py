"""Libraries of the kernels and TensorRT plugins, compiled by nvcc and kept in a cache.

`libmaskrcnn_kernels` exports the C interface of csrc/kernels.h and needs CUDA only. `libmaskrcnn_plugins` contains the
same kernels as TensorRT C++ plugins and needs TensorRT's headers. `libmaskrcnn_plugins_register` in the same folder
registers the plugins when it is loaded. csrc/CMakeLists.txt builds the same libraries.
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
from maskrcnn.files import atomic_path, cache_folder, make_folder, write_json
from maskrcnn.plugins.toolchain import HOST_COMPILER, NVCC, TENSORRT_HEADERS, Absence, Nvcc, Toolchain

# The cache has a folder for each combination of sources, compiler, architectures and flags. A process compiles in a
# temporary folder and renames it, so that concurrent builds are safe; the first result is kept.

SOURCES = Path(__file__).with_name("csrc")
RECORD = "build.json"  # file in each folder: everything that its files depend on


def folder() -> Path:
    """Returns the folder of compiled plugins: `plugins` in the cache folder, see `maskrcnn.files.cache_folder`."""
    return cache_folder() / "plugins"


def sources_hash(paths: Iterable[Path]) -> str:
    """Hashes names and contents of source files and of all headers, which any source may include."""
    digest = hashlib.sha256()
    headers = (path for suffix in ("h", "cuh") for path in SOURCES.rglob(f"*.{suffix}"))
    for path in sorted({*paths, *headers}):
        digest.update(os.path.relpath(path, SOURCES).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _key_of(record: Mapping[str, Any]) -> str:
    """Returns the folder name of a record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]


def find(record: Mapping[str, Any], name: str) -> Path | None:
    """Returns the cached file of a record, or None."""
    path = folder() / _key_of(record) / name
    return path if path.is_file() else None


def records() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields every folder with its record, newest first; nothing if there is no cache."""
    found = []
    try:
        paths = list(folder().glob(f"[!.]*/{RECORD}"))
    except (OSError, UserError):
        paths = []
    for path in paths:
        try:
            found.append((path.stat().st_mtime, path.parent, json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError):  # removed by another process, or not a record
            continue
    yield from ((parent, record) for _, parent, record in sorted(found, key=lambda entry: entry[0], reverse=True))


def store(record: Mapping[str, Any], name: str, make: Callable[[Path], None], *, force: bool = False) -> Path:
    """Returns the cached file of a record, creating it if necessary.

    Args:
        record: everything that the file depends on, as JSON values.
        name: name of the file.
        make: writes the file to the given path; may write more files to its folder. Nothing is kept if it raises.
        force: create the file even if it is cached.

    Raises:
        UserError: if the cache folder cannot be created or written.
    """
    if not force and (path := find(record, name)):
        return path
    make_folder(folder())
    with _draft() as draft:
        make(draft / name)
        write_json(draft / RECORD, dict(record))
        final = folder() / _key_of(record)
        try:
            os.rename(draft, final)
        except OSError:  # the folder exists: created by another process, to be replaced, or incomplete
            while force or not (final / name).is_file():
                _set_aside(final)
                try:
                    os.rename(draft, final)
                    break
                except OSError:
                    if not final.exists():
                        raise
                    force = False  # another process has created the folder in between, from the same record
    return final / name


@contextmanager
def _draft() -> Iterator[Path]:
    try:
        path = Path(tempfile.mkdtemp(dir=folder(), prefix=".draft-"))
    except OSError as error:
        raise UserError(
            f"{folder()} cannot be written to ({error.strerror})",
            "a folder for compiled plugins",
            "set MASKRCNN_CACHE to another folder",
        ) from error
    try:
        path.chmod(0o755)  # mkdtemp creates private folders, but a cache may be shared
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _set_aside(path: Path) -> None:
    """Renames and then removes a folder; processes that have loaded its library keep it."""
    aside = path.with_name(f".old-{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


# Libraries

# Turing, Ampere (data centre, other), Ada, Hopper, Blackwell (data centre, other).
COMMON_ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
_FLAGS = (
    *("-O3", "-std=c++17", "-lineinfo", "--cudart", "static", "--threads", "0"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"),
    *("-Xlinker", "--exclude-libs,ALL,--no-undefined"),
)
_REGISTER = "libmaskrcnn_plugins_register.so"
_SHOWN_LINES = 25  # shown of the compiler's output on failure


class Library(str, Enum):
    """Library to build."""

    KERNELS = "kernels"
    PLUGINS = "plugins"

    @property
    def file_name(self) -> str:
        """File name on Linux."""
        return f"libmaskrcnn_{self.value}.so"

    @property
    def companions(self) -> tuple[str, ...]:
        """Files to keep in the library's folder."""
        return (_REGISTER,) if self is Library.PLUGINS else ()


def architectures(toolchain: Toolchain, wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """Returns the architectures to compile for: `wanted`, or this machine's GPUs, or the common ones.

    A GPU newer than nvcc gets the newest architecture that nvcc supports; the driver compiles the library's PTX for it.

    Raises:
        UserError: if nvcc is missing or does not support an architecture in `wanted`.
    """
    nvcc = _nvcc(toolchain)
    known = nvcc.architectures
    if unknown := sorted(set(wanted) - set(known)):
        raise UserError(
            f"architecture {', '.join(map(str, unknown))}",
            f"some of {', '.join(map(str, known))}, which {nvcc.path} supports",
            "choose from these, or install a newer CUDA toolkit",
        )
    if wanted:
        return tuple(sorted(set(wanted)))
    older = [[arch for arch in known if arch <= gpu] for gpu in toolchain.gpus]
    return tuple(sorted({max(some) for some in older if some} or set(COMMON_ARCHITECTURES) & set(known)))


def obstacle(kind: str | Library, toolchain: Toolchain) -> Absence | None:
    """Returns the first missing requirement for building a library, or None."""
    wanted: list[tuple[Absence, object]] = [(NVCC, toolchain.nvcc), (HOST_COMPILER, toolchain.host_compiler)]
    if Library(kind) is Library.PLUGINS:
        wanted.append((TENSORRT_HEADERS, toolchain.tensorrt))
    return next((absence for absence, found in wanted if not found), None)


def build_library(
    kind: str | Library, *, arch: Sequence[int], toolchain: Toolchain, out: Path | None = None, force: bool = False
) -> Path:
    """Compiles a library, unless it is cached.

    Args:
        kind: `kernels` or `plugins`.
        arch: compute capabilities, 90 for 9.0 (empty: as chosen by `architectures`). The library contains machine code
            for each, and PTX of the newest for future GPUs.
        toolchain: compilers and headers.
        out: folder to copy the library and its companions to.
        force: compile even if the library is cached.

    Returns:
        Path of the library in `out` or in the cache.

    Raises:
        UserError: if a requirement is missing or the compiler fails.
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
    """Returns the cached library that `build_library` would return, or None."""
    kind = Library(kind)
    return find(_record(kind, architectures(toolchain, arch), toolchain), kind.file_name)


def find_library(kind: str | Library, arch: int | None = None, *, tensorrt: str | None = None) -> Path | None:
    """Finds a cached library of the current sources, without a compiler.

    Args:
        kind: `kernels` or `plugins`.
        arch: compute capability that the library must support, 90 for 9.0; an exact match is preferred.
        tensorrt: `__version__` of the TensorRT that will load the plugins; the major version must match the headers.

    Returns:
        Path of the newest match, or None.
    """
    kind = Library(kind)
    sources = sources_hash(source_files(kind))
    fitting = []
    for folder, record in records():
        path = folder / kind.file_name
        compiled_for = record.get("architectures") or [0]
        is_current = record.get("library") == kind.value and record.get("sources") == sources
        if is_current and _is_for(record, tensorrt) and path.is_file():
            if arch is None or arch in compiled_for:
                return path
            if runs_on(compiled_for, arch):
                fitting.append(path)
    return fitting[0] if fitting else None


def _is_for(record: dict[str, Any], tensorrt: str | None) -> bool:
    major = record.get("tensorrt", "").partition(".")[0]
    return tensorrt is None or major == tensorrt.partition(".")[0]


def runs_on(compiled_for: Sequence[int], arch: int) -> bool:
    """Returns whether a GPU runs a library: machine code of its own generation, or PTX of an older architecture.

    Source: CUDA Programming Guide, binary and PTX compatibility.
    """
    same_generation = any(have // 10 == arch // 10 and have <= arch for have in compiled_for)
    return same_generation or max(compiled_for) <= arch


def source_files(kind: Library) -> list[Path]:
    """Returns the sources of a library."""
    suffixes = ("cu", "cpp") if kind is Library.PLUGINS else ("cu",)
    found = [path for suffix in suffixes for path in SOURCES.rglob(f"*.{suffix}")]
    return sorted(path for path in found if path.name != "aot.cu")  # compiled per node, see aot_kernels.py


def _record(kind: Library, arch: tuple[int, ...], toolchain: Toolchain) -> dict[str, Any]:
    """Everything that the library depends on."""
    if missing := obstacle(kind, toolchain):
        raise UserError(f"no {missing.what} on this machine", f"{missing.what}, for {missing.enables}", missing.remedy)
    record = {
        "library": kind.value,
        "architectures": list(arch),
        "sources": sources_hash(source_files(kind)),
        "compiler": f"nvcc {_nvcc(toolchain).version}",
        "host_compiler": str(toolchain.host_compiler),
        "flags": list(_FLAGS),
    }
    if kind is Library.PLUGINS and toolchain.tensorrt:
        record["tensorrt"] = toolchain.tensorrt.version
    return record


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
    """The nvcc command without sources and output."""
    nvcc, newest = _nvcc(toolchain).path, max(arch)
    codes = [(number, f"sm_{number}") for number in arch] + [(newest, f"compute_{newest}")]
    targets = [word for number, code in codes for word in ("-gencode", f"arch=compute_{number},code={code}")]
    includes = [f"-I{SOURCES}"]
    if kind is Library.PLUGINS and toolchain.tensorrt:
        includes += ["-isystem", str(toolchain.tensorrt.folder)]
    # The nvcc of the pip package searches lib64 for the CUDA runtime, but the package has lib.
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
            "sources that compile",
            "try another CUDA version or host compiler (NVCC_CCBIN); if neither helps, report this with the output",
        )


def _nvcc(toolchain: Toolchain) -> Nvcc:
    if toolchain.nvcc is None:
        raise UserError("no nvcc on this machine", f"nvcc, for {NVCC.enables}", NVCC.remedy)
    return toolchain.nvcc
