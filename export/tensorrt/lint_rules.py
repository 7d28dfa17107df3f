"""Rules of `export/tensorrt/lint.py`: problems of a single node, and the analysis of value origins that they use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import onnx

from maskrcnn.export.graph import constant_value, is_static
from maskrcnn.export.tensorrt import operators as table
from maskrcnn.export.tensorrt.flavour import PLUGIN_ATTRIBUTES, PLUGIN_NAMESPACE
from maskrcnn.export.tensorrt.operators import DATA_DEPENDENT, HOST_OPS, SIZE_INPUTS
from maskrcnn.plugins import contract

# Value origins

_SIZED_BY_VALUES = (*DATA_DEPENDENT, "Unique", "Compress")


class Origin(IntEnum):
    """Dependencies of a tensor's value; each member includes the earlier ones."""

    GIVEN = 0  # nothing: an initializer or a Constant node
    COMPUTED = 1  # constants only
    SHAPE = 2  # shapes of the model's inputs
    SHAPE_OF_DATA = 3  # the shape of a tensor whose size depends on values
    INPUT = 4  # an integer input of the model, through arithmetic that runs on the host
    DATA = 5  # values computed on the GPU


@dataclass
class Origins:
    """Value origins of one graph; unknown tensors count as DATA."""

    values: dict[str, Origin] = field(default_factory=dict)
    sized_by_values: set[str] = field(default_factory=set)  # tensors whose size depends on values

    def of(self, name: str) -> Origin:
        """Returns the origin of a tensor's value; GIVEN for an omitted optional input."""
        return self.values.get(name, Origin.DATA) if name else Origin.GIVEN


def origins_of(
    graph: onnx.GraphProto, known: Mapping[str, onnx.TypeProto.Tensor], outer: Origins | None = None
) -> Origins:
    """Propagates origins from constants and inputs through a topologically sorted graph.

    Args:
        graph: main graph or subgraph.
        known: types and shapes by tensor name.
        outer: origins of the enclosing graph.
    """
    found = Origins(dict(outer.values) if outer else {}, set(outer.sized_by_values) if outer else set())
    integers = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
    for value in graph.input:
        is_integer = outer is None and value.type.tensor_type.elem_type in integers
        found.values[value.name] = Origin.INPUT if is_integer else Origin.DATA
    found.values.update({tensor.name: Origin.GIVEN for tensor in graph.initializer})
    for node in graph.node:
        origin, sized = _origin(node, found, known), _is_sized_by_values(node, found)
        for name in node.output:
            found.values[name] = origin
            if sized:
                found.sized_by_values.add(name)
    return found


def _origin(node: onnx.NodeProto, found: Origins, known: Mapping[str, onnx.TypeProto.Tensor]) -> Origin:
    if node.op_type == "Constant":
        return Origin.GIVEN
    if node.op_type in ("Shape", "Size"):
        if node.input[0] in found.sized_by_values:
            return Origin.SHAPE_OF_DATA
        return Origin.COMPUTED if is_static(known.get(node.input[0])) else Origin.SHAPE
    highest = max((found.of(name) for name in node.input), default=Origin.GIVEN)
    if highest <= Origin.COMPUTED:
        return Origin.COMPUTED
    return highest if node.op_type in HOST_OPS and not node.domain else Origin.DATA


def _is_sized_by_values(node: onnx.NodeProto, found: Origins) -> bool:
    if node.op_type in _SIZED_BY_VALUES:
        return True
    if node.op_type in ("Shape", "Size"):
        return False
    deciding = [node.input[k] for k in SIZE_INPUTS.get(node.op_type, ()) if k < len(node.input)]
    by_value = any(found.of(name) >= Origin.SHAPE_OF_DATA for name in deciding)
    return by_value or any(name in found.sized_by_values for name in node.input)


_TYPE_NAMES = {number: name for name, number in onnx.TensorProto.DataType.items()}
_ONNX_DOMAINS = ("", "ai.onnx")
_CONTRACT_TYPES = {
    "float": ("FLOAT", "FLOAT16", "BFLOAT16"),
    "float32": ("FLOAT",),
    "int32": ("INT32",),
    "int64": ("INT64",),
}


# Rules


@dataclass(frozen=True)
class Problem:
    """A violation of a rule."""

    why: str
    remedy: str
    source: str
    is_error: bool = True


@dataclass(frozen=True)
class Scope:
    """A graph and the tensors visible in it, including those of enclosing graphs."""

    graph: onnx.GraphProto
    path: str  # of the subgraph; "" for the main graph
    known: dict[str, onnx.TypeProto.Tensor]
    origins: Origins
    constants: dict[str, onnx.TensorProto | onnx.AttributeProto]

    def type_name(self, name: str) -> str | None:
        """Returns the element type of a tensor, or None if it is unknown."""
        kind = self.known.get(name)
        return _TYPE_NAMES[kind.elem_type] if kind is not None and kind.elem_type else None

    def rank(self, name: str) -> int | None:
        """Returns the number of axes of a tensor, or None if it is unknown."""
        kind = self.known.get(name)
        return len(kind.shape.dim) if kind is not None and kind.HasField("shape") else None


def problems_of(node: onnx.NodeProto, scope: Scope) -> Iterator[Problem]:
    """Yields the problems of a node."""
    if node.domain == contract.DOMAIN:
        yield from _plugin_problems(node, scope)
    elif node.domain not in _ONNX_DOMAINS:
        yield _foreign_problem(node)
    elif node.op_type not in table.SUPPORTED:
        listed = "unsupported" if node.op_type in table.UNSUPPORTED else "not listed"
        listed += " in the support matrix"
        remedy = "implement that part with supported operators or as a plugin"
        yield Problem(f"no importer: {listed}", remedy, table.MATRIX)
    else:
        for rule in (_version, _types, _attributes, _constants, _sizes, _outputs, _operator_rules):
            yield from rule(node, scope)
    yield from _bytes(node, scope)


def _attribute_values(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node, without those that a function body takes from its caller."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}


def _input(node: onnx.NodeProto, position: int) -> str:
    """The name of an input, or "" if it is omitted."""
    return node.input[position] if position < len(node.input) else ""


# Standard operators


def _version(node: onnx.NodeProto, scope: Scope) -> Iterator[Problem]:
    entry = table.SUPPORTED[node.op_type]
    if entry.since > table.OLDEST:
        since = ".".join(map(str, entry.since))
        yield Problem(f"TensorRT {since} or newer only", "use older operators", entry.source, is_error=False)


def _typed_inputs(node: onnx.NodeProto) -> tuple[int, ...]:
    """Positions of the inputs that the table's types apply to: those of the schema's main type variable."""
    listed: tuple[int, ...] | None = table.TYPED_INPUTS.get(node.op_type)
    if listed is not None:
        return listed
    if not onnx.defs.has(node.op_type):  # known only to the parser
        return (0,)
    schema = onnx.defs.get_schema(node.op_type)
    variables = [p.type_str for p in schema.inputs]
    variadic = bool(variables) and schema.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    variables += [variables[-1]] * (len(node.input) - len(variables)) if variadic else []
    main = next((o.type_str for o in schema.outputs if o.type_str in variables), variables[0] if variables else "")
    return tuple(k for k, variable in enumerate(variables[: len(node.input)]) if variable == main)


def _types(node: onnx.NodeProto, scope: Scope) -> Iterator[Problem]:
    entry = table.SUPPORTED[node.op_type]
    some, some_source = table.SUPPORTED_BY_SOME.get(node.op_type, (frozenset(), ""))
    names = [_input(node, k) for k in _typed_inputs(node)]
    if node.op_type in ("Cast", "CastLike", "Constant", "ConstantOfShape"):
        names = [*names, *node.output] if node.op_type.startswith("Cast") else list(node.output)
    for found in sorted({kind for name in names if name and (kind := scope.type_name(name))}):
        if found in entry.types:
            continue
        if found in some:
            why = f"{found} is supported by some versions only"
            remedy = "use operators that support the type, such as Min and Max"
            yield Problem(why, remedy, some_source, is_error=False)
        elif found == "DOUBLE":
            yield Problem("DOUBLE becomes FLOAT", "export the model in float32", table.MATRIX, is_error=False)
        elif not (found == "UINT8" and node.op_type == "Constant"):
            expected = ", ".join(sorted(entry.types))
            yield Problem(f"type {found}; the parser supports {expected}", "cast to one of these first", entry.source)


def _attributes(node: onnx.NodeProto, scope: Scope) -> Iterator[Problem]:
    values = _attribute_values(node)
    for rule in table.ATTRIBUTES.get(node.op_type, ()):
        if rule.attribute not in values:
            continue
        value = values[rule.attribute]
        parts = [p.decode() if isinstance(p, bytes) else p for p in (value if isinstance(value, list) else [value])]
        if not rule.allowed:
            yield Problem(f"attribute {rule.attribute}", "use a plain tensor", rule.source)
        elif not all(part in rule.allowed for part in parts):
            allowed = ", ".join(map(str, rule.allowed))
            shown = parts[0] if len(parts) == 1 else parts
            yield Problem(f"{rule.attribute} = {shown}; the parser supports {allowed}", "use one of these", rule.source)


def _constants(node: onnx.NodeProto, scope: Scope) -> Iterator[Problem]:
    for rule in table.CONSTANT_INPUTS.get(node.op_type, ()):
        origin = scope.origins.of(_input(node, rule.position))
        if origin > (Origin.COMPUTED if rule.may_be_computed else Origin.GIVEN):
            why = f"{rule.what} is computed in the graph; the parser requires a constant"
            yield Problem(why, "fold constants, or use an initializer", rule.source)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        zero_point = scope.constants.get(_input(node, 2))
        if zero_point is not None and constant_value(zero_point).any():
            yield Problem("a zero point that is not 0", "quantise symmetrically", table.MATRIX)


def _sizes(node: onnx.NodeProto, scope: Scope) -> Iterator[Problem]:
    names = [_input(node, k) for k in table.SIZE_INPUTS.get(node.op_type, ())]
    worst = max((scope.origins.of(name) for name in names), default=Origin.GIVEN)
    if worst is Origin.DATA:
        yield Problem(
            "a data-dependent shape: the size of the output is computed from values, not from shapes",
            "return all rows with a count or a mask, or implement that part as a plugin",
            table.GLOSSARY,
            is_error=False,
        )
    elif worst is Origin.INPUT:
        yield Problem(
            "the size of the output depends on the values of an input, which becomes a shape tensor",
            "set the input's values in every optimisation profile, or derive the size from a shape",
            table.GLOSSARY,
            is_error=False,
        )
    if node.op_type in table.DATA_DEPENDENT:
        why = "a data-dependent shape: the number of output rows depends on values, so TensorRT waits for the GPU"
        yield Problem(why, table.DATA_DEPENDENT[node.op_type], table.GLOSSARY, is_error=False)


def _outputs(node: onnx.NodeProto, scope: Scope) -> Iterator[Problem]:
    maximum = table.MAX_OUTPUTS.get(node.op_type)
    if maximum is not None and sum(map(bool, node.output)) > maximum:
        yield Problem(f"more than {maximum} output(s)", "remove the others", table.MATRIX)
    ranks, rank = table.RANKS.get(node.op_type), scope.rank(_input(node, 0))
    if ranks is not None and rank is not None and rank not in ranks:
        expected = " or ".join(map(str, ranks))
        yield Problem(f"an input of {rank} axes; the parser supports {expected}", "reshape it", table.MATRIX)


def _operator_rules(node: onnx.NodeProto, scope: Scope) -> Iterator[Problem]:
    """Rules for single operators."""
    if node.op_type == "TopK":
        yield from _topk(node, scope)
    elif node.op_type == "If":
        yield from _branches(node)
    elif node.op_type in table.LOOPS:
        yield Problem("a loop, whose iterations run sequentially", "unroll or batch it", table.MATRIX, is_error=False)
        if node.op_type == "Loop":
            yield from _loop(node, scope)
    elif node.op_type == "Squeeze" and not _input(node, 1) and not _attribute_values(node).get("axes"):
        kind = scope.known.get(node.input[0])
        if kind is not None and kind.HasField("shape") and not is_static(kind):
            yield Problem("no axes, and an input of dynamic shape", "set the axes", table.IMPORTERS)
    elif node.op_type == "EyeLike" and not is_static(scope.known.get(node.input[0])):
        yield Problem("an input of dynamic shape", "fix the shape, or use a constant matrix", table.MATRIX)
    elif node.op_type == "Floor":
        yield from _floor(node, scope)


def _floor(node: onnx.NodeProto, scope: Scope) -> Iterator[Problem]:
    """Integers divided in floating point: a rounded reciprocal can make quotients one too small."""
    producers = {name: other for other in scope.graph.node for name in other.output}
    division = producers.get(node.input[0])
    if division is None or division.op_type != "Div":
        return
    cast = producers.get(division.input[0])
    if (
        cast is not None
        and cast.op_type == "Cast"
        and (scope.type_name(cast.input[0]) or "").startswith(("INT", "UINT"))
    ):
        why = "the quotient of whole numbers, rounded down after a division in floating point"
        yield Problem(why, "divide the integers", table.OPERATORS)


def _topk(node: onnx.NodeProto, scope: Scope) -> Iterator[Problem]:
    name = _input(node, 1)
    constant = scope.constants.get(name)
    if constant is not None:
        k = int(constant_value(constant).reshape(-1)[0])
        if k >= table.TOPK_LIMIT:
            yield Problem(
                f"K = {k}; it must be below {table.TOPK_LIMIT}", "reduce K, or split the axis into groups", table.MATRIX
            )
    elif scope.origins.of(name) < Origin.INPUT:  # `_sizes` reports later origins
        why = f"K is not a constant, so it may reach {table.TOPK_LIMIT} or more"
        remedy = "pad the axis and use a constant K"
        yield Problem(why, remedy, f"{table.MATRIX}; {table.OPERATORS}", is_error=False)


def _loop(node: onnx.NodeProto, scope: Scope) -> Iterator[Problem]:
    carried = len(node.input) - 2
    if len(node.output) > carried and scope.origins.of(_input(node, 0)) > Origin.SHAPE:
        why = "scan outputs of a loop whose number of iterations depends on values"
        yield Problem(why, "use a constant number of iterations", table.MATRIX)
    body = _attribute_values(node)["body"]
    producers = {name: inner for inner in body.node for name in inner.output}
    for before, after in zip(body.input[2:], body.output[1:], strict=False):
        producer = producers.get(after.name)
        if producer is not None and producer.op_type == "Concat" and before.name in producer.input:
            why = f"a loop-carried tensor ({before.name}) that grows with each iteration"
            yield Problem(why, "carry a tensor of fixed size, or batch the iterations", table.MATRIX)


def _branches(node: onnx.NodeProto) -> Iterator[Problem]:
    values = _attribute_values(node)
    then, other = (values[name].output for name in ("then_branch", "else_branch"))
    remedy = "evaluate the condition at export time, or give both branches the same rank"
    yield Problem("control flow: both branches are built, one runs", remedy, table.MATRIX, is_error=False)
    if len(then) != len(other):
        yield Problem("branches with different numbers of outputs", remedy, table.CHECKERS)
        return
    for first, second in zip(then, other, strict=True):
        shapes = [value.type.tensor_type for value in (first, second)]
        if all(kind.HasField("shape") for kind in shapes):
            ranks = [len(kind.shape.dim) for kind in shapes]
            if ranks[0] != ranks[1]:
                yield Problem(f"branches of rank {ranks[0]} and {ranks[1]}", remedy, table.MATRIX)
        if first.name == second.name:
            yield Problem("branches whose outputs have the same name", "rename one of them", table.MATRIX)


def _bytes(node: onnx.NodeProto, scope: Scope) -> Iterator[Problem]:
    """UINT8 is supported for inputs and outputs of the network only."""
    outputs = {output.name for output in scope.graph.output}
    is_inner = any(scope.type_name(name) == "UINT8" and name not in outputs for name in node.output)
    if is_inner and node.op_type not in ("Constant", "QuantizeLinear"):
        yield Problem("an intermediate tensor of type UINT8", "cast to FLOAT or INT32 first", table.PARSER)


# Nodes of other domains


def _foreign_problem(node: onnx.NodeProto) -> Problem:
    if node.op_type in table.SUPPORTED:
        why = f"the parser ignores the domain and imports ONNX's {node.op_type}"
        return Problem(why, "rename the operator", table.PARSER, is_error=False)
    if node.op_type.startswith("TRT_") or node.op_type.endswith("_TRT"):
        why = "a TensorRT operator, which other runtimes lack and later versions may remove"
        return Problem(why, "use standard operators or a custom plugin", table.PARSER, is_error=False)
    return Problem("no importer: a plugin of this name must be registered", "register one", table.PARSER)


def _plugin_problems(node: onnx.NodeProto, scope: Scope) -> Iterator[Problem]:
    """Checks a custom op of this package against the contract."""
    flavour = "write the flavour with maskrcnn.export.tensorrt.flavour.tensorrt_flavour"
    op = contract.ALL_OPS.get(node.op_type)
    if onnx.defs.has(node.op_type) or node.op_type in table.SUPPORTED:
        why = f"a plugin with the name of ONNX's {node.op_type}, which the parser prefers"
        yield Problem(why, "rename the operator", table.PARSER)
    if op is None:
        why = "not in the contract, so there is no plugin"
        yield Problem(why, f"use {', '.join(contract.ALL_OPS)}", table.CONTRACT)
        return
    if op is contract.LIVE_ROWS:
        yield Problem("has no plugin; the flavour for TensorRT uses all rows", flavour, table.CONTRACT)
        return
    if op is contract.MULTILEVEL_ROI_POOL:
        remedy = "train with --set model.pool_method=align or crop, which TensorRT supports"
        yield Problem("has no plugin, and MaxRoiPool no importer", remedy, table.CONTRACT)
        return
    values = _attribute_values(node)
    yield from _contract_attributes(op, values)
    if values.get("aot") and op.name not in contract.AOT_OPS:
        why = "aot = 1, but the op has no ahead-of-time plugin, which can only have one kernel"
        yield Problem(why, f"{flavour}(…, aot=True)", table.CONTRACT)
    namespace = values.get("plugin_namespace", b"")
    if namespace != PLUGIN_NAMESPACE.encode():
        why = f"plugin_namespace is {namespace.decode() or 'missing'}; parsers before 10.10 need it to find the plugin"
        yield Problem(why, flavour, table.CHANGELOG, is_error=False)
    yield from _contract_types(node, op, scope)


def _contract_attributes(op: contract.Op, values: dict[str, Any]) -> Iterator[Problem]:
    for name, kind in op.attributes.items():
        if name not in values:
            yield Problem(f"no attribute {name}", "set it", table.CONTRACT)
        elif type(values[name]) is not kind:
            found = type(values[name]).__name__
            yield Problem(f"attribute {name} is {found}, not {kind.__name__}", "set the type", table.CONTRACT)
    for name in sorted(values.keys() - op.attributes.keys() - set(PLUGIN_ATTRIBUTES)):
        yield Problem(f"attribute {name} is not in the contract", "remove it", table.CONTRACT)


def _contract_types(node: onnx.NodeProto, op: contract.Op, scope: Scope) -> Iterator[Problem]:
    repeats = len(node.input) - len(op.inputs) + 1
    inputs = [tensor for tensor in op.inputs for _ in range(repeats if tensor.variadic else 1)]
    if len(inputs) != len(node.input) or repeats < 1 or len(node.output) != len(op.outputs):
        why = f"{len(node.input)} inputs and {len(node.output)} outputs; the contract has {len(op.inputs)} kinds of"
        remedy = "connect the inputs and outputs of the contract"
        yield Problem(f"{why} inputs and {len(op.outputs)} outputs", remedy, table.CONTRACT)
        return
    for tensor, name in zip(inputs, node.input, strict=True):
        found, expected = scope.type_name(name), _CONTRACT_TYPES[tensor.dtype]
        if found is not None and found not in expected:
            why = f"input {tensor.name} is {found}; the contract has {' or '.join(expected)}"
            yield Problem(why, "cast it", table.CONTRACT)
