"""Builds of TensorRT plans with doubles of its classes: the settings that reach them, and the error of each failure."""

from types import SimpleNamespace

import pytest

from maskrcnn.runtime.build.messages import parsing_failure


@pytest.fixture(scope="session")
def results(each_tensorrt, flow_paths, tmp_path_factory):
    """The result of each flow of tests/support/tensorrt_flows.py."""
    return each_tensorrt.flows("tensorrt_flows", {**flow_paths, "folder": str(tmp_path_factory.mktemp("flows"))})


def test_default_settings_are_those_of_tensorrt_except_tf32(value):
    built = value("plain_build")
    assert built["plan"] == "a plan" and built["graph"] is True
    assert built["typed"] is True
    off = ("TF32", "VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN", "REFIT_IDENTICAL")
    assert built["flags"] == dict.fromkeys(off, False)
    assert built["pools"] == [] and built["hardware_compatibility_level"] == "NONE"
    assert "builder_optimization_level" not in built and "max_aux_streams" not in built
    assert built["timing"] == "new"


def test_profiles_have_the_shapes_of_both_inputs(value):
    assert value("plain_build")["profiles"] == [
        [
            ["images", [1, 3, 32, 32], [1, 3, 96, 128], [1, 3, 160, 160]],
            ["image_sizes", [1, 2], [1, 2], [1, 2]],
        ],
        [
            ["images", [2, 3, 32, 32], [4, 3, 96, 128], [8, 3, 160, 160]],
            ["image_sizes", [2, 2], [4, 2], [8, 2]],
        ],
    ]


def test_progress_and_warnings_are_passed_on(value):
    built = value("plain_build")
    assert built["phases"] == [
        ["started", "Building", 2],
        ["started", "  Tactics", 5],
        ["advanced", "  Tactics", 1],
        ["finished", "  Tactics"],
        ["finished", "Building"],
    ]
    assert built["warnings"] == ["a warning"]


def test_every_option_reaches_the_builder(value):
    built = value("every_option")
    on = {name for name, is_set in built["flags"].items() if is_set}
    assert on == {"TF32", "VERSION_COMPATIBLE", "REFIT"}
    assert built["pools"] == [["WORKSPACE", 1_610_612_736]]
    assert built["builder_optimization_level"] == 5 and built["max_aux_streams"] == 0
    assert built["hardware_compatibility_level"] == "SAME_COMPUTE_CAPABILITY"
    assert built["plugins_to_serialize"] == [built["library"]]
    assert "workspace_gb=1.5" in built["text"] and "hardware=same_compute_capability" in built["text"]


def test_a_plan_without_weights(value):
    built = value("stripped_build")
    assert {name for name, is_set in built["flags"].items() if is_set} == {"STRIP_PLAN", "REFIT_IDENTICAL"}
    assert built["hardware_compatibility_level"] == "AMPERE_PLUS"


def test_parser_errors_name_the_node_its_stage_and_a_fix(error):
    found, _, fix = error("parser_refuses_a_node")
    assert found.startswith("5 error(s) of TensorRT's ONNX parser:\n  node 214, ")
    assert "(Resize) in the backbone and FPN: UNSUPPORTED_NODE_ATTR: no such mode\n" in found
    assert found.endswith("and 2 more") and "another version of TensorRT" in fix


@pytest.mark.parametrize(
    ("flow", "found", "fix"),
    [
        ("failing_plugin", "failed during the build: OSError: the disk is full", "--plugin-library"),
        ("failing_compiler", "NVRTC fails", "update it"),
        ("no_builder", "TensorRT has no builder here", "report this"),
        ("parser_has_no_plugin", "nms (BatchedNms): UNSUPPORTED_NODE", "BatchedNms is an op of maskrcnn"),
        ("parser_is_out_of_memory", "MEM_ALLOC_FAILED: bad_alloc", "free memory"),
        ("parser_says_nothing", "rejects the graph:\n  weights lie elsewhere", "report this"),
        ("other_outputs", "a network with the outputs num_detections INT32, boxes FLOAT", "export the model again"),
        ("no_kernel_image", "kernels that were not compiled for this GPU", "maskrcnn build-plugins"),
        ("out_of_memory", "too little free memory on the GPU", "smaller --batch and --size"),
        ("no_workspace", "a workspace limit", "raise --workspace"),
        ("no_implementation", "no implementation under these settings", "drop --version-compatible"),
        ("unknown_gpu", "a GPU that this version of TensorRT does not support", "install a version that supports it"),
        ("old_driver", "an NVIDIA driver that is missing or older", "update the driver"),
        ("says_nothing", "TensorRT built no engine: TensorRT logged no reason", "report this"),
        ("interrupted", "stopped by Ctrl-C", "run it again"),
        ("profile_is_refused", "rejects the profile batch 1 of 32–160×32–160", "choose another --batch"),
        ("shape_is_refused", "(Shape provided for min is inconsistent)", "choose another --batch"),
        ("library_is_missing", "no plugin library", "maskrcnn build-plugins --form library"),
        ("library_is_none", "cannot load it", "--form library --force"),
    ],
)
def test_failures_have_a_cause_and_a_fix(error, flow, found, fix):
    parts = error(flow)
    assert found in parts[0] and fix in parts[2]


def test_the_parser_error_codes_of_tensorrt_10_9_are_read():
    """Their `name` is a method that cannot be called."""

    class Code:
        def __str__(self):
            return "ErrorCode.MEM_ALLOC_FAILED"

        def name(self):
            raise TypeError("not callable")

    values = {"code": Code(), "desc": "bad_alloc", "node": 0, "node_name": "conv", "node_operator": "Conv"}
    error = SimpleNamespace(**{name: lambda value=value: value for name, value in values.items()})
    failure = parsing_failure(SimpleNamespace(num_errors=1, get_error=lambda index: error), (), lambda node: "")
    assert "conv (Conv): MEM_ALLOC_FAILED: bad_alloc" in failure.found and failure.fix.startswith("free memory")


def test_a_repeated_message_is_shown_once(error):
    assert error("says_something_new")[0] == "TensorRT built no engine:\n  Error Code 99: the moon is full"


def test_each_build_reports_its_own_messages_though_tensorrt_keeps_one_logger(value):
    found = value("builds_and_loads_one_after_the_other")
    assert found["warnings"] == [["first"], ["second"]]
    assert "Version tag does not match" in found["found"]


def test_an_exception_in_the_progress_bar_stops_the_build_and_is_raised(value):
    assert value("progress_breaks") == "the terminal is gone"


def test_the_timing_cache_keeps_entries_of_concurrent_builds(value):
    assert value("timing_cache_of_two") == "meanwhile;new;old"


def test_a_timing_cache_that_does_not_fit_is_replaced(value):
    (broken_sets, broken), (other_sets, _) = value("timing_caches_that_do_not_fit")
    assert broken_sets == other_sets == 1 and broken == "new"


def test_plugins_are_registered_once_and_the_library_is_not_loaded_beside_them(value):
    found = value("plugins_in_the_registry")
    assert found["before"] == []
    assert found["after"] == ["BatchedNmsCompact", "BatchedNmsKeep", "MultilevelRoiAlign"]
    assert found["returned"] == [None, None]
    assert found["found"] == "the ahead-of-time plugins are registered in this process"
