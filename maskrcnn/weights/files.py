"""Reading the tensors of weight files of any origin, without executing their content.

A pickle is a program that looks up functions by name and calls them. The unpickler here knows only those that rebuild
tensors and arrays; every other name is replaced by an inert stand-in, so that any checkpoint opens regardless of its
optimizer and arguments, and nothing in it is imported or called.

The kind of a file is determined from its first bytes, not from its suffix.
"""

from __future__ import annotations

import functools
import pickle
import re
import tarfile
import types
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskrcnn.errors import UserError
from maskrcnn.weights.checkpoint import SUFFIX, read_safetensors
from maskrcnn.weights.detectron2 import is_detectron2

PICKLE_SUFFIX = ".pkl"  # of files in Detectron2's model zoo
SUFFIXES = (SUFFIX, PICKLE_SUFFIX, ".pth", ".pt", ".bin", ".ckpt")
_JOIN = "write them into one file: model.save_pretrained(DIR, max_shard_size='100GB'), or join the parts' tensors"
_SAVE = "save only the weights: torch.save(model.state_dict(), FILE)"


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """Tensors of a file, by their names in the model itself."""

    tensors: dict[str, Tensor]
    header: dict[str, Any] | None = None  # maskrcnn's, if the file is one of its checkpoints
    meta: dict[str, Any] = field(default_factory=dict)  # the entry "meta", mmdetection's description of a model
    notes: tuple[str, ...] = ()  # notes on what was unwrapped, stripped or left out


def read_weights(path: Path) -> WeightFile:
    """Read the tensors of a file: safetensors, a file written by any version of torch.save, or a pickle of arrays.

    The state dict of a training checkpoint is found in its entries, and wrapper prefixes (`module.`, `_orig_mod.`,
    `model.`) are stripped from its names. Tensors are loaded to the CPU, regardless of the device they were saved on.

    Raises:
        UserError: for a missing or damaged file, one of another kind, or one without a state dict.
    """
    if path.is_dir():
        inside = sorted(each.name for each in path.iterdir() if each.suffix in SUFFIXES)
        raise UserError(
            f"{path}: a folder", "a file of weights", f"give the file: {path / inside[0] if inside else 'PATH.pth'}"
        )
    if not path.is_file():
        raise UserError(f"no file {path}", "a file of weights", "check the path given with --weights")
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "a readable file", "check its permissions") from error
    if (part := re.search(r"-(\d{5})-of-(\d{5})\.", path.name)) and int(part[2]) > 1:
        raise _other(path, f"part {int(part[1])} of {int(part[2])} of the weights", _JOIN)
    if head[8:9] == b"{":
        try:
            tensors, header = read_safetensors(path)
        except UserError as error:
            raise _damaged(path, error.found.partition(": ")[2]) from error
        return WeightFile(tensors=tensors, header=header) if header is not None else _cleaned(path, tensors, {}, [])
    if path.name.endswith(".index.json"):
        raise _other(path, "the index of a file in parts", _JOIN)
    content = _unpickled(path, head)
    found, notes = _state_dict(path, content)
    tensors = {name: value for name, value in ((str(k), _tensor(v)) for k, v in found.items()) if value is not None}
    if len(tensors) < len(found):
        others = [str(name) for name, value in found.items() if _tensor(value) is None]
        notes.append(f"left out entries that are not tensors: {_listed(others)}")
    meta = content.get("meta") if isinstance(content, dict) else None
    return _cleaned(path, tensors, meta if isinstance(meta, dict) else {}, notes)


def _listed(names: Iterable[Any], most: int = 6) -> str:
    """The first `most` names."""
    names = list(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Kinds of files

# First bytes of files that are mistaken for weights, with their kind and the fix.
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch the file: git lfs pull"),
    (b"\x89HDF", "an HDF5 file", "use PyTorch weights; Keras and TensorFlow weights are not supported"),
    (b"\x1f\x8b", "a gzip archive", "unpack it, and name the file of weights in it"),
    (b"BZh", "a bzip2 archive", "unpack it, and name the file of weights in it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it, and name the file of weights in it"),
    (b"\x93NUMPY", "a NumPy array", _SAVE),
)
_TORCH_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # of files written by torch.save before PyTorch 1.6


def _unpickled(path: Path, head: bytes) -> Any:
    """Content of a pickle or a file written by torch.save."""
    try:
        if head.startswith(b"PK"):
            _check_archive(path)
        elif tarfile.is_tarfile(path):
            raise _other(
                path, "a tar archive", "unpack it, or if PyTorch 0.1 wrote it, save it again with a newer version"
            )
        elif _TORCH_MAGIC not in head[:20]:
            if (found := _what(path, head)) is not None:
                raise found
            with open(path, "rb") as file:
                return _TensorsOnly(file, encoding="latin1").load()  # the encoding of arrays pickled by Python 2
        restricted: Any = _RESTRICTED  # torch annotates a module, and uses two of its names
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=restricted, encoding="latin1")
    except UserError:
        raise
    except _UnknownTypeError as error:
        raise UserError(
            f"{path}: tensors in a type of later PyTorch versions, such as float8 or uint16",
            "tensors of float32, float16 or bfloat16",
            "save them in one of these: {name: value.float() for name, value in state_dict.items()}",
        ) from error
    except Exception as error:  # a damaged file can raise nearly any error
        reason = str(error).splitlines()[0] if str(error) else ""
        raise _damaged(path, f"{type(error).__name__}: {reason}") from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: a damaged or incomplete file of {path.stat().st_size:,} bytes ({reason})",
        "a complete file of torch.save(model.state_dict(), …), safetensors, or a .pkl of Detectron2's model zoo",
        "copy or download it again, and compare its size with the original's",
    )


def _check_archive(path: Path) -> None:
    """Reject zip archives that torch.save did not write."""
    names = zipfile.ZipFile(path).namelist()
    for suffix, what in (("/constants.pkl", "a TorchScript program"), ("/models/model.json", "a torch.export program")):
        if any(name.endswith(suffix) for name in names):
            raise _other(path, what, "save the state dict of the model that it was made from")
    if not any(name.endswith("data.pkl") for name in names):
        raise _other(path, f"a zip archive with {_listed(names, 3)}", "unpack it, and name the file of weights in it")


def _what(path: Path, head: bytes) -> UserError | None:
    """The error for a file that is neither from torch.save nor a pickle."""
    for start, what, fix in _OTHERS:
        if head.startswith(start):
            return _other(path, what, fix)
    if not head:
        return _other(path, "an empty file", "copy or download it again")
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return _other(path, "a web page", "download the file itself; the page may ask for a login or a confirmation")
    if path.suffix == ".onnx":
        fix = "give the checkpoint that it was exported from; `maskrcnn export FILE.onnx --precision …` converts it"
        return _other(path, "an ONNX file", fix)
    is_pickle = head[:1] == b"\x80" or path.suffix == PICKLE_SUFFIX
    if is_pickle:
        return None
    if not re.search(rb"[^\t\n\r\x20-\x7e\x80-\xff]", head):
        line = head.decode("utf-8", errors="replace").strip().splitlines()
        return _other(path, f"a text file ({line[0][:60] if line else 'blank'})", "give the weight file itself")
    return _other(path, f"an unknown kind of file (first bytes {head[:8].hex(' ')})", _SAVE)


def _other(path: Path, what: str, fix: str) -> UserError:
    return UserError(
        f"{path}: {what}", "a state dict: a .pth file of torch.save, .safetensors, or a .pkl of Detectron2", fix
    )


# Unpickling


class _StandIn:
    """Placeholder for an object whose class or function was not looked up; accepts all operations of a pickle."""

    origin = ""  # module and name in the pickle
    dump_patches = False  # read by torch.load

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **options: Any) -> _StandIn:
        return self

    def _ignore(self, *arguments: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = update = _ignore


@functools.cache
def _stand_in(origin: str) -> type[_StandIn]:
    return type("_StandIn", (_StandIn,), {"origin": origin})


def _encoded(text: str, encoding: str) -> bytes:
    """Replaces `_codecs.encode`, with which Python 3 writes bytes that Python 2 can read."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Replaces `bytes`, which Python 3 calls for empty bytes; an argument could exhaust the memory."""
    return b""


def _dense(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    """A tensor without the gradient hooks and attributes that may follow."""
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _of_type(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    """A tensor whose type differs from its storage's: rest is requires_grad, hooks and the type."""
    return torch._utils._rebuild_tensor_v3(storage, offset, size, stride, False, OrderedDict(), rest[2])


def _data(data: Any, *rest: Any) -> Any:
    """A parameter as its tensor."""
    return data


def _plain(function: Callable[..., Any], kind: Any, arguments: tuple[Any, ...], state: Any) -> Any:
    """A tensor of a subclass, or with attributes, as a plain tensor."""
    return function(*arguments) if function in (_dense, _of_type, _data) else _stand_in(f"{function}")()


# The first element of a reduced array or scalar is the function that rebuilds it.
_REBUILDING = {
    "multiarray._reconstruct": np.zeros(1).__reduce__()[0],
    "numeric._frombuffer": np.zeros(1).__reduce_ex__(5)[0],
    "multiarray.scalar": np.float32(0).__reduce__()[0],
}
_ALLOWED: dict[str, Any] = {
    "numpy.dtype": np.dtype,
    "numpy.ndarray": np.ndarray,
    **{f"numpy.core.{name}": function for name, function in _REBUILDING.items()},  # NumPy 1
    **{f"numpy._core.{name}": function for name, function in _REBUILDING.items()},  # NumPy 2
    "_codecs.encode": _encoded,
    "__builtin__.bytes": _no_bytes,
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _dense,
    "torch._utils._rebuild_tensor_v2": _dense,
    "torch._utils._rebuild_tensor_v3": _of_type,
    "torch._utils._rebuild_parameter": _data,
    "torch._utils._rebuild_parameter_with_state": _data,
    "torch._tensor._rebuild_from_type_v2": _plain,
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


class _UnknownTypeError(Exception):
    """A tensor of a type without a storage class, such as float8 and the wider unsigned integers."""


class _TensorsOnly(pickle.Unpickler):
    """Unpickler that resolves only the names in `_ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        """The replacement for a name in the pickle."""
        origin = f"{module}.{name}"
        if origin == "torch.storage.UntypedStorage":
            raise _UnknownTypeError
        return _ALLOWED[origin] if origin in _ALLOWED else _stand_in(origin)


def _load(file: Any, **options: Any) -> Any:
    return _TensorsOnly(file, **options).load()


_RESTRICTED = types.SimpleNamespace(__name__="restricted_pickle", Unpickler=_TensorsOnly, load=_load)


# State dicts

# Entries of a checkpoint that may contain the model's weights, in search order: those of Lightning, mmdetection and
# common training scripts; averaged weights last.
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "model_state", "net", "network", "detector", "weights", "params"),
    *("module", "ema", "model_ema", "ema_state_dict", "state_dict_ema"),
)


def _tensor(value: Any) -> Tensor | None:
    """A tensor from a tensor or a numeric array."""
    if isinstance(value, Tensor):
        return value.detach() if value.layout == torch.strided and not value.is_quantized else None
    if isinstance(value, (np.ndarray, np.number)) and value.dtype.kind in "fiu":
        return torch.tensor(value)
    return None


def _holds_weights(value: Any, depth: int = 4) -> bool:
    """Whether a dictionary, or one nested in it, contains tensors."""
    if not isinstance(value, dict) or not depth:
        return False
    return any(_tensor(each) is not None or _holds_weights(each, depth - 1) for each in value.values())


def _state_dict(path: Path, content: Any) -> tuple[dict[str, Any], list[str]]:
    """The state dict in a file's content, and notes on what was left out."""
    notes: list[str] = []
    found, entry = content, ""
    while isinstance(found, dict):
        key = next((key for key in _WRAPPERS if _holds_weights(found.get(key))), None)
        if key is None and not any(_tensor(value) is not None for value in found.values()):
            holding = [k for k, v in found.items() if _holds_weights(v) and k not in ("optimizer", "optimizer_states")]
            key = holding[0] if len(holding) == 1 else None
            if key is None:
                break
        if key is None:
            return _without_objects(path, found, entry), notes
        others = [name for name in found if name != key]
        notes.append(f"took the entry {key!r}" + (f"; left out {_listed(others)}" if others else ""))
        found, entry = found[key], f"{key!r} "
    raise _no_state_dict(path, found, entry)


def _without_objects(path: Path, found: dict[Any, Any], entry: str) -> dict[str, Any]:
    """The state dict itself; an object of unknown class among its tensors is an error."""
    strange = [(name, value) for name, value in found.items() if isinstance(value, _StandIn)]
    modules = [pair for pair in strange if not str(pair[0]).endswith("_extra_state")]
    if modules:
        name, value = modules[0]
        if value.origin in _OTHER_TENSORS:
            raise _other_tensor(path, f"{entry}{name!r}", value)
        raise UserError(
            f"{path}: {entry}{name!r} is a pickled {value.origin}, which was not run",
            "tensors only, by name",
            f"{_SAVE}; a pickle can execute any program, so verify the origin of this file",
        )
    return found


# Functions that rebuild tensors that cannot be read as weights, and the kinds of these tensors.
_OTHER_TENSORS = {
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values (device meta)",
}


def _other_tensor(path: Path, where: str, value: _StandIn) -> UserError:
    return UserError(
        f"{path}: {where} is {_OTHER_TENSORS[value.origin]}",
        "dense tensors of float32, float16 or bfloat16, with their values",
        "save the model before quantisation, or its tensors converted to dense ones on the CPU",
    )


def _no_state_dict(path: Path, found: Any, entry: str) -> UserError:
    """The error for content without a state dict."""
    inside = list(found.items()) if isinstance(found, dict) else [("", found)]
    pickled = [(name, value) for name, value in inside if isinstance(value, _StandIn)]
    named = [pair for pair in pickled if pair[0] in ("", *_WRAPPERS)] or pickled
    if named:
        name, value = named[0]
        if value.origin in _OTHER_TENSORS:
            return _other_tensor(path, repr(name), value)
        where = f"{name!r} is " if name else ""
        return UserError(
            f"{path}: {where}a whole pickled object, {value.origin}, not its weights",
            "a state dict; objects are not unpickled, since that executes any program in the file",
            f"load it where it was created, and {_SAVE}",
        )
    several = [str(name) for name, value in inside if _holds_weights(value) and not str(name).startswith("optimizer")]
    if len(several) > 1:
        return UserError(
            f"{path}: {entry}several entries that hold weights ({_listed(several)})",
            "one state dict, or a checkpoint with one as its 'model' or 'state_dict'",
            f"save the one to use: torch.save(torch.load(FILE)[{several[0]!r}], 'weights.pth')",
        )
    what = f"a {type(found).__name__}" + (f" with {_listed(found)}" if isinstance(found, dict) and found else "")
    return UserError(
        f"{path}: {entry}{what} that holds no weights",
        "a state dict, which maps names to tensors, or a checkpoint with one as its 'model' or 'state_dict'",
        _SAVE,
    )


# Names

# Components that wrappers add to names: data parallelism, torch.compile, FSDP, activation checkpointing.
_WRAPPING = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# First components of a detector's or a classifier's names; everything before them is a prefix.
_DETECTOR = re.compile(r"((?:\w+\.)*?)backbone\.")
_CLASSIFIER = re.compile(r"((?:\w+\.)*?)(?:layer1|features)\.")


def _cleaned(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], notes: list[str]) -> WeightFile:
    """The file without prefixes in its names, and with torchvision's current names instead of former ones."""
    plain = {".".join(part for part in name.split(".") if part not in _WRAPPING): name for name in tensors}
    if len(plain) == len(tensors) and (wrapped := [old for new, old in plain.items() if new != old]):
        parts = [part for part in _WRAPPING if any(part in name.split(".") for name in wrapped)]
        notes = [*notes, f"stripped {', '.join(f'{part}.' for part in parts)} from {len(wrapped)} names"]
        tensors = {new: tensors[old] for new, old in plain.items()}
    matches = [found for name in tensors if (found := _DETECTOR.match(name))]
    matches = matches or [found for name in tensors if (found := _CLASSIFIER.match(name))]
    prefixes = list(dict.fromkeys(found[1] for found in matches))
    if prefixes and "" not in prefixes:
        prefix = prefixes[0]
        others = Counter(name.split(".")[0] for name in tensors if not name.startswith(prefix))
        notes = [*notes, f"stripped the prefix {prefix}"]
        if others:
            notes[-1] += "; left out " + ", ".join(f"{count} tensors of {name}" for name, count in others.items())
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not is_detectron2(tensors):  # some of its names are former names of torchvision's
        tensors = {_current_name(name): value for name, value in tensors.items()}
    return WeightFile(tensors=tensors, meta=meta, notes=tuple(f"{path.name}: {note}" for note in notes))


# Former torchvision names and their replacements.
_RENAMED: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"(rpn\.head\.conv)\.(weight|bias)"), r"\1.0.0.\2"),
    (re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)"), r"\1.0.\2"),
    (
        re.compile(r"roi_heads\.mask_head\.mask_fcn(\d+)\.(weight|bias)"),
        lambda found: f"roi_heads.mask_head.{int(found[1]) - 1}.0.{found[2]}",
    ),
)


def _current_name(name: str) -> str:
    """Current name of a tensor that torchvision has renamed."""
    for pattern, present in _RENAMED:
        if found := pattern.fullmatch(name):
            return present(found) if callable(present) else found.expand(present)
    return name
