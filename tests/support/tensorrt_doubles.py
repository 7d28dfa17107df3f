"""Doubles of TensorRT's builder, parser and refitter: autospecs of the real classes, which reject unknown arguments.

Used inside the rig's processes, where `tensorrt` is the real module without a builder, a parser or a GPU. The plan of a
double is an ONNX file that ONNX Runtime runs, so that engines can be compared.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import tensorrt as real
import two_step_nms

from maskrcnn.imaging.preprocess import batch_images
from maskrcnn.plugins import contract
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.tensorrt_library import Gpu, check_stamp
from maskrcnn.runtime.build.gate import padded_feeds
from maskrcnn.runtime.build.profiles import choose, from_json
from maskrcnn.runtime.engine_files import read_engine

GPU = Gpu("NVIDIA Test 1", (9, 0))
_GENERIC = ("args", "kwargs")


def double_of(kind: type) -> Any:
    """An autospec of a class of the bindings; arguments are checked against the docstrings of its methods."""
    made = mock.create_autospec(kind, spec_set=True, instance=True)
    for name in dir(kind):
        if not name.startswith("_") and (signatures := signatures_of(kind, name)):
            getattr(made, name).side_effect = _checker(name, signatures)
    return made


def answers(double: Any, name: str, function: Callable[..., Any]) -> None:
    """Sets the implementation of a method; its arguments are checked first."""
    method = getattr(double, name)
    check = getattr(method.side_effect, "check", method.side_effect)

    def answer(*arguments: Any, **named: Any) -> Any:
        check(*arguments, **named)
        return function(*arguments, **named)

    answer.check = check
    method.side_effect = answer


def signatures_of(kind: type, name: str) -> list[inspect.Signature]:
    """The overloads in a method's docstring, as pybind11 writes them."""
    text = getattr(getattr(kind, name), "__doc__", None) or ""
    found = []
    for match in re.finditer(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\) -> ", text, re.MULTILINE):
        parameters = [_parameter(part) for part in _split(re.sub(r"<[^<>]*>", "…", match[1]))]
        if not any(parameter.name in _GENERIC for parameter in parameters):
            found.append(inspect.Signature(_ordered(parameters)))
    return found


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _parameter(text: str) -> inspect.Parameter:
    name, _, rest = text.partition(":")
    default = None if "=" in rest else inspect.Parameter.empty
    return inspect.Parameter(name.strip().lstrip("*"), inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)


def _ordered(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """Gives a default to arguments that follow one with a default, which C++ does not require."""
    first = next((place for place, each in enumerate(parameters) if each.default is None), len(parameters))
    return [each if place < first else each.replace(default=None) for place, each in enumerate(parameters)]


def _checker(name: str, signatures: list[inspect.Signature]) -> Callable[..., Any]:
    def check(*arguments: Any, **named: Any) -> Any:
        errors = []
        for signature in signatures:
            try:
                signature.bind(None, *arguments, **named)  # None for self
                return mock.DEFAULT
            except TypeError as error:
                errors.append(str(error))
        raise TypeError(f"{name}: {'; '.join(errors)}")

    return check


class Trt:
    """The real module with doubles where a GPU would be needed.

    Args:
        plan_of: returns the plan of a graph's bytes, or None.
        during: called with this object during a build; may log, or call the monitor.
    """

    def __init__(
        self,
        plan_of: Callable[[bytes], bytes | None] = lambda graph: b"a plan",
        during: Callable[[Trt], None] = lambda trt: None,
    ) -> None:
        self.plan_of, self.during = plan_of, during
        self.graph = b""
        self._logger: Any = None
        self.errors: list[Any] = []  # of the parser
        self.added: list[Any] = []  # profiles
        self.flags: dict[str, bool] = {}
        self.timing: list[tuple[str, Any]] = []
        self.refit: list[bytes] = []
        self.builder, self.network, self.config, self.parser = (
            double_of(kind) for kind in (real.Builder, real.INetworkDefinition, real.IBuilderConfig, real.OnnxParser)
        )
        self._set_up_builder()
        self._set_up_config()
        self._set_up_parser()

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    # Constructors that the code under test calls

    def Builder(self, logger: Any) -> Any:
        self._take_logger(logger)
        return self.builder

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        assert network is self.network and isinstance(logger, real.ILogger)
        return self.parser

    def Runtime(self, logger: Any) -> Any:
        self._take_logger(logger)
        self.runtime = double_of(real.Runtime)
        answers(self.runtime, "deserialize_cuda_engine", self._deserialize)
        return self.runtime

    def Refitter(self, engine: Any, logger: Any) -> Any:
        assert engine is self.engine
        self.refitter = double_of(real.Refitter)
        answers(self.refitter, "refit_cuda_engine", lambda: True)
        answers(self.refitter, "get_missing_weights", lambda: [])
        return self.refitter

    def OnnxParserRefitter(self, refitter: Any, logger: Any) -> Any:
        assert refitter is self.refitter
        parser = double_of(real.OnnxParserRefitter)
        answers(parser, "refit_from_bytes", lambda model: self.refit.append(bytes(model)) or not self.errors)
        parser.num_errors = len(self.errors)
        answers(parser, "get_error", lambda index: self.errors[index])
        return parser

    # For tests

    def say(self, severity: str, text: str) -> None:
        """Logs a message."""
        self.logger.log(getattr(real.ILogger.Severity, severity), text)

    def refuse(self, **fields: Any) -> None:
        """Adds a parser error: code, desc, node, node_name, node_operator."""
        error = double_of(real.ParserError)
        values = {"code": "UNSUPPORTED_NODE", "desc": "", "node": 0, "node_name": "", "node_operator": "", **fields}
        values["code"] = getattr(real.ErrorCode, values["code"])
        for name, value in values.items():
            answers(error, name, lambda value=value: value)
        self.errors.append(error)
        self.parser.num_errors = len(self.errors)

    @property
    def logger(self) -> Any:
        """The first logger; it must still be alive."""
        logger = self._logger()
        assert logger is not None, "the logger was freed"
        return logger

    # Implementations of the doubles

    def _take_logger(self, logger: Any) -> None:
        """Keeps a weak reference to the first logger only, as TensorRT does."""
        assert isinstance(logger, real.ILogger)
        self._logger = self._logger or weakref.ref(logger)

    def _set_up_builder(self) -> None:
        answers(self.builder, "create_network", self._create_network)
        answers(self.builder, "create_builder_config", lambda: self.config)
        answers(self.builder, "create_optimization_profile", lambda: double_of(real.IOptimizationProfile))
        answers(self.builder, "build_serialized_network", self._build)

    def _create_network(self, flags: int) -> Any:
        self.network_flags = flags
        return self.network

    def _build(self, network: Any, config: Any) -> bytes | None:
        assert network is self.network and config is self.config
        self.during(self)
        return self.plan_of(self.graph)

    def _set_up_config(self) -> None:
        answers(self.config, "set_flag", lambda flag: self.flags.update({_name_of(flag): True}))
        answers(self.config, "clear_flag", lambda flag: self.flags.update({_name_of(flag): False}))
        answers(self.config, "add_optimization_profile", lambda profile: self.added.append(profile) or 0)
        answers(self.config, "create_timing_cache", self._timing_cache)
        answers(self.config, "set_timing_cache", self._set_timing_cache)
        answers(self.config, "get_timing_cache", lambda: self.timing[-1][1] if self.timing else None)

    def _timing_cache(self, content: bytes) -> Any:
        if content.startswith(b"broken"):
            return None
        cache = double_of(real.ITimingCache)
        entries = {entry for entry in content.split(b";") if entry}
        answers(cache, "combine", lambda other, ignore_mismatch: entries.update(other.serialize().split(b";")) or True)
        answers(cache, "serialize", lambda: b";".join(sorted(entries | {b"new"})))
        return cache

    def _set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if b"other-gpu" in cache.serialize():
            return False
        self.timing.append(("set", cache))
        return True

    def _set_up_parser(self) -> None:
        answers(self.parser, "parse", self._parse)
        answers(self.parser, "get_error", lambda index: self.errors[index])
        self.parser.num_errors = 0

    def _parse(self, model: bytes) -> bool:
        self.graph = bytes(model)
        if self.errors:
            return False
        try:
            graph = onnx.load_from_string(self.graph).graph
        except Exception:  # in a test without a graph
            return True
        self._set_tensors("input", graph.input)
        self._set_tensors("output", graph.output)
        return True

    def _set_tensors(self, kind: str, values: Any) -> None:
        names = {1: "FLOAT", 6: "INT32", 7: "INT64", 10: "HALF"}
        made = []
        for value in values:
            tensor = double_of(real.ITensor)
            tensor.name = value.name
            tensor.dtype = getattr(real.DataType, names[value.type.tensor_type.elem_type])
            made.append(tensor)
        answers(self.network, f"get_{kind}", lambda index: made[index])
        setattr(self.network, f"num_{kind}s", len(made))

    def _deserialize(self, serialized_engine: bytes) -> Any:
        if serialized_engine.startswith(b"broken"):
            self.say("ERROR", "deserializeCudaEngine: Error Code 1: Serialization (Version tag does not match)")
            return None
        self.engine, self.serialization = double_of(real.ICudaEngine), double_of(real.ISerializationConfig)
        answers(self.engine, "create_serialization_config", lambda: self.serialization)
        answers(self.engine, "serialize_with_config", lambda config: self.plan_of(self.refit[-1]))
        return self.engine


def _name_of(flag: Any) -> str:
    """The name of a builder flag; in TensorRT 10, STRIP_PLAN has an older alias."""
    return "STRIP_PLAN" if flag == real.BuilderFlag.STRIP_PLAN else flag.name


def runnable(original: Path) -> Callable[[bytes], bytes]:
    """Returns a `plan_of` function: it returns the graph for the parser, with functions instead of plugins."""

    def plan_of(graph: bytes) -> bytes:
        model, source = onnx.load_from_string(graph), onnx.load(original)
        model.functions.extend(source.functions)
        if any(node.op_type == contract.BATCHED_NMS_KEEP.name for node in model.graph.node):
            model.functions.extend(two_step_nms.functions(source.opset_import[0].version))
        return model.SerializeToString()

    return plan_of


class PlanBackend(OnnxRuntimeBackend):
    """An engine with an ONNX file as its plan. It accepts only shapes of its profiles, and checks its stamp."""

    name = "TensorRT"

    def __init__(self, path: Path) -> None:
        described, _ = read_engine(path)
        if error := check_stamp(described, trt=real, gpu=GPU.name, compute_capability=GPU.compute_capability):
            raise error
        super().__init__(path, providers=["CPUExecutionProvider"])
        self.profiles = from_json(described.stamp["profiles"])
        self.shapes: list[tuple[int, ...]] = []

    def run_images(self, images: Any) -> Any:
        pixels, sizes = batch_images(images, self.metadata.preprocessing)
        outputs = self(padded_feeds({"images": pixels, "image_sizes": sizes}, self.profiles))
        return {name: value[: len(images)] for name, value in outputs.items()}, sizes

    def infer(self, feeds: Any) -> Any:
        batch, _, height, width = feeds["images"].shape
        choose(self.profiles, (batch, height, width))
        self.shapes.append((batch, height, width))
        names = [output.name for output in self.session.get_outputs()]  # including stages, if these are outputs
        return dict(zip(names, self.session.run(names, feeds), strict=True))
