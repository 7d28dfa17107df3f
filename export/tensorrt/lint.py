"""Lint of an ONNX graph for TensorRT's parser, without TensorRT or a GPU.

It reports the nodes that the parser rejects and those that make an engine slow. It cannot prove that an engine builds,
because the builder has further limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import onnx

from maskrcnn.export.graph import constants_of, tensor_types, with_shapes
from maskrcnn.export.tensorrt import operators
from maskrcnn.export.tensorrt.lint_rules import Problem, Scope, origins_of, problems_of
from maskrcnn.plugins import contract

_MAX_EXAMPLES = 3  # nodes shown per problem


class Severity(str, Enum):
    """Consequence of a finding."""

    ERROR = "error"  # the parser rejects the node
    WARNING = "warning"  # slow, or supported by some versions of TensorRT only


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A problem of one node or of the whole file."""

    severity: Severity
    node: str  # node name; "" for the whole file
    op: str  # operator, with its domain if it is not ONNX's
    output: str  # first output of the node
    graph: str  # path of the subgraph; "" for the main graph
    why: str
    remedy: str
    source: str  # document that the rule comes from


@dataclass(frozen=True)
class LintReport:
    """All findings of one file."""

    findings: tuple[Finding, ...]
    nodes: int  # number of checked nodes, including those in subgraphs and functions

    @property
    def errors(self) -> list[Finding]:
        """Nodes that the parser rejects."""
        return [finding for finding in self.findings if finding.severity is Severity.ERROR]

    @property
    def warnings(self) -> list[Finding]:
        """Nodes that are slow or depend on the version of TensorRT."""
        return [finding for finding in self.findings if finding.severity is Severity.WARNING]

    def text(self) -> str:
        """Report: a summary line, then each problem with its first nodes, the fix and the source of the rule."""
        lines = [f"{self.nodes} nodes: {len(self.errors)} errors, {len(self.warnings)} warnings"]
        for severity, findings in ((Severity.ERROR, self.errors), (Severity.WARNING, self.warnings)):
            groups: dict[tuple[str, str, str, str], list[Finding]] = {}
            for finding in findings:
                groups.setdefault((finding.op, finding.why, finding.remedy, finding.source), []).append(finding)
            for (op, why, remedy, source), members in groups.items():
                lines += ["", f"{severity.value}: {len(members)} × {op}: {why}"]
                shown = members[:_MAX_EXAMPLES]
                lines += [f"    {_place(finding)}" for finding in shown if finding.node or finding.output]
                if len(members) > _MAX_EXAMPLES:
                    lines.append(f"    … and {len(members) - _MAX_EXAMPLES} more")
                lines += [f"    fix: {remedy}", f"    source: {source}"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "nodes": self.nodes,
            "errors": [{**vars(finding), "severity": finding.severity.value} for finding in self.errors],
            "warnings": [{**vars(finding), "severity": finding.severity.value} for finding in self.warnings],
        }


def lint(proto: onnx.ModelProto) -> LintReport:
    """Checks every node, including those in subgraphs and functions.

    Args:
        proto: model with at least its small constants in the file; it is not changed. For a file of this package, pass
            its `tensorrt_flavour`.

    Raises:
        onnx.shape_inference.InferenceError, onnx.checker.ValidationError: if the model is not valid ONNX.
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
        yield _file_warning("opset", why, "export with opset 20", operators.MATRIX)
    for function in proto.functions:
        why = "a function in the file; some versions of the parser expand it even if a plugin has its name"
        remedy = "use the flavour without functions: maskrcnn.export.tensorrt.flavour.tensorrt_flavour"
        if function.name not in contract.OPS:
            remedy = "inline it: onnx.inliner.inline_local_functions"
        yield _file_warning(f"{function.domain}::{function.name}", why, remedy, operators.CHANGELOG)


def _file_warning(op: str, why: str, remedy: str, source: str) -> Finding:
    return Finding(
        severity=Severity.WARNING, node="", op=op, output="", graph="", why=why, remedy=remedy, source=source
    )


def _scopes(proto: onnx.ModelProto) -> Iterator[Scope]:
    """The main graph, the subgraphs of its nodes, and the bodies of functions."""
    yield from _scopes_of(proto.graph, "", None)
    for function in proto.functions:
        body = onnx.GraphProto(node=function.node)
        yield from _scopes_of(body, f"function {function.name}", None)


def _scopes_of(graph: onnx.GraphProto, path: str, outer: Scope | None) -> Iterator[Scope]:
    known = {**(outer.known if outer else {}), **tensor_types(graph)}
    origins = origins_of(graph, known, outer.origins if outer else None)
    constants = {**(outer.constants if outer else {}), **constants_of(graph)}
    scope = Scope(graph, path, known, origins, constants)
    yield scope
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
                inner = f"{node.name or node.op_type}/{attribute.name}"
                yield from _scopes_of(subgraph, f"{path}/{inner}" if path else inner, scope)


def _finding(problem: Problem, node: onnx.NodeProto, scope: Scope) -> Finding:
    return Finding(
        severity=Severity.ERROR if problem.is_error else Severity.WARNING,
        node=node.name,
        op=f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type,
        output=next((name for name in node.output if name), ""),
        graph=scope.path,
        why=problem.why,
        remedy=problem.remedy,
        source=problem.source,
    )


def _place(finding: Finding) -> str:
    inside = f" in {finding.graph}" if finding.graph else ""
    return f"{finding.node or 'unnamed node'} → {finding.output}{inside}"
