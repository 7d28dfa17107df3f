"""The files of the ResNet-50 workload, of a tiny model here, on machines with and without GPU and TensorRT."""

import shutil

import making
import pytest
from contenders import our_contenders
from engine_files import write_engine
from session import Progress
from workloads import generated_images

from maskrcnn.api import build_engine
from maskrcnn.errors import UserError
from maskrcnn.export import variants
from maskrcnn.runtime.backends import onnxruntime as onnxruntime_backend
from maskrcnn.runtime.backends import onnxruntime_providers
from maskrcnn.runtime.build import openvino as openvino_engine

NO_GPU = UserError("no GPU", "a GPU", "see `maskrcnn doctor`")
NO_TENSORRT = UserError("no Python package tensorrt", "TensorRT", "install it")


@pytest.fixture
def order(tmp_path, checkpoint, model):
    """Of a tiny model, for GPUs alone."""
    path = tmp_path / "resnet50.safetensors"
    shutil.copy(checkpoint, path)
    shapes = {"sizes_hw": [(64, 96), (96, 96)], "batches": (1, 8)}
    return making.Order(model=model, checkpoint=path, pool=generated_images(2, (64, 96)), gpu_only=True, **shapes)


@pytest.fixture(autouse=True)
def exported(monkeypatch, onnx_file):
    """The export, which the other steps need, without its minutes."""
    monkeypatch.setattr(making, "_export", lambda order: shutil.copy(onnx_file, order.file(".onnx")) and "exported")


@pytest.fixture
def machine(monkeypatch):
    """Says what a machine lacks."""

    def lacks(cuda=None, tensorrt=None):
        monkeypatch.setattr(making, "cuda_obstacle", lambda onnx: cuda)
        monkeypatch.setattr(making, "tensorrt_obstacle", lambda: tensorrt)

    return lacks


def absent_rows(artefacts):
    return {(each.model, each.backend, each.precision): str(each.error.found) for each in artefacts.absent}


def test_without_a_gpu_rows_say_why(order, machine):
    machine(cuda=NO_GPU, tensorrt=NO_TENSORRT)
    artefacts, notes = making.make_files(order, Progress())
    assert [path.name for path in artefacts.onnx] == ["resnet50.onnx"]
    assert artefacts.engines == artefacts.others == () and notes == ["exported"]
    assert absent_rows(artefacts) == {
        ("resnet50.fp16.onnx", "ONNX Runtime CUDA", "fp16"): "no GPU",
        ("resnet50.fp16.engine", "TensorRT", "fp16"): "no Python package tensorrt",
    }
    # Rows of the table: each once, and none for a run's `model.engine`.
    found = [(each.model, each.backend) for each in our_contenders(artefacts) if each.file is None]
    assert found.count(("resnet50.fp16.engine", "TensorRT")) == 1
    assert not any(model.startswith("model.") for model, _ in found)


def test_cuda_brings_the_half_precision_file(order, machine):
    machine(tensorrt=NO_TENSORRT)
    artefacts, notes = making.make_files(order, Progress())
    assert [path.name for path in artefacts.onnx] == ["resnet50.onnx", "resnet50.fp16.onnx"]
    assert len(notes) == 2 and notes[1].startswith("half-precision file compared with the ONNX file: ")
    assert list(absent_rows(artefacts)) == [("resnet50.fp16.engine", "TensorRT", "fp16")]
    assert artefacts.seconds.keys() == set(artefacts.onnx)


def test_tensorrt_brings_the_engine(order, machine, monkeypatch, onnx_file):
    machine(cuda=NO_GPU)
    built = {}

    def build(console, source, **given):
        built.update(given, source=source)
        write_engine(given["output"], onnx_file, compared="0 beyond the tolerance")

    monkeypatch.setattr(build_engine, "run_build_engine", build)
    artefacts, notes = making.make_files(order, Progress())
    assert [path.name for path in artefacts.others] == ["resnet50.fp16.engine"]
    assert notes[-1] == "resnet50.fp16.engine compared with the ONNX file: 0 beyond the tolerance"
    assert (built["source"], built["precision"], built["target"]) == (order.file(".onnx"), "fp16", "tensorrt")
    assert (built["tensorrt"].batch, built["tensorrt"].size) == ("1,8", "64x96,96x96")
    assert list(absent_rows(artefacts)) == [("resnet50.fp16.onnx", "ONNX Runtime CUDA", "fp16")]


def test_an_engine_that_departs_is_measured_with_its_metadata(order, machine, monkeypatch, onnx_file):
    machine(cuda=NO_GPU)

    def build(console, source, **given):
        write_engine(given["output"].with_suffix(".rejected.engine"), onnx_file)
        raise UserError(f"an engine that departs from {source}", "less", "look at it")

    monkeypatch.setattr(build_engine, "run_build_engine", build)
    artefacts, notes = making.make_files(order, Progress())
    engine = order.file(".fp16.engine")
    assert artefacts.others == (engine,) and engine.with_name("resnet50.fp16.engine.json").is_file()
    assert notes[-1] == "an engine that departs from resnet50.onnx"  # and no folder, which is temporary
    assert engine not in artefacts.seconds
    assert not list(engine.parent.glob("*.rejected*"))


def test_a_cast_that_departs_has_a_row_instead_of_its_simulation(order, machine, monkeypatch):
    machine(tensorrt=NO_TENSORRT)

    def refuse(source, output, precision):
        output.with_suffix(".rejected.onnx").touch()
        raise UserError("a graph that departs", "less", "look at it")

    monkeypatch.setattr(variants, "write_half", refuse)
    artefacts, _ = making.make_files(order, Progress())
    assert absent_rows(artefacts)["resnet50.fp16.onnx", "ONNX Runtime CUDA", "fp16"] == "a graph that departs"
    assert [path.name for path in artefacts.onnx] == ["resnet50.onnx"]


def test_a_library_that_fails_in_its_own_way_costs_its_rows_alone(order, machine, monkeypatch):
    machine(cuda=NO_GPU)
    monkeypatch.setattr(build_engine, "run_build_engine", lambda *given, **options: 1 / 0)
    artefacts, _ = making.make_files(order, Progress())
    error = artefacts.absent[-1].error
    assert artefacts.absent[-1].model == "resnet50.fp16.engine" and isinstance(error, ZeroDivisionError)
    assert [path.name for path in artefacts.onnx] == ["resnet50.onnx"]


def test_without_the_export_every_row_says_so(order, machine, monkeypatch):
    machine()
    monkeypatch.setattr(making, "_export", lambda order: 1 / 0)
    artefacts, notes = making.make_files(order, Progress())
    assert artefacts.onnx == artefacts.others == () and notes == []
    assert [each.model for each in artefacts.absent] == ["resnet50.onnx", "resnet50.fp16.onnx", "resnet50.fp16.engine"]
    assert "no file resnet50.onnx" in str(artefacts.absent[-1].error)


def test_files_for_the_cpu_and_one_of_an_earlier_run(order, machine, monkeypatch):
    machine(cuda=NO_GPU, tensorrt=NO_TENSORRT)
    order.file(".int8.xml").write_text("of an earlier run")
    build = openvino_engine.build_openvino_engine

    def depart(onnx, engine, **options):
        """The first engine departs, the second cannot be built."""
        if "int8" in engine.name:
            raise UserError("no OpenVINO", "OpenVINO", "install it")
        build(onnx, engine, **options)
        for suffix in (".xml", ".bin"):
            engine.with_suffix(suffix).rename(engine.with_suffix(f".rejected{suffix}"))
        raise UserError("an engine that departs", "less", "look at it")

    monkeypatch.setattr(openvino_engine, "build_openvino_engine", depart)
    artefacts, notes = making.make_files(making.Order(**{**order.__dict__, "gpu_only": False}), Progress())
    assert [path.name for path in artefacts.onnx] == ["resnet50.onnx", "resnet50.int8.onnx"]
    assert [path.name for path in artefacts.engines] == ["resnet50.fp16.xml"]
    assert order.file(".fp16.bin").is_file() and "an engine that departs" in notes
    assert absent_rows(artefacts)["resnet50.int8.xml", "OpenVINO engine", "int8"] == "no OpenVINO"


def test_the_cuda_provider_must_work_and_not_only_be_there(onnx_file, monkeypatch):
    monkeypatch.setattr(onnxruntime_providers, "best_provider", lambda: onnxruntime_providers.Provider.CPU)
    assert "no GPU" in making.cuda_obstacle(onnx_file).found
    monkeypatch.setattr(onnxruntime_providers, "best_provider", lambda: onnxruntime_providers.Provider.CUDA)
    asked = []
    monkeypatch.setattr(onnxruntime_backend, "OnnxRuntimeBackend", lambda path, provider: asked.append(provider))
    assert making.cuda_obstacle(onnx_file) is None and asked == ["cuda"]

    def refuse(path, provider):
        raise UserError("ONNX Runtime without CUDA", "CUDA", "install it")

    monkeypatch.setattr(onnxruntime_backend, "OnnxRuntimeBackend", refuse)
    assert making.cuda_obstacle(onnx_file).found == "ONNX Runtime without CUDA"
