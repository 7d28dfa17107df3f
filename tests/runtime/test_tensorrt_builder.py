"""Building plans over doubles of TensorRT's own classes: what is asked of them, and every way in which they refuse."""

from types import SimpleNamespace

import pytest

from maskrcnn.runtime.build.messages import parsing_failure


@pytest.fixture(scope="session")
def said(each_tensorrt, flow_paths, tmp_path_factory):
    """What each flow of tests/support/tensorrt_flows.py said."""
    return each_tensorrt.flows("tensorrt_flows", {**flow_paths, "folder": str(tmp_path_factory.mktemp("flows"))})


@pytest.fixture
def value(said):
    def of(name):
        assert "value" in said[name], said[name].get("crash") or said[name]
        return said[name]["value"]

    return of


@pytest.fixture
def error(said):
    def of(name):
        assert "error" in said[name], said[name].get("crash") or said[name]
        return said[name]["error"]

    return of


def test_a_plain_build_asks_for_nothing_that_is_not_tensorrts_default_but_exact_products(value):
    built = value("plain_build")
    assert built["plan"] == "a plan" and built["graph"] is True
    assert built["typed"] is True  # which 11 always is, and 10 on demand
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
        ["started", "Building", None, 2],
        ["started", "Tactics", "Building", 5],
        ["completed", "Tactics", 0],
        ["finished", "Tactics"],
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


def test_errors_of_the_parser_name_node_stage_and_remedy(error):
    came, _, do = error("parser_refuses_a_node")
    assert came.startswith("5 error(s) of TensorRT's ONNX parser:\n  node 214, ")
    assert "(Resize) in the backbone and FPN: UNSUPPORTED_NODE_ATTR: no such mode\n" in came
    assert came.endswith("and 2 more") and "another version of TensorRT" in do


@pytest.mark.parametrize(
    ("flow", "came", "do"),
    [
        ("no_builder", "TensorRT has no builder here", "run the ONNX file"),
        ("parser_has_no_plugin", "nms (BatchedNms): UNSUPPORTED_NODE", "BatchedNms is an op of maskrcnn"),
        ("parser_is_out_of_memory", "MEM_ALLOC_FAILED: bad_alloc", "free memory"),
        ("parser_says_nothing", "refuses the graph:\n  weights lie elsewhere", "report this"),
        ("other_outputs", "a network with the outputs num_detections INT32, boxes FLOAT", "export the model again"),
        ("no_kernel_image", "kernels that were not compiled for this GPU", "maskrcnn build-plugins"),
        ("out_of_memory", "too little free memory on the GPU", "smaller --batch and --size"),
        ("no_workspace", "a workspace limit", "raise --workspace"),
        ("no_implementation", "no implementation under these settings", "leave out --version-compatible"),
        ("unknown_gpu", "a GPU that this version of TensorRT does not know", "install a version for it"),
        ("old_driver", "an NVIDIA driver that is missing or older", "update the driver"),
        ("says_nothing", "TensorRT built no engine: TensorRT told no reason", "report this"),
        ("interrupted", "stopped by Ctrl-C", "run it again"),
        ("profile_is_refused", "does not take the profile batch 1 of 32–160×32–160", "choose other --batch"),
        ("shape_is_refused", "(Shape provided for min is inconsistent)", "choose others"),
        ("library_is_missing", "no plugin library", "maskrcnn build-plugins --form library"),
        ("library_is_none", "does not load it", "--form library --force"),
    ],
)
def test_what_goes_wrong_is_said_with_what_to_do(error, flow, came, do):
    parts = error(flow)
    assert came in parts[0] and do in parts[2]


def test_a_code_whose_name_is_a_method_is_read_from_its_text():
    """As those of TensorRT 10.9 are."""

    class Code:
        def __str__(self):
            return "ErrorCode.MEM_ALLOC_FAILED"

        def name(self):
            raise TypeError("not callable")

    values = {"code": Code(), "desc": "bad_alloc", "node": 0, "node_name": "conv", "node_operator": "Conv"}
    error = SimpleNamespace(**{name: lambda value=value: value for name, value in values.items()})
    told = parsing_failure(SimpleNamespace(num_errors=1, get_error=lambda index: error), ())
    assert "conv (Conv): MEM_ALLOC_FAILED: bad_alloc" in told.found and told.fix.startswith("free memory")


def test_a_message_is_shown_once(error):
    assert error("says_something_new")[0] == "TensorRT built no engine:\n  Error Code 99: the moon is full"


def test_one_logger_hears_everything_and_each_build_tells_its_own(value):
    found = value("builds_and_loads_one_after_the_other")
    assert found["warnings"] == [["first"], ["second"]]
    assert "Version tag does not match" in found["came"]


def test_an_exception_in_the_progress_bar_stops_the_build_and_is_raised(value):
    assert value("progress_breaks") == "the terminal is gone"


def test_the_timing_cache_keeps_what_another_build_wrote_meanwhile(value):
    assert value("timing_cache_of_two") == "meanwhile;new;old"


def test_a_timing_cache_that_does_not_fit_gives_way_to_a_new_one(value):
    (broken_sets, broken), (other_sets, _) = value("timing_caches_that_do_not_fit")
    assert broken_sets == other_sets == 1 and broken == "new"


def test_plugins_are_registered_once_and_the_library_is_not_loaded_beside_them(value):
    found = value("plugins_in_the_registry")
    assert found["before"] == []
    assert found["after"] == ["BatchedNmsCompact", "BatchedNmsKeep", "MultilevelRoiAlign"]
    assert found["returned"] == [None, None]
    assert found["came"] == "the ahead-of-time plugins are registered in this process"
