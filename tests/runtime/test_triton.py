"""Model repositories for Triton: their content, Triton's rules, and that existing files stay."""

import dataclasses
import errno
import shutil
from pathlib import Path

import onnx
import onnxruntime
import pytest
from engine_files import PROFILE, write_engine
from triton_rules import read_repository

from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata
from maskrcnn.plugins import build
from maskrcnn.runtime.backends.openvino import openvino_core
from maskrcnn.runtime.backends.tensorrt_library import PluginForm, plugin_hash
from maskrcnn.runtime.build.profiles import Profile, Span
from maskrcnn.runtime.engine_files import read_metadata, read_model
from maskrcnn.runtime.serving.models import ServingOptions, batch_limit, largest_batch, served_model, size_ranges
from maskrcnn.runtime.serving.triton import default_name, write_repository

PARTS = ("det", "det_network", "det_post", "det_pre")


@pytest.fixture
def engine(tmp_path, onnx_file):
    return write_engine(tmp_path / "model.fp16.engine", onnx_file)


@pytest.fixture(scope="module")
def other_file(tmp_path_factory, onnx_file):
    """A file of the same model with other bytes, as from another checkpoint."""
    model, _ = read_model(onnx_file)
    model.doc_string = "another"
    path = tmp_path_factory.mktemp("other") / "model.onnx"
    onnx.save(model, path)
    return path


def write(out, path, name="det", network="native", **options):
    settings = {key: options.pop(key) for key in ("raw", "keep_config") if key in options}
    return write_repository(out, [(name, served_model(path, network=network))], ServingOptions(**options), **settings)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What is written


@pytest.mark.parametrize(
    ("kind", "file"), [("masks", "onnx_file"), ("boxes", "boxes_onnx_file"), ("masks, keypoints", "joint_onnx_file")]
)
@pytest.mark.parametrize("masks", ["rle", "bits", "none"])
def test_an_onnx_file_becomes_four_models_that_triton_loads(tmp_path, request, kind, file, masks):
    path = request.getfixturevalue(file)
    (written,) = write(tmp_path / "repo", path, masks=masks)
    assert (written.version, written.is_new, sorted(written.models)) == (1, True, list(PARTS))
    configs = read_repository(tmp_path / "repo")
    assert tuple(configs) == PARTS
    outputs = {tensor["name"]: tensor for tensor in configs["det"]["output"]}
    assert ("masks" in outputs) == ("masks" in kind and masks != "none")
    names = tmp_path / "repo/det/1/keypoints.txt"
    assert ("keypoints" in outputs) == ("keypoints" in kind) == names.exists()
    if names.exists():
        assert outputs["keypoints"]["dims"] == [12, 5, 3]
        assert names.read_text() == "head\nleft_hand\nright_hand\nleft_foot\nright_foot\n"
    assert configs["det_network"]["backend"] == "onnxruntime"
    assert configs["det_network"]["instance_group"] == [{"count": 1}]  # KIND_AUTO is the default
    assert (tmp_path / "repo/det_network/1/model.onnx").read_bytes() == path.read_bytes()
    assert (tmp_path / "repo/det/1/labels.txt").read_text() == "circle\nrectangle\ntriangle\n"
    metadata = tmp_path / "repo/det_pre/1/metadata.json"
    assert ModelMetadata.from_json(metadata.read_text(), metadata) == read_model(path)[1]


def test_a_bare_network(tmp_path, onnx_file):
    write(tmp_path, onnx_file, raw=True)
    (config,) = read_repository(tmp_path).values()
    assert [tensor["name"] for tensor in config["input"]] == ["images", "image_sizes"]
    assert (tmp_path / "det_network/1/metadata.json").is_file()
    write(tmp_path, onnx_file)  # the rest, for the same version
    assert tuple(read_repository(tmp_path)) == PARTS
    assert not (tmp_path / "det_network/2").exists()


def test_options_of_a_server(tmp_path, onnx_file):
    options = {"instances": 3, "step_instances": 5, "kind": "cpu", "threads": 2, "queue_delay_us": 700}
    write(tmp_path, onnx_file, max_batch=4, min_score=0.25, pad_to=((128, 160), (160, 128)), **options)
    configs = read_repository(tmp_path)
    network = configs["det_network"]
    assert network["instance_group"] == [{"count": 3, "kind": "KIND_CPU"}]
    assert network["dynamic_batching"] == {"max_queue_delay_microseconds": 700}
    assert network["max_batch_size"] == configs["det"]["max_batch_size"] == 4
    assert network["parameters"]["intra_op_thread_count"] == {"string_value": "2"}
    assert [sample["name"] for sample in network["model_warmup"]] == ["1 of 128x160", "1 of 160x128"]
    assert configs["det_pre"]["parameters"]["sizes"]["string_value"] == "128:128x160:160,160:160x128:128"
    assert configs["det_pre"]["instance_group"] == [{"count": 5, "kind": "KIND_CPU"}]
    assert configs["det_post"]["parameters"]["min_score"]["string_value"] == "0.25"


def test_no_path_of_this_machine_is_written(tmp_path, onnx_file):
    write(tmp_path / "repo", onnx_file)
    texts = [path for path in (tmp_path / "repo").rglob("*") if path.suffix in (".pbtxt", ".json", ".txt")]
    assert len(texts) > 6
    assert not [
        path for path in texts if str(tmp_path) in path.read_text() or str(onnx_file.parent) in path.read_text()
    ]


def test_the_outputs_of_a_model_file_are_those_of_its_configuration(tmp_path, onnx_file, half_openvino_engine):
    """Triton's backends compare names and shapes, variable lengths included (CompareDimsSupported)."""
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    compiled = openvino_core().read_model(half_openvino_engine)
    shapes = {
        onnx_file: {node.name: node.shape for node in session.get_outputs()},
        half_openvino_engine: {
            output.get_any_name(): [None if d.is_dynamic else d.get_length() for d in output.get_partial_shape()]
            for output in compiled.outputs
        },
    }
    for path, found in shapes.items():
        write(tmp_path, path, name=path.suffix[1:])
        config = read_repository(tmp_path)[f"{path.suffix[1:]}_network"]
        for tensor in config["output"]:
            dims = tensor["reshape"].get("shape", []) if "reshape" in tensor else tensor["dims"]
            wanted = ([-1] if config["max_batch_size"] > 0 else []) + dims
            assert [n if isinstance(n, int) else -1 for n in found[tensor["name"]]] == wanted, tensor


def test_the_network_in_the_python_backend(tmp_path, onnx_file, half_openvino_engine, engine):
    packages = {onnx_file: "onnxruntime", half_openvino_engine: "openvino", engine: "tensorrt, cuda-python"}
    for path in packages:
        out = tmp_path / path.suffix[1:]
        write(out, path, network="python", instances=2, threads=3, cuda_graphs=False)
        configs = read_repository(out)
        network, native = configs["det_network"], ServingOptions()
        assert network["backend"] == "python" and network["max_batch_size"] == configs["det"]["max_batch_size"] == 8
        assert "dynamic_batching" in network and "optimization" not in network
        assert packages[path] in served_model(path, network="python").needs[-1]
        assert batch_limit(served_model(path, network="python"), native) == batch_limit(served_model(path), native)
        folder = out / "det_network/1"
        name = network["parameters"]["file"]["string_value"]
        assert (folder / name).read_bytes() == path.read_bytes()
        assert read_metadata(folder / name) == read_metadata(path)
    assert network["parameters"]["graphs"] == {"string_value": "no"} and "profile" not in network["instance_group"][0]
    assert network["instance_group"][0]["kind"] == "KIND_GPU"
    # The step finds the sources by whose hash an engine is checked, and none of the packages that need PyTorch.
    sources = [path for path in (folder / "maskrcnn/plugins/csrc").rglob("*") if path.is_file()]
    assert len(sources) > 10 and not (folder / "maskrcnn/model").exists()
    library = write_engine(tmp_path / "l.engine", onnx_file, plugins="library")
    with pytest.raises(UserError, match=r"calls the plugin library(.|\n)*without --plugin-library"):
        served_model(library, network="python")
    with pytest.raises(UserError, match="--network tpu"):
        served_model(onnx_file, network="tpu")


# Engines


def test_an_engine_with_its_profiles(tmp_path, engine):
    served = served_model(engine)
    assert served.flags == ()
    assert served.needs[0] == "the GPU NVIDIA H100 80GB HBM3 (compute capability 9.0)"
    assert "TensorRT 11.4.0.106, exactly" in served.needs[1] and len(served.needs) == 2
    write(tmp_path / "repo", engine)
    configs = read_repository(tmp_path / "repo")
    network = configs["det_network"]
    assert (network["backend"], network["max_batch_size"]) == ("tensorrt", 8)
    assert network["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
    assert network["dynamic_batching"]["preferred_batch_size"] == [4]
    graphs = network["optimization"]["cuda"]
    assert graphs["graphs"] is True
    assert [spec["batch_size"] for spec in graphs["graph_spec"]] == [1, 4, 8]
    assert {tuple(spec["input"]["images"]["dim"]) for spec in graphs["graph_spec"]} == {(3, 96, 128)}
    assert [sample["name"] for sample in network["model_warmup"]] == ["4 of 96x128"]
    assert configs["det_pre"]["parameters"]["sizes"]["string_value"] == "96:160x96:160"
    assert (tmp_path / "repo/det_network/1/model.plan").read_bytes() == b"a plan"


def test_several_profiles_and_no_graphs(tmp_path, onnx_file):
    profiles = [PROFILE | {"batch": batch} for batch in ([1, 1, 1], [2, 4, 4])]
    engine = write_engine(tmp_path / "m.engine", onnx_file, profiles)
    write(tmp_path / "repo", engine, cuda_graphs=False)
    network = read_repository(tmp_path / "repo")["det_network"]
    assert network["instance_group"][0]["profile"] == ["0", "1"]
    assert network["max_batch_size"] == 4 and "optimization" not in network


def test_a_version_compatible_engine(tmp_path, onnx_file):
    served = served_model(write_engine(tmp_path / "m.engine", onnx_file, version_compatible="yes"))
    assert served.flags == ("--backend-config=tensorrt,version-compatible=true",)
    assert "TensorRT 11.4.0.106 or newer" in served.needs


def test_the_requirements_of_an_engine(tmp_path, onnx_file):
    def needs(profiles=(PROFILE,), **stamp):
        return " ".join(served_model(write_engine(tmp_path / "m.engine", onnx_file, profiles, **stamp)).needs)

    assert "compute capability 8.0 or newer" in needs(hardware_compatibility="ampere_plus")
    assert needs(hardware_compatibility="same_compute_capability").startswith("a GPU of compute capability 9.0 ")
    assert "batches of at most 1" in needs([PROFILE | {"batch": [1, 1, 1]}, PROFILE | {"batch": [4, 4, 4]}])
    with pytest.raises(UserError, match="without its weights"):
        needs(refit="stripped")


def test_the_plugin_library_of_an_engine_is_copied(tmp_path, onnx_file):
    engine = write_engine(tmp_path / "m.engine", onnx_file, plugins="library")
    names = ("libmaskrcnn_plugins.so", "libmaskrcnn_plugins_register.so")
    (tmp_path / names[0]).write_text("plugins")
    with pytest.raises(UserError, match=r"no libmaskrcnn_plugins_register\.so beside"):
        served_model(engine, plugin_library=tmp_path / names[0])
    (tmp_path / names[1]).write_text("register")
    served = served_model(engine, plugin_library=tmp_path / names[0])
    write_repository(tmp_path / "repo", [("det", served)], ServingOptions())
    assert [(tmp_path / "repo/det_network/1" / name).read_text() for name in names] == ["plugins", "register"]
    assert served.flags == ("--backend-config=tensorrt,plugins={folder}/libmaskrcnn_plugins_register.so",)


def test_the_plugin_library_of_the_cache_must_be_of_the_engines_sources(tmp_path, onnx_file, monkeypatch):
    engine = write_engine(tmp_path / "m.engine", onnx_file, plugins="library")
    with pytest.raises(UserError, match="plugins from other sources"):
        served_model(engine)
    engine = write_engine(engine, onnx_file, plugins="library", plugin_hash=plugin_hash(PluginForm.LIBRARY))
    asked = []
    monkeypatch.setattr(build, "find_library", lambda kind, arch, tensorrt: asked.append((kind.value, arch, tensorrt)))
    with pytest.raises(UserError, match=r"no plugin library in the cache for compute capability 9\.0"):
        served_model(engine)
    assert asked == [("plugins", 90, "11.4.0.106")]


def profile(batch, height=96):
    return Profile(Span(*batch), Span(height, height, height), Span(128, 128, 128))


@pytest.mark.parametrize(
    ("batches", "limit"),
    [
        ([(1, 4, 8)], 8),
        ([(1, 1, 1), (2, 4, 4)], 4),
        ([(1, 1, 1), (4, 4, 4)], 1),
        ([(4, 4, 8)], 0),
        ([], 0),
    ],
)
def test_the_largest_batch_leaves_no_gap(batches, limit):
    profiles = [profile(batch) for batch in batches]
    assert largest_batch(profiles) == limit


def test_the_largest_batch_holds_at_every_size():
    assert largest_batch([profile((1, 1, 8)), profile((1, 1, 2), height=160)]) == 2


def test_batches_and_sizes_outside_the_profiles(tmp_path, onnx_file, engine):
    served = served_model(engine)
    assert batch_limit(served, ServingOptions(max_batch=3)) == 3
    with pytest.raises(UserError, match=r"--batch 1:9:9, or use --max-batch 8"):
        batch_limit(served, ServingOptions(max_batch=9))
    fixed = served_model(write_engine(tmp_path / "m.engine", onnx_file, [PROFILE | {"batch": [4, 4, 4]}]))
    with pytest.raises(UserError, match=r"batches of 4, and(.|\n)*--batch 1:1:1$"):
        batch_limit(fixed, ServingOptions())
    assert size_ranges(served, ServingOptions(pad_to=((128, 160),))) == [(128, 128, 160, 160)]
    with pytest.raises(UserError, match=r"--pad-to 192x160\n.*a size within 96–160×96–160"):
        size_ranges(served, ServingOptions(pad_to=((192, 160),)))
    with pytest.raises(UserError, match=r"--pad-to 100x160\n.*multiples of 32"):
        size_ranges(served, ServingOptions(pad_to=((100, 160),)))


# OpenVINO


def test_an_openvino_engine(tmp_path, half_openvino_engine):
    write(tmp_path, half_openvino_engine, instances=2, threads=3)
    configs = read_repository(tmp_path)
    network = configs["det_network"]
    assert (network["backend"], network["max_batch_size"], configs["det"]["max_batch_size"]) == ("openvino", 0, 8)
    assert network["instance_group"] == [{"count": 2, "kind": "KIND_CPU"}] and "dynamic_batching" not in network
    parameters = {key: value["string_value"] for key, value in network["parameters"].items()}
    execution = served_model(half_openvino_engine).metadata.stamp["execution"]
    assert parameters == {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": "2",
        "INFERENCE_NUM_THREADS": "3",
        **({"HINT_BF16": "YES"} if execution == "bf16" else {}),
    }
    assert {path.name for path in (tmp_path / "det_network/1").iterdir()} == {"model.xml", "model.bin", "metadata.json"}


def test_an_openvino_engine_in_single_precision_is_rejected(openvino_engine):
    with pytest.raises(UserError, match=r"would run in bfloat16(.|\n)*--network python"):
        served_model(openvino_engine)
    assert served_model(openvino_engine, network="python").backend == "python"


# Files that cannot be served


def test_files_that_are_refused(tmp_path, onnx_file, checkpoint, engine, half_openvino_engine):
    def refused(path, text):
        with pytest.raises(UserError, match=text):
            served_model(path)

    refused(checkpoint, r"maskrcnn export CHECKPOINT --onnx")
    refused(tmp_path / "none.onnx", "no file")
    engine.with_name("model.fp16.engine.json").unlink()
    refused(engine, r"no model\.fp16\.engine\.json beside")
    refused(write_engine(tmp_path / "o.engine", onnx_file, target="openvino"), "an engine for openvino")
    refused(write_engine(tmp_path / "p.engine", onnx_file, [{"batch": [1, 2]}]), "in an engine's stamp")
    refused(write_engine(tmp_path / "q.engine", onnx_file, profiles=None), "in an engine's stamp")
    shutil.copy(half_openvino_engine, tmp_path / "alone.xml")
    refused(tmp_path / "alone.xml", r"no alone\.bin beside")
    shutil.copy(half_openvino_engine.with_suffix(".bin"), tmp_path / "alone.bin")
    (tmp_path / "alone.xml").write_text("<net></net>")
    refused(tmp_path / "alone.xml", "without maskrcnn's metadata")
    (tmp_path / "alone.xml").write_text("<net>")
    refused(tmp_path / "alone.xml", "no XML")


def test_bfloat16_is_refused(tmp_path, onnx_file):
    model, metadata = read_model(onnx_file)
    for entry in model.metadata_props:
        entry.value = dataclasses.replace(metadata, precision="bf16").to_json()
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UserError, match="ONNX Runtime has no kernels"):
        served_model(tmp_path / "m.onnx")


# Existing repositories


def test_versions_are_added(tmp_path, onnx_file, other_file):
    write(tmp_path, onnx_file)
    before = contents(tmp_path)
    (again,) = write(tmp_path, onnx_file)
    assert (again.version, again.is_new) == (1, False) and contents(tmp_path) == before
    (second,) = write(tmp_path, other_file)
    assert (second.version, second.is_new) == (2, True)
    after = contents(tmp_path)
    assert before.items() <= after.items()
    assert all((tmp_path / part / "2").is_dir() for part in PARTS)
    read_repository(tmp_path)
    shutil.rmtree(tmp_path / "det_network/1")
    (third,) = write(tmp_path, onnx_file)
    assert third.version == 3


def test_another_configuration_is_not_overwritten(tmp_path, onnx_file, other_file):
    write(tmp_path, onnx_file)
    config = tmp_path / "det_network/config.pbtxt"
    config.write_text(config.read_text().replace("max_queue_delay_microseconds: 0", "max_queue_delay_microseconds: 9"))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"has `max_queue_delay_microseconds: 9`.* `max_queue_delay_microseconds: 0`"):
        write(tmp_path, other_file)
    with pytest.raises(UserError, match="--keep-config"):
        write(tmp_path, onnx_file, masks="bits")
    assert contents(tmp_path) == before
    (written,) = write(tmp_path, other_file, keep_config=True)
    assert written.version == 2 and before.items() <= contents(tmp_path).items()


def test_a_repository_of_another_contract_is_not_continued(tmp_path, onnx_file, other_file):
    write(tmp_path, onnx_file)
    metadata = tmp_path / "det_network/1/metadata.json"
    metadata.write_text(metadata.read_text().replace('"contract": 1', '"contract": 7'))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"det_network/1/metadata\.json: contract version 7"):
        write(tmp_path, other_file, keep_config=True)
    assert contents(tmp_path) == before
    assert write(tmp_path, other_file, name="another")[0].is_new


def test_other_models_stay(tmp_path, onnx_file, boxes_onnx_file):
    write(tmp_path, onnx_file)
    before = contents(tmp_path)
    served = [(name, served_model(boxes_onnx_file)) for name in ("one", "two")]
    write_repository(tmp_path, served, ServingOptions())
    assert before.items() <= contents(tmp_path).items()
    assert len(read_repository(tmp_path)) == 12


def test_invalid_folders_and_names(tmp_path, onnx_file):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: a file"):
        write(tmp_path / "file", onnx_file)
    write(tmp_path / "repo", onnx_file)
    with pytest.raises(UserError, match=r"the folder of one model(.|\n)*pass the parent folder: .*repo"):
        write(tmp_path / "repo/det", onnx_file)
    (tmp_path / "repo/new_network").touch()
    with pytest.raises(UserError, match="new_network: a file"):
        write(tmp_path / "repo", onnx_file, name="new")
    served = served_model(onnx_file)
    with pytest.raises(UserError, match="two models named det"):
        write_repository(tmp_path / "repo", [("det", served), ("det", served)], ServingOptions())
    for name in ("../up", ".hidden", "two words"):
        with pytest.raises(UserError, match="a unique name"):
            write(tmp_path / "repo", onnx_file, name=name)


def test_a_failure_leaves_no_half_version(tmp_path, onnx_file, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    write(tmp_path / "repo", onnx_file)
    before = contents(tmp_path)
    served = dataclasses.replace(served_model(onnx_file), files={"model.onnx": tmp_path / "repo/det/config.pbtxt"})
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space left"):
        write_repository(tmp_path / "repo", [("det", served)], ServingOptions())
    assert contents(tmp_path) == before
    assert not list(tmp_path.rglob("*.version-*"))


def entries(repository):
    return {path.relative_to(repository).as_posix() for path in repository.glob("*/*")}


@pytest.mark.parametrize("is_mount", [False, True])
def test_the_repository_changes_by_whole_versions_only(tmp_path, onnx_file, monkeypatch, is_mount):
    """What a server that polls may see at any moment: on a mount, a name that it ignores besides."""
    repository, seen = tmp_path / "repo", set()
    write(repository, onnx_file)
    copy, rename = shutil.copyfile, Path.rename

    def observed_copy(source, target):
        copy(source, target)
        seen.update(name.partition(".version-")[0] for name in entries(repository))

    def rename_within_a_mount(path, target):
        if (repository in path.parents) != (repository in Path(target).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(path, target)

    if is_mount:
        monkeypatch.setattr(Path, "rename", rename_within_a_mount)
    monkeypatch.setattr(shutil, "copyfile", observed_copy)
    other, _ = read_model(onnx_file)
    other.doc_string = "another"
    onnx.save(other, tmp_path / "other.onnx")
    before = entries(repository)
    write(repository, tmp_path / "other.onnx")
    models = ("det", "det_network", "det_post", "det_pre")
    # The ensemble's version is written last, and copies nothing.
    assert seen == before | ({f"{model}/.{model}" for model in models[1:]} if is_mount else set())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.onnx", "repo"]
    assert all((repository / model / "2").is_dir() for model in models)


def test_names_after_files(tmp_path):
    names = {"model.onnx": "model_onnx", "a b.fp16.engine": "a_b_fp16_tensorrt", "m.int8.xml": "m_int8_openvino"}
    assert {name: default_name(tmp_path / name) for name in names} == names


def test_choices_are_checked():
    with pytest.raises(UserError, match="--masks polygons"):
        ServingOptions(masks="polygons")
    with pytest.raises(UserError, match="--kind tpu"):
        ServingOptions(kind="tpu")
