"""Files of Detectron2's model zoo: pickled arrays are read, and no other name in a pickle is looked up or called."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from maskrcnn.errors import UserError
from maskrcnn.weights.detectron2 import read_model_zoo


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_are_read_beside_other_plain_values(tmp_path, protocol):
    arrays = {
        "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.zeros((0, 4)),
        "scalar": np.int64(7),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    others = {"__author__": "Ä", "flags": [True, None, 1.5, b"\xff", (1, "two")]}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(OrderedDict(model=arrays, **others), protocol=protocol))
    found = read_model_zoo(tmp_path / "w.pkl")
    assert list(found) == list(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name].numpy(), value, strict=True)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_module_names_of_numpy_1_and_2_are_known(tmp_path, module):
    written = pickle.dumps({"model": {"a": np.arange(3.0)}}, protocol=2)
    for name in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        written = written.replace(b"c" + name, b"c" + module.encode())
    assert module.encode() in written
    (tmp_path / "w.pkl").write_bytes(written)
    assert read_model_zoo(tmp_path / "w.pkl")["a"].tolist() == [0, 1, 2]


def test_an_array_pickled_by_python_2_is_read(tmp_path):
    # Protocol 2 of Python 2: the bytes of the array are a string of one byte per character, here 1.0 and -2.0.
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89U\x08\x00\x00\x80\x3f\x00\x00\x00\xc0tb"
    )
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02}U\x05model}U\x01a" + array + b"ss.")
    assert read_model_zoo(tmp_path / "w.pkl")["a"].tolist() == [1.0, -2.0]


class Payload:
    """Makes a pickle that runs a command."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("call", "name"),
    [(os.system, r"(posix|nt)\.system"), (eval, r"(builtins|__builtin__)\.eval"), (getattr, r"\w+\.getattr")],
)
def test_other_callables_are_neither_looked_up_nor_called(tmp_path, protocol, call, name):
    trace = tmp_path / "trace"
    arguments = (
        f"echo > {trace}" if call is os.system else f"open({str(trace)!r}, 'w')",
        *(("x",) if call is getattr else ()),
    )
    (tmp_path / "w.pkl").write_bytes(
        pickle.dumps({"model": {"a": np.zeros(2), "b": Payload(call, *arguments)}}, protocol=protocol)
    )
    with pytest.raises(UserError, match=rf"w\.pkl: a pickle that calls {name}\n  expected: NumPy arrays"):
        read_model_zoo(tmp_path / "w.pkl")
    assert not trace.exists()


def test_other_codecs_are_refused(tmp_path):
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02c_codecs\nencode\nX\x02\x00\x00\x00hiX\x05\x00\x00\x00rot13\x86R.")
    with pytest.raises(UserError, match="bytes in the encoding 'rot13'"):
        read_model_zoo(tmp_path / "w.pkl")


def broken_files() -> dict[str, bytes]:
    whole = pickle.dumps({"model": {"a": np.arange(100.0)}}, protocol=2)
    return {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "no end": whole[:-1],
        "text": b"<!DOCTYPE html><html>not found</html>",
        "zip": b"PK\x03\x04" + bytes(60),
        "random": np.random.default_rng(0).bytes(500),
    }


@pytest.mark.parametrize("name", broken_files())
def test_corrupt_files_are_refused(tmp_path, name):
    (tmp_path / "w.pkl").write_bytes(broken_files()[name])
    with pytest.raises(UserError, match=r"w\.pkl: not a complete pickle of NumPy arrays"):
        read_model_zoo(tmp_path / "w.pkl")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*w\.pkl"):
        read_model_zoo(tmp_path / "w.pkl")
