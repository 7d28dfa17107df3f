"""Every name of TensorRT's that our sources use exists in its bindings, in each version that is there."""

import pytest
import tensorrt_names


@pytest.fixture(scope="session")
def used():
    return tensorrt_names.names_used()


def test_tensorrt_has_every_name(each_tensorrt, used):
    said = each_tensorrt.ask(tensorrt_names.lookup(sorted(used)))
    missing = {name: sorted(used[name]) for name in said["missing"]}
    assert not missing, f"not in TensorRT {said['version']}"
    print(f"TensorRT {said['version']}: {len(used)} names")


def test_a_name_that_tensorrt_does_not_have_is_missed(each_tensorrt):
    names = ["tensorrt.Builder.create_network", "tensorrt.BuilderFlag.NONSENSE", "tensorrt.plugin.nonsense"]
    said = each_tensorrt.ask(tensorrt_names.lookup(names))
    assert said["missing"] == names[1:]


def test_the_sources_are_read_where_they_use_tensorrt(used):
    """Each class of the table is used in its file: a renamed variable would go unnoticed otherwise."""
    assert len(used) > 90
    for file, objects in tensorrt_names.OBJECTS.items():
        for kind in objects.values():
            assert any(name.startswith(f"tensorrt.{kind}.") and file in files for name, files in used.items()), kind
    importing = {"runtime/backends/tensorrt_library.py", "plugins/aot.py"}
    assert importing <= {file for files in used.values() for file in files}
