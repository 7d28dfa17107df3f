"""Node placement: which nodes of a model ONNX Runtime assigns to which execution provider.

A node that a GPU provider does not support runs on the CPU, and its tensors are copied there and back. `placement_in`
reads the placement of an open session. `placements` tries every provider of the installed ONNX Runtime, each in a
subprocess: a provider whose libraries are missing prints to standard output or crashes.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from maskrcnn import errors

RECORD = "session.record_ep_graph_assignment_info"  # session option that makes ONNX Runtime record the placement
_TIMEOUT_S = 300.0  # per provider; the TensorRT provider builds its engines when a session is created
_SUFFIX = "ExecutionProvider"
_CPU = f"CPU{_SUFFIX}"
_MAX_NODE_NAMES = 8
_MARK = "maskrcnn-placement:"  # marks the result line among output of the libraries
_CODE = (
    # Without the working directory: a folder `onnxruntime` there would be imported instead of the library.
    "import sys; sys.path = [folder for folder in sys.path if folder] + [{package_parent!r}]; "
    "from maskrcnn.runtime.backends.placement import print_placement; print_placement({path!r}, {provider!r})"
)


@dataclass(frozen=True)
class Placement:
    """Placement of a model's nodes, with inlined functions, in a session with one preferred provider."""

    provider: str  # ONNX Runtime's name
    taken: dict[str, int] = field(default_factory=dict)  # number of nodes on the provider, by operator
    left: dict[str, int] = field(default_factory=dict)  # number of nodes on the CPU instead, by operator
    left_names: tuple[str, ...] = ()  # names of the first nodes on the CPU
    why_not: str = ""  # reason why the provider or its placement is not available
    elsewhere: dict[str, int] = field(default_factory=dict)  # number of nodes on each other provider, e.g. CUDA

    def text(self) -> str:
        """One-line summary."""
        name = self.provider.removesuffix(_SUFFIX)
        if self.why_not:
            return f"{name}: {self.why_not}"
        taken, left = sum(self.taken.values()), sum(self.left.values())
        total = taken + left + sum(self.elsewhere.values())
        if taken == total:
            return f"{name}: all {taken} nodes"
        parts = [f"{name}: {taken} of {total} nodes"]
        parts += [f"{other.removesuffix(_SUFFIX)}: {count}" for other, count in self.elsewhere.items()]
        if left:
            operators = ", ".join(f"{op} {count}" for op, count in self.left.items())
            parts.append(f"left to the CPU: {operators} ({', '.join(self.left_names)})")
        return "; ".join(parts)


def placement_in(session: Any, provider: str) -> Placement:
    """Returns the placement of a session's nodes.

    Args:
        session: an `onnxruntime.InferenceSession` created with the session option `RECORD` set to "1".
        provider: the preferred provider, by ONNX Runtime's name.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return Placement(provider, why_not="ONNX Runtime 1.31 or newer is needed to report the placement")
    taken: Counter[str] = Counter()
    left: Counter[str] = Counter()
    elsewhere: Counter[str] = Counter()
    names: list[str] = []
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            if part.ep_name == provider:
                taken[node.op_type] += 1
            elif part.ep_name == _CPU:
                left[node.op_type] += 1
                names.append(node.name)
            else:
                elsewhere[part.ep_name] += 1
    return Placement(
        provider,
        dict(taken.most_common()),
        dict(left.most_common()),
        tuple(names[:_MAX_NODE_NAMES]),
        elsewhere=dict(elsewhere),
    )


def placements(path: Path) -> list[Placement] | None:
    """Returns the placement of an ONNX file's nodes for every provider of the installed ONNX Runtime.

    Args:
        path: any ONNX file.

    Returns:
        One placement per provider, or None if ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    return [_placement_in_subprocess(path, provider) for provider in onnxruntime.get_available_providers()]


def _placement_in_subprocess(path: Path, provider: str) -> Placement:
    package_parent = str(Path(inspect.getfile(errors)).resolve().parents[1])
    code = _CODE.format(package_parent=package_parent, path=str(path), provider=provider)
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Placement(provider, why_not=f"its process failed ({type(error).__name__})")
    output, messages = (text.decode("utf-8", errors="replace") for text in (done.stdout, done.stderr))
    results = [line.removeprefix(_MARK) for line in output.splitlines() if line.startswith(_MARK)]
    if not results:
        last = next((line for line in reversed(messages.splitlines()) if line.strip()), f"exit {done.returncode}")
        return Placement(provider, why_not=f"its process ended without a result: {last}")
    values = json.loads(results[-1])
    if values["why_not"]:
        library = re.search(r"lib\S+: cannot open shared object file", messages)
        reason = library.group() if library else values["why_not"]
        return Placement(provider, why_not=f"cannot be used here: {reason}")
    return Placement(**{**values, "left_names": tuple(values["left_names"])})


def print_placement(path: str, provider: str) -> None:
    """Prints the placement of a file's nodes for one provider as JSON; each subprocess runs this function."""
    print(f"\n{_MARK}{json.dumps(asdict(_placement_of(path, provider)))}", flush=True)


def _placement_of(path: str, provider: str) -> Placement:
    import onnxruntime

    if provider.startswith(("CUDA", "Tensorrt")) and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # load the CUDA libraries that pip installed
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry(RECORD, "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=list(dict.fromkeys([provider, _CPU])))
    except Exception as error:  # ONNX Runtime's exceptions have no public base class
        return Placement(provider, why_not=errors.reason_of(error))
    if provider not in session.get_providers():
        return Placement(provider, why_not="ONNX Runtime fell back to the CPU")
    return placement_in(session, provider)
