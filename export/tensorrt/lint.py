"""Checks an ONNX graph against what TensorRT's parser takes, without TensorRT.

It says before an engine is tried, and on a machine without a GPU, which nodes the parser rejects and which make an
engine slow. It cannot prove that an engine builds: the builder has limits of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import onnx

from maskrcnn.export.graph import constants_of, tensor_types, with_shapes
from maskrcnn.export.tensorrt import operators
from maskrcnn.export.tensorrt.lint_rules import Origins, Problem, Scope, origins_of, problems_of
from maskrcnn.plugins import contract

_EXAMPLES = 3  # nodes shown of each problem


class Severity(str, Enum):
    """What a finding means for the engine."""

    ERROR = "error"  # the parser rejects the node
    WARNING = "warning"  # slow, or taken by some versions only


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One node that TensorRT rejects or runs badly."""

    severity: Severity
    node: str  # its name; "" for what concerns the whole file
    op: str  # with its domain, where that is not ONNX's
    output: str  # the first tensor it makes
    graph: str  # "" for the main graph, else the way to the graph inside a node
    why: str
    remedy: str
    source: str  # of the rule


@dataclass(frozen=True)
class LintReport:
    """All findings about one graph."""

    findings: tuple[Finding, ...]
    nodes: int  # looked at, those of inner graphs and functions included

    @property
    def errors(self) -> list[Finding]:
        """What the parser rejects."""
        return [finding for finding in self.findings if finding.severity is Severity.ERROR]

    @property
    def warnings(self) -> list[Finding]:
        """What is slow, or depends on the version of TensorRT."""
        return [finding for finding in self.findings if finding.severity is Severity.WARNING]

    def text(self) -> str:
        """A line that sums up, then each problem with its first nodes, what to do, and where the rule comes from."""
        lines = [f"{self.nodes} nodes: {len(self.errors)} errors, {len(self.warnings)} warnings"]
        for severity, findings in ((Severity.ERROR, self.errors), (Severity.WARNING, self.warnings)):
            groups: dict[tuple[str, str, str, str], list[Finding]] = {}
            for finding in findings:
                groups.setdefault((finding.op, finding.why, finding.remedy, finding.source), []).append(finding)
            for (op, why, remedy, source), members in groups.items():
                lines += ["", f"{severity.value}: {len(members)} × {op}: {why}"]
                lines += [f"    {_place(finding)}" for finding in members[:_EXAMPLES] if finding.node or finding.output]
                if len(members) > _EXAMPLES:
                    lines.append(f"    … and {len(members) - _EXAMPLES} more")
                lines += [f"    fix: {remedy}", f"    source: {source}"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {
            "nodes": self.nodes,
            "errors": [_as_json(finding) for finding in self.errors],
            "warnings": [_as_json(finding) for finding in self.warnings],
        }


def lint(proto: onnx.ModelProto) -> LintReport:
    """Looks at every node, those inside nodes and functions included.

    Give it the flavour for TensorRT (`tensorrt_flavour`) of a file of ours; other files as they are.

    Args:
        proto: with its weights, or at least with its small constants, in the file. It is not changed.

    Raises:
        onnx.shape_inference.InferenceError, onnx.checker.ValidationError: for graphs that are no valid ONNX.
    """
    proto = with_shapes(proto)
    findings, nodes = list(_file_findings(proto)), 0
    for scope in _scopes(proto):
        for node in scope.graph.node:
            nodes += 1
            findings += [_finding(problem, node, scope) for problem in problems_of(node, scope)]
    return LintReport(tuple(findings), nodes)


def _file_findings(proto: onnx.ModelProto) -> Iterator[Finding]:
    version = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if version not in operators.OPSETS_EVERYWHERE:
        newer = version in operators.OPSETS
        why = f"opset {version} is {'documented for TensorRT 10.15, not for 10.1' if newer else 'not documented'}"
        yield _about_file("opset", why, "export with opset 20", operators.MATRIX)
    for function in proto.functions:
        why = "a function of the file; by its version, the parser expands it even where a plugin has its name"
        remedy = "make the flavour without functions: maskrcnn.export.tensorrt.flavour.tensorrt_flavour"
        if function.name not in contract.OPS:
            remedy = "inline it: onnx.inliner.inline_local_functions"
        yield _about_file(f"{function.domain}::{function.name}", why, remedy, operators.CHANGELOG)


def _about_file(op: str, why: str, remedy: str, source: str) -> Finding:
    return Finding(
        severity=Severity.WARNING, node="", op=op, output="", graph="", why=why, remedy=remedy, source=source
    )


def _scopes(proto: onnx.ModelProto) -> Iterator[Scope]:
    """The main graph, the graphs inside its nodes, and the bodies of functions."""
    yield from _scopes_of(proto.graph, "", None)
    for function in proto.functions:
        body = onnx.GraphProto(node=function.node)
        yield from _scopes_of(body, f"function {function.name}", None)


def _scopes_of(graph: onnx.GraphProto, where: str, outer: Scope | None) -> Iterator[Scope]:
    known = {**(outer.known if outer else {}), **tensor_types(graph)}
    origins: Origins = origins_of(graph, known, outer.origins if outer else None)
    constants = {**(outer.constants if outer else {}), **constants_of(graph)}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    scope = Scope(graph, where, known, origins, constants, readers, is_main=not where)
    yield scope
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
            for part in inner:
                path = f"{node.name or node.op_type}/{attribute.name}"
                yield from _scopes_of(part, f"{where}/{path}" if where else path, scope)


def _finding(problem: Problem, node: onnx.NodeProto, scope: Scope) -> Finding:
    return Finding(
        severity=Severity.ERROR if problem.is_error else Severity.WARNING,
        node=node.name,
        op=f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type,
        output=next((name for name in node.output if name), ""),
        graph=scope.where,
        why=problem.why,
        remedy=problem.remedy,
        source=problem.source,
    )


def _place(finding: Finding) -> str:
    inside = f" in {finding.graph}" if finding.graph else ""
    return f"{finding.node or 'a node without name'} → {finding.output}{inside}"


def _as_json(finding: Finding) -> dict[str, str]:
    return {key: value.value if isinstance(value, Enum) else value for key, value in vars(finding).items()}
