"""The files of the ResNet-50 workload, here of a tiny model, on machines with and without GPU and TensorRT."""

import shutil
from types import SimpleNamespace

import pytest
import workloads
from contenders import our_contenders
from engine_files import write_engine
from session import Progress

from maskrcnn.errors import UserError
from maskrcnn.export import variants
from maskrcnn.runtime.backends import onnxruntime as onnxruntime_backend
from maskrcnn.runtime.backends import onnxruntime_providers

NO_GPU = UserError("no GPU", "a GPU", "see `maskrcnn doctor`")
NO_TENSORRT = UserError("no Python package tensorrt", "TensorRT", "install it")


@pytest.fixture
def resnet50(tmp_path, checkpoint):
    """The checkpoint of a tiny model under the workload's name."""
    path = tmp_path / "resnet50.safetensors"
    shutil.copy(checkpoint, path)
    return path


def make_files(checkpoint, **options):
    shapes = {"sizes_hw": [(64, 96), (96, 96)], "batches": (1, 8), "gpu_only": True}
    pool = workloads.generated_images(2, (64, 96))
    return workloads.make_files(checkpoint, pool, **{**shapes, **options}, progress=Progress())


@pytest.fixture(autouse=True)
def exported(monkeypatch, onnx_file):
    """The export of the checkpoint, which takes long; other precisions are really made."""
    export = workloads.export

    def copy_or_export(source, *, output, **options):
        if source.suffix == ".onnx":
            return export(source, output=output, **options)
        shutil.copy(onnx_file, output)
        return SimpleNamespace(differences=["PyTorch: none"])

    monkeypatch.setattr(workloads, "export", copy_or_export)


@pytest.fixture
def machine(monkeypatch):
    """Sets what a machine lacks."""

    def lacks(cuda=None, tensorrt=None):
        monkeypatch.setattr(workloads, "cuda_obstacle", lambda onnx: cuda)
        monkeypatch.setattr(workloads, "tensorrt_obstacle", lambda: tensorrt)

    return lacks


def absent_rows(artefacts):
    found = {}
    for each in artefacts.absent:
        with pytest.raises(Exception) as error:
            each.open()
        found[each.model, each.backend, each.precision] = str(getattr(error.value, "found", error.value))
    return found


def test_without_a_gpu_rows_have_the_reason(resnet50, machine):
    machine(cuda=NO_GPU, tensorrt=NO_TENSORRT)
    artefacts, notes = make_files(resnet50)
    assert [path.name for path in artefacts.onnx] == ["resnet50.onnx"]
    assert artefacts.engines == artefacts.others == () and notes == ["resnet50.onnx compared with PyTorch: none"]
    assert absent_rows(artefacts) == {
        ("resnet50.fp16.onnx", "ONNX Runtime CUDA", "fp16"): "no GPU",
        ("resnet50.fp16.engine", "TensorRT", "fp16"): "no Python package tensorrt",
    }
    # Each row once, and none for a run's `model.engine`.
    found = [(each.model, each.backend) for each in our_contenders(artefacts) if each.file is None]
    assert found.count(("resnet50.fp16.engine", "TensorRT")) == 1
    assert not any(model.startswith("model.") for model, _ in found)


def test_cuda_brings_the_half_precision_file(resnet50, machine):
    machine(tensorrt=NO_TENSORRT)
    artefacts, notes = make_files(resnet50)
    assert [path.name for path in artefacts.onnx] == ["resnet50.onnx", "resnet50.fp16.onnx"]
    assert len(notes) == 2 and notes[1].startswith("resnet50.fp16.onnx compared with single precision: ")
    assert list(absent_rows(artefacts)) == [("resnet50.fp16.engine", "TensorRT", "fp16")]
    assert artefacts.build_s.keys() == set(artefacts.onnx)


def test_tensorrt_builds_the_engine(resnet50, machine, monkeypatch, onnx_file):
    machine(cuda=NO_GPU)
    built = {}

    def build(source, **options):
        built.update(options, source=source)
        write_engine(options["output"], onnx_file)
        return SimpleNamespace(difference="0 beyond the tolerance")

    monkeypatch.setattr(workloads, "build_engine", build)
    artefacts, notes = make_files(resnet50)
    assert [path.name for path in artefacts.others] == ["resnet50.fp16.engine"]
    assert notes[-1] == "resnet50.fp16.engine compared with the ONNX file: 0 beyond the tolerance"
    assert built == {
        "source": resnet50.with_suffix(".onnx"),
        "output": resnet50.with_suffix(".fp16.engine"),
        "precision": "fp16",
        "target": "tensorrt",
        "batch": "1,8",
        "size": "64x96,96x96",
    }
    assert list(absent_rows(artefacts)) == [("resnet50.fp16.onnx", "ONNX Runtime CUDA", "fp16")]


def test_a_rejected_engine_is_measured_with_its_metadata(resnet50, machine, monkeypatch, onnx_file):
    machine(cuda=NO_GPU)

    def build(source, *, output, **options):
        write_engine(output.with_suffix(".rejected.engine"), onnx_file)
        raise UserError(f"an engine that differs from {source}", "less", "look at it")

    monkeypatch.setattr(workloads, "build_engine", build)
    artefacts, notes = make_files(resnet50)
    engine = resnet50.with_suffix(".fp16.engine")
    assert artefacts.others == (engine,) and engine.with_name("resnet50.fp16.engine.json").is_file()
    assert notes[-1] == "an engine that differs from resnet50.onnx"  # without the folder, which is temporary
    assert engine not in artefacts.build_s
    assert not list(engine.parent.glob("*.rejected*"))


def test_a_rejected_cast_is_not_measured(resnet50, machine, monkeypatch):
    machine(tensorrt=NO_TENSORRT)

    def refuse(source, output, precision, **options):
        output.with_suffix(".rejected.onnx").touch()
        raise UserError("a graph that differs", "less", "look at it")

    monkeypatch.setattr(variants, "write_half", refuse)
    artefacts, _ = make_files(resnet50)
    assert absent_rows(artefacts)["resnet50.fp16.onnx", "ONNX Runtime CUDA", "fp16"] == "a graph that differs"
    assert [path.name for path in artefacts.onnx] == ["resnet50.onnx"]


def test_any_error_of_a_library_affects_its_rows_only(resnet50, machine, monkeypatch):
    machine(cuda=NO_GPU)
    monkeypatch.setattr(workloads, "build_engine", lambda *given, **options: 1 / 0)
    artefacts, _ = make_files(resnet50)
    assert absent_rows(artefacts)["resnet50.fp16.engine", "TensorRT", "fp16"] == "division by zero"
    assert [path.name for path in artefacts.onnx] == ["resnet50.onnx"]


def test_without_the_export_every_row_has_the_reason(resnet50, machine, monkeypatch):
    machine()
    monkeypatch.setattr(workloads, "export", lambda *given, **options: 1 / 0)
    artefacts, notes = make_files(resnet50)
    assert artefacts.onnx == artefacts.others == () and notes == []
    assert [each.model for each in artefacts.absent] == ["resnet50.onnx", "resnet50.fp16.onnx", "resnet50.fp16.engine"]
    assert absent_rows(artefacts)["resnet50.fp16.engine", "TensorRT", "fp16"] == "no file resnet50.onnx"


def test_files_for_the_cpu(resnet50, machine, monkeypatch):
    machine(cuda=NO_GPU, tensorrt=NO_TENSORRT)
    resnet50.with_suffix(".int8.xml").write_text("of an earlier run")
    build = workloads.build_openvino_engine

    def reject(onnx, *, output, **options):
        build(onnx, output, half=True)
        for suffix in (".xml", ".bin"):
            output.with_suffix(suffix).rename(output.with_suffix(f".rejected{suffix}"))
        raise UserError("an engine that differs", "less", "look at it")

    def refuse(*given, **options):
        raise UserError("no OpenVINO", "OpenVINO", "install it")

    monkeypatch.setattr(workloads, "build_engine", reject)
    monkeypatch.setattr(workloads, "build_openvino_engine", refuse)
    artefacts, notes = make_files(resnet50, gpu_only=False)
    assert [path.name for path in artefacts.onnx] == ["resnet50.onnx", "resnet50.int8.onnx"]
    assert [path.name for path in artefacts.engines] == ["resnet50.fp16.xml"]
    assert resnet50.with_suffix(".fp16.bin").is_file() and "an engine that differs" in notes
    assert absent_rows(artefacts)["resnet50.int8.xml", "OpenVINO engine", "int8"] == "no OpenVINO"


def test_the_cuda_provider_must_work(onnx_file, monkeypatch):
    monkeypatch.setattr(onnxruntime_providers, "best_provider", lambda: onnxruntime_providers.Provider.CPU)
    assert "no GPU" in workloads.cuda_obstacle(onnx_file).found
    monkeypatch.setattr(onnxruntime_providers, "best_provider", lambda: onnxruntime_providers.Provider.CUDA)
    providers = []
    monkeypatch.setattr(onnxruntime_backend, "OnnxRuntimeBackend", lambda path, provider: providers.append(provider))
    assert workloads.cuda_obstacle(onnx_file) is None and providers == ["cuda"]

    def refuse(path, provider):
        raise UserError("ONNX Runtime without CUDA", "CUDA", "install it")

    monkeypatch.setattr(onnxruntime_backend, "OnnxRuntimeBackend", refuse)
    assert workloads.cuda_obstacle(onnx_file).found == "ONNX Runtime without CUDA"
