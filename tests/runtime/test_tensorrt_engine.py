"""Engines built, compared, kept and refitted, with doubles of TensorRT's classes and ONNX Runtime as the engine."""

import json

import pytest

from maskrcnn.runtime.build.profiles import from_json


@pytest.fixture(scope="session")
def results(each_tensorrt, flow_paths, tmp_path_factory):
    """The result of each flow of tests/support/tensorrt_engine_flows.py."""
    folder = tmp_path_factory.mktemp("engines")
    return each_tensorrt.flows("tensorrt_engine_flows", {**flow_paths, "folder": str(folder)})


def test_an_engine_that_agrees_is_kept_with_its_stamp(value):
    built = value("engine_that_agrees")
    assert built["files"] == ["model.fp16.engine", "model.fp16.engine.json", "timing.cache"]
    stamp = built["stamp"]
    assert built["same"] and built["precision"] == "fp16" and built["source"] and built["plan"]
    assert {name: stamp[name] for name in ("target", "precision", "gpu", "compute_capability", "plugins")} == {
        "target": "tensorrt",
        "precision": "fp16",
        "gpu": "NVIDIA Test 1",
        "compute_capability": "9.0",
        "plugins": "library",
    }
    assert stamp["hardware_compatibility"] == "none" and stamp["version_compatible"] == "no"
    assert stamp["options"] == "plugins=library" and stamp["command"].startswith("maskrcnn build-engine model.onnx")
    assert stamp["kept_fp32"].startswith("fp16: ") and "fp32: " in stamp["kept_fp32"]
    assert len(stamp["onnx_sha256"]) == len(stamp["plugin_hash"]) == 64
    assert [str(profile) for profile in from_json(stamp["profiles"])] == [
        "batch 1 of 64–128×96–160, tuned for 1 of 96×128",
        "batch 2 of 64–128×96–160, tuned for 2 of 96×128",
    ]
    assert all(isinstance(field, str) for field in stamp.values())


def test_the_comparison_runs_the_corners_of_every_profile_and_the_images(value):
    built = value("engine_that_agrees")
    corners = [[batch, height, width] for batch in (1, 2) for height, width in ((64, 96), (96, 128), (128, 160))]
    assert built["shapes"][:6] == corners
    assert built["shapes"][6:8] == [[1, 96, 96]] * 2  # two images of the folder, padded to a profile
    assert built["ap"] == ["box_ap", "mask_ap"] and "box_ap" in built["stamp"]["compared"]
    assert built["titles"][0] == "building" and built["titles"][-1].startswith("AP of the engine")


def test_an_engine_that_differs_is_set_aside_and_the_stage_is_named(value):
    found = value("engine_that_departs")
    assert found["kept"] == "the one before"
    assert found["files"] == [
        "model.fp16.engine",
        "model.fp16.rejected.engine",
        "model.fp16.rejected.engine.json",
        "model.fp16.rejected.stages.json",
        "timing.cache",
    ]
    text, expected, fix = found["parts"]
    assert "first departure: box_deltas" in text and "model.fp16.rejected.stages.json" in text
    assert expected.startswith("boxes within 16 px")
    assert "model.fp16.rejected.engine with `maskrcnn evaluate`" in fix


def test_the_stage_is_named_for_a_stripped_engine_too(value):
    found = value("stripped_engine_that_departs")
    assert "first departure: box_deltas" in found["found"]
    assert found["stamp"] == "stripped" and found["hash"]


def test_an_engine_whose_stages_do_not_build_is_rejected_too(error):
    assert "its stages could not be compared: TensorRT built no engine" in error("engine_whose_stages_do_not_build")[0]


def test_a_stripped_engine_is_compared_with_its_weights_and_does_not_run_without(value):
    built = value("engine_without_weights")
    assert built["refit"] and built["cleared"] == ["EXCLUDE_WEIGHTS"] and built["host_code"] is False
    assert built["stamp"] == "stripped" and "maskrcnn refit-engine" in built["fix"]


def test_kernels_of_a_hardware_compatible_engine_are_for_the_oldest_gpu(value):
    assert value("engine_for_more_gpus") == {"arch": 80, "image": "ptx", "stamp": "aot"}


def test_weights_are_replaced(value):
    built = value("engine_with_other_weights")
    assert {"new.engine", "new.engine.json"} <= set(built["files"])
    stamp, (old, new) = built["stamp"], built["hashes"]
    assert stamp["plan_sha256"] == new != old
    assert stamp["compared"] == built["compared"]
    wanted = ("refitted", ["INCLUDE_REFIT"]) if built["can_remain"] else ("fixed", [])
    assert (stamp["refit"], built["set"]) == wanted


def test_weights_can_be_replaced_again_if_tensorrt_supports_it(value):
    assert value("engine_that_gets_weights_once_more") == ["refitted", "refitted"]
    once = value("engine_that_gets_weights_but_once")
    assert once["stamp"] == "fixed" and once["flags"] == 0
    assert "new.engine: an engine with fixed weights" in once["found"]


@pytest.mark.parametrize(
    ("flow", "found"),
    [
        ("refit_of_a_broken_plan", "a plan of another version of TensorRT"),
        ("refit_without_some_weights", "2 are missing, first conv1.weight"),
        ("refit_that_the_parser_refuses", "conv1 (Conv): REFIT_FAILED: weights of another size"),
        ("engine_for_more_gpus_with_an_old_driver", "with NVRTC 13.2 and a driver for CUDA 13.0"),
        ("image_outside_all_profiles", "a batch of 1 image(s) of 96×96, outside the profiles of the engine"),
    ],
)
def test_failures_name_the_cause(error, flow, found):
    assert found in error(flow)[0]


def test_the_command_line_builds_with_ahead_of_time_plugins(value):
    built = value("command_that_builds")
    assert built["aot"] and built["stamp"]["plugins"] == "aot"
    assert {"model.fp16.engine", "model.fp16.engine.json", "model.fp16.tensorrt.onnx"} <= set(built["files"])
    assert "profiles: batch 1 of 96×128; batch 2 of 96×128" in built["printed"]
    assert ": 0 errors, 0 warnings" in built["printed"] and "fp16 on NVIDIA Test 1" in built["printed"]
    command = "maskrcnn build-engine model.onnx --fp16 --target tensorrt --batch 1,2 --size 96x128 --workspace 2.0"
    assert built["stamp"]["command"] == command
    assert built["stamp"]["options"] == "workspace_gb=2.0"


def test_tf32_is_a_precision_and_a_flag(value):
    built = value("command_in_tf32")
    assert built["precision"] == "tf32" and built["flag"] is True
    assert "exact.engine" in built["files"]
    command = "maskrcnn build-engine model.onnx --tf32 --target tensorrt --output exact.engine --size 96x128"
    assert built["command"] == command


def test_the_command_line_puts_weights_back(value):
    built = value("commands_that_refit")
    assert "whole.engine" in built["files"] and built["stamp"]["refit"] == "fixed"
    assert json.loads(built["stamp"]["profiles"])[0]["batch"] == [1, 1, 1]
