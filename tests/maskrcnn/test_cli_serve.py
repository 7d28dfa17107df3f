"""`maskrcnn triton` and `maskrcnn web`."""

import pytest
from command_line import expect_error
from engine_files import write_engine
from triton_rules import read_repository

import maskrcnn.api.serving


def test_a_repository_from_the_command_line(run, road, tmp_path):
    code, out, err = run("triton", road / "model.onnx", "repository", "--pad-to", "96x128", "--pad-to", "128x96")
    assert code == 0, err
    configs = read_repository(tmp_path / "repository")
    assert sorted(configs) == ["model_onnx", "model_onnx_network", "model_onnx_post", "model_onnx_pre"]
    assert configs["model_onnx_pre"]["parameters"]["sizes"]["string_value"] == "96:96x128:128,128:128x96:96"
    assert "model_onnx: " in out and "in fp32 on Triton's onnxruntime backend, version 1 written" in out
    assert "start, with repository at /models: tritonserver --model-repository=/models" in out
    assert "version 1 exists already" in run("triton", road / "model.onnx", "repository", "--keep-config")[1]


def test_options_reach_the_configuration(run, road, tmp_path):
    options = ("--name", "shapes", "--masks", "bits", "--min-score", "0.5", "--max-batch", "2", "--instances", "3")
    more = ("--network", "python", "--queue-delay", "100", "--step-instances", "4", "--kind", "cpu", "--threads", "1")
    assert run("triton", road / "model.onnx", "out", *options, *more)[0] == 0
    configs = read_repository(tmp_path / "out")
    network = configs["shapes_network"]
    assert network["instance_group"] == [{"count": 3, "kind": "KIND_CPU"}]
    assert network["max_batch_size"] == 2
    assert network["dynamic_batching"]["max_queue_delay_microseconds"] == 100
    assert network["parameters"] == {"file": {"string_value": "model.onnx"}, "threads": {"string_value": "1"}}
    assert configs["shapes_post"]["parameters"]["min_score"]["string_value"] == "0.5"
    assert configs["shapes_post"]["instance_group"][0]["count"] == 4
    assert configs["shapes"]["output"][-1] == {"name": "masks", "data_type": "TYPE_UINT8", "dims": [-1, -1, -1]}


def test_several_models_and_an_engine_with_flags(run, road, tmp_path, onnx_file):
    for name in ("libmaskrcnn_plugins.so", "libmaskrcnn_plugins_register.so"):
        (tmp_path / name).touch()
    engine = write_engine(road / "model.fp16.engine", onnx_file, plugins="library", version_compatible="yes")
    arguments = (road / "model.onnx", engine, "out", "--raw", "--no-cuda-graphs")
    code, out, err = run("triton", *arguments, "--plugin-library", tmp_path / "libmaskrcnn_plugins.so")
    assert code == 0, err
    configs = read_repository(tmp_path / "out")
    assert sorted(configs) == ["model_fp16_tensorrt_network", "model_onnx_network"]
    assert "optimization" not in configs["model_fp16_tensorrt_network"]
    assert "needs: the GPU NVIDIA H100" in out and "needs: TensorRT 11.4.0.106 or newer" in out
    flags = (
        "--backend-config=tensorrt,version-compatible=true "
        "--backend-config=tensorrt,plugins=/models/model_fp16_tensorrt_network/1/libmaskrcnn_plugins_register.so"
    )
    assert f"tritonserver --model-repository=/models {flags}" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("model.onnx", "model.onnx", "out", "--name", "x"), ("--name x for 2 models",)),
        (("model.onnx", "model.onnx", "out"), ("two models named model_onnx",)),
        (("best.safetensors", "out"), ("'.safetensors'", "maskrcnn export CHECKPOINT --onnx")),
        (("model.onnx", "out", "--pad-to", "big"), ("--pad-to big", "for example --pad-to 800x1344")),
    ],
)
def test_models_that_cannot_be_served(run, road, arguments, parts):
    paths = [road / word if (road / word).is_file() else word for word in arguments]
    expect_error(run("triton", *paths), *parts)
    assert not (road.parents[1] / "out").exists()


def test_an_unknown_format_of_masks_is_a_usage_error(run, road):
    code, _, err = run("triton", road / "model.onnx", "out", "--masks", "png")
    assert code == 2 and "--masks" in err and "'png'" in err


def test_the_python_function(road, tmp_path):
    result = maskrcnn.api.serving.triton(road / "model.onnx", tmp_path / "repository", raw=True)
    (model,) = result.served
    assert (model.name, model.version, model.models) == ("model_onnx", 1, ["model_onnx_network"])
    assert result.command == "tritonserver --model-repository=/models" and result.to_dict()["served"][0]["is_new"]


def test_a_page_needs_the_runtime_of_its_version(run, road, tmp_path):
    (tmp_path / "package").mkdir()
    result = run("web", road / "model.onnx", "page", "--onnxruntime-web", "package")
    expect_error(result, "no ort.wasm.min.mjs in package", "npm pack onnxruntime-web@", "--onnxruntime-web")
    assert not (tmp_path / "page").exists()
