"""Which nodes of a model an ONNX Runtime session gave to a provider, and which it left to the CPU.

A node that a GPU provider does not take runs on the CPU, and its tensors travel there and back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

RECORD = "session.record_ep_graph_assignment_info"  # the entry of a session's options that makes it remember
_EXAMPLES = 8
_SUFFIX = "ExecutionProvider"
_CPU = f"CPU{_SUFFIX}"


@dataclass(frozen=True)
class Placement:
    """What one provider does with the nodes of a model, functions inlined."""

    provider: str
    taken: dict[str, int] = field(default_factory=dict)  # nodes by operator
    left: dict[str, int] = field(default_factory=dict)  # those that the CPU gets instead
    left_names: tuple[str, ...] = ()  # of the first few
    why_not: str = ""  # why the provider cannot be used here, or cannot be asked
    elsewhere: dict[str, int] = field(default_factory=dict)  # nodes by other providers, as CUDA behind TensorRT

    def text(self) -> str:
        """One line."""
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
    """What a provider took of a session's model; the session was made with `RECORD` set to "1"."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return Placement(provider, why_not="this version of ONNX Runtime does not tell; 1.31 does")
    taken, left, elsewhere, names = Counter(), Counter(), Counter(), []
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
        tuple(names[:_EXAMPLES]),
        elsewhere=dict(elsewhere),
    )
