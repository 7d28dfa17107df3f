"""Which nodes of a model ONNX Runtime gives to which execution provider on this machine.

A node that a GPU provider does not take runs on the CPU, and its tensors travel there and back. Each provider is
tried in a process of its own: those that lack libraries complain on the standard output, or crash.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from maskrcnn.runtime.backends.onnxruntime import session_options
from maskrcnn.runtime.backends.onnxruntime_providers import RECORD, Placement, placement_in

TIMEOUT_S = 300.0  # for one provider; TensorRT builds engines when a session is made
_CPU = "CPUExecutionProvider"
_MARK = "maskrcnn-placement:"  # begins the line of the answer among whatever a library prints
_CODE = "import sys; sys.path = [p for p in sys.path if p] + [{root!r}]; from maskrcnn.export.placement import answer; "


def placements(path: Path) -> list[Placement] | None:
    """The placement on every provider that this ONNX Runtime was compiled with; None without ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return [_asked(path, provider) for provider in onnxruntime.get_available_providers()]


def _asked(path: Path, provider: str) -> Placement:
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", f"{_CODE.format(root=root)}answer({str(path)!r}, {provider!r})"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Placement(provider, why_not=f"cannot be asked ({type(error).__name__})")
    printed, complaints = (text.decode("utf-8", errors="replace") for text in (done.stdout, done.stderr))
    answers = [line.removeprefix(_MARK) for line in printed.splitlines() if line.startswith(_MARK)]
    if not answers:
        last = next((line for line in reversed(complaints.splitlines()) if line.strip()), f"exit {done.returncode}")
        return Placement(provider, why_not=f"its process ended without an answer: {last[:200]}")
    found = Placement(**json.loads(answers[-1]))
    if found.why_not:
        lacks = re.search(r"lib\S+: cannot open shared object file", complaints)
        reason = lacks.group() if lacks else found.why_not
        return Placement(provider, why_not=f"cannot be used here: {reason}")
    return Placement(**{**asdict(found), "left_names": tuple(found.left_names)})


def answer(path: str, provider: str) -> None:
    """Asks ONNX Runtime and prints the answer: the whole work of a provider's process."""
    print(f"\n{_MARK}{json.dumps(asdict(_placement(path, provider)))}", flush=True)


def _placement(path: str, provider: str) -> Placement:
    import onnxruntime

    if provider.startswith(("CUDA", "Tensorrt")) and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's libraries as pip installs them
    options = session_options()
    options.add_session_config_entry(RECORD, "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=list(dict.fromkeys([provider, _CPU])))
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        return Placement(provider, why_not=str(error).splitlines()[0][:200])
    if provider not in session.get_providers():
        return Placement(provider, why_not="ONNX Runtime fell back to the CPU")
    return placement_in(session, provider)
