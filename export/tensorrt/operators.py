"""Operators and types that TensorRT's ONNX parser supports, for `export/tensorrt/lint.py`.

For TensorRT 10.9 and newer; each entry names its source.
"""

from __future__ import annotations

from dataclasses import dataclass

OLDEST = (10, 9)  # the first version with ahead-of-time Python plugins, which engines require
OPSETS = range(9, 25)  # support matrices of 10.15 and 11.0; the matrix of 10.1 ends at opset 20
OPSETS_EVERYWHERE = range(9, 21)

# Sources of the entries.
MATRIX = "docs/operators.md of onnx-tensorrt, for TensorRT 10.1 and 11.0"
CHANGELOG = "docs/Changelog.md of onnx-tensorrt, up to 11.0"
CHECKERS = "onnxOpCheckers.cpp of onnx-tensorrt 10.1"
IMPORTERS = "onnxOpImporters.cpp of onnx-tensorrt 10.1"
PARSER = "ModelImporter.cpp of onnx-tensorrt 10.1 and 11.0"
OPERATORS = "TensorRT's operator reference"
GLOSSARY = "TensorRT's documentation, Dynamic Shapes and Glossary"
CONTRACT = "maskrcnn/plugins/contract.py"

_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
_INTEGERS = frozenset({"INT32", "INT64"})
_NUMBERS = _FLOATS | _INTEGERS
_ANY = _NUMBERS | {"BOOL"}
_HALF_AND_SINGLE = frozenset({"FLOAT", "FLOAT16"})


@dataclass(frozen=True)
class _OpSupport:
    """Support of one operator."""

    types: frozenset[str]  # supported ONNX element types of its data
    source: str = MATRIX
    since: tuple[int, int] = OLDEST  # TensorRT version


@dataclass(frozen=True)
class _AttributeRule:
    """Supported values of an attribute, or of each element of a list. If empty, the attribute must be absent."""

    attribute: str
    allowed: tuple[int | str, ...]
    source: str = MATRIX


@dataclass(frozen=True)
class _ConstantRule:
    """An input that must be a constant."""

    position: int
    what: str
    may_be_computed: bool = False  # from constants; if false, only an initializer or a Constant node
    source: str = MATRIX


def _rows(types: frozenset[str], names: str, source: str = MATRIX) -> dict[str, _OpSupport]:
    return {name: _OpSupport(types, source) for name in names.split()}


SUPPORTED: dict[str, _OpSupport] = {
    **_rows(
        _FLOATS,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh "
        "CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool "
        "GroupNormalization HardSigmoid Hardmax ImageScaler InstanceNormalization IsInf LRN LSTM "
        "LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization "
        "PRelu ParametricSoftplus Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike "
        "Reciprocal Resize Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh "
        "ThresholdedRelu Upsample",
    ),
    **_rows(
        _NUMBERS,
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean "
        "Min Mod Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
        "ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub "
        "Sum TopK",
    ),
    **_rows(
        _ANY,
        "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot "
        "Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    **_rows(_ANY | {"UINT8"}, "Cast CastLike"),
    **_rows(frozenset({"BOOL"}), "And Not Or Xor"),
    **_rows(
        _HALF_AND_SINGLE,
        "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression RoiAlign",
    ),
    **_rows(frozenset({"FLOAT"}), "STFT"),
    **_rows(frozenset({"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"}), "DequantizeLinear"),
    **_rows(_ANY | {"INT8"}, "NonZero", IMPORTERS),  # the matrix names FLOAT and FLOAT16 only
    "HardSwish": _OpSupport(_HALF_AND_SINGLE, IMPORTERS),  # the matrix names BF16 as well
    "Attention": _OpSupport(_FLOATS | {"INT8", "FLOAT8E4M3FN"}, CHANGELOG, (10, 14)),
    "RMSNormalization": _OpSupport(_FLOATS, CHANGELOG, (10, 15)),
    "RotaryEmbedding": _OpSupport(_FLOATS, CHANGELOG, (10, 15)),
    "TensorScatter": _OpSupport(_FLOATS | {"INT32"}, CHANGELOG, (10, 15)),
    "Swish": _OpSupport(_FLOATS, CHANGELOG, (11, 0)),
}

# Types that some versions support, or that importers accept although the matrix does not list them: a warning.
SUPPORTED_BY_SOME: dict[str, tuple[frozenset[str], str]] = {
    "Clip": (_INTEGERS, IMPORTERS),
    "Pow": (_INTEGERS, CHANGELOG),  # from 10.12 on
}

_REFUSED = (
    "AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress "
    "ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool "
    "MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv "
    "QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert "
    "SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit "
    "TfIdfVectorizer Unique"
)
UNSUPPORTED = frozenset(_REFUSED.split())

_POOL = _AttributeRule("dilations", (1,), CHECKERS)
ATTRIBUTES: dict[str, tuple[_AttributeRule, ...]] = {
    "AveragePool": (_POOL,),
    "BatchNormalization": (_AttributeRule("training_mode", (0,), CHECKERS),),
    "Constant": tuple(_AttributeRule(name, ()) for name in ("sparse_value", "value_string", "value_strings")),
    # The importer knows the names from before opset 20 and silently treats any other as nearest.
    "GridSample": (_AttributeRule("mode", ("nearest", "bilinear", "bicubic"), IMPORTERS),),
    "LSTM": (_AttributeRule("input_forget", (0,)), _AttributeRule("layout", (0,))),
    "LpNormalization": (_AttributeRule("p", (1, 2), CHECKERS),),
    "LpPool": (_POOL, _AttributeRule("p", (1, 2), CHECKERS)),
    "MaxPool": (_POOL,),
    "Pad": (_AttributeRule("mode", ("constant", "reflect", "edge", "wrap"), IMPORTERS),),
    "Resize": (
        _AttributeRule("mode", ("nearest", "linear", "cubic"), CHECKERS),
        _AttributeRule(
            "coordinate_transformation_mode",
            ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
        ),
        _AttributeRule("nearest_mode", ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
        _AttributeRule("keep_aspect_ratio_policy", ("stretch",)),
        _AttributeRule("antialias", (0,)),
    ),
    "RoiAlign": (
        _AttributeRule("mode", ("avg", "max"), CHECKERS),
        _AttributeRule("coordinate_transformation_mode", ("half_pixel", "output_half_pixel"), CHECKERS),
    ),
    "ScatterND": (_AttributeRule("reduction", ("none",)),),
    "TopK": (_AttributeRule("sorted", (1,)),),
}

_AXES = (_ConstantRule(1, "axes"),)
_RESOLVED_AXES = (_ConstantRule(1, "axes", may_be_computed=True),)
CONSTANT_INPUTS: dict[str, tuple[_ConstantRule, ...]] = {
    **{name: _AXES for name in SUPPORTED if name.startswith("Reduce")},
    "CumSum": (_ConstantRule(1, "axis", may_be_computed=True),),
    "Dropout": (_ConstantRule(2, "training_mode"),),
    "OneHot": (_ConstantRule(1, "depth", may_be_computed=True),),
    "QuantizeLinear": (_ConstantRule(2, "zero point", may_be_computed=True),),
    "DequantizeLinear": (_ConstantRule(2, "zero point", may_be_computed=True),),
    "STFT": (_ConstantRule(1, "frame_step"), _ConstantRule(2, "window")),
    "Squeeze": _RESOLVED_AXES,
    "Unsqueeze": _RESOLVED_AXES,
}

# Inputs whose values determine the size of the output.
SIZE_INPUTS: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
}
TOPK_LIMIT = 3840  # the support matrix requires K below it; the operator reference also allows K equal to it

# Operators with data-dependent output sizes, for which TensorRT waits for the GPU, and the remedy.
DATA_DEPENDENT = {
    "NonZero": "pass all elements with a mask, so that no size depends on values",
    "NonMaxSuppression": "use a node with a fixed number of rows and a count, such as maskrcnn::BatchedNms",
}
LOOPS = ("Loop", "Scan")

# Supported ranks of the first input.
RANKS: dict[str, tuple[int, ...]] = {
    "AveragePool": (4, 5),
    "DeformConv": (3, 4),
    "GridSample": (4,),
    "MaxPool": (4, 5),
    "TensorScatter": (4,),
}
MAX_OUTPUTS = {"MaxPool": 1, "LayerNormalization": 1, "Attention": 1}

# Inputs that the table's types apply to, if they do not follow from ONNX's schema.
TYPED_INPUTS: dict[str, tuple[int, ...]] = {
    "DequantizeLinear": (0,),
    "If": (),
    "Loop": (),
    "NonMaxSuppression": (0, 1),
    "QuantizeLinear": (0,),
    "RoiAlign": (0, 1),
    "Scan": (),
}

# Operators that TensorRT evaluates on the host if a size depends on them.
_ON_THE_HOST = (
    "Abs Add And Cast Ceil Clip Concat Constant ConstantOfShape Div Equal Expand Floor Gather Greater GreaterOrEqual "
    "Identity Less LessOrEqual Max Min Mod Mul Neg Not Or Range Reciprocal ReduceMax ReduceMin ReduceProd ReduceSum "
    "Reshape Round Shape Size Slice Sqrt Squeeze Sub Transpose Unsqueeze Where"
)
HOST_OPS = frozenset(_ON_THE_HOST.split())
