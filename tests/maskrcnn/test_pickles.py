"""Pickles of arrays are read; pickles of anything else are refused before they do a thing."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from maskrcnn.errors import UserError
from maskrcnn.weights.pickles import read_pickle


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_come_back(tmp_path, protocol):
    values = OrderedDict(
        model={"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 4)), "b": np.int64(7)},
        fortran=np.asfortranarray(np.eye(3)),
        __author__="Ä",
        flags=[True, None, 1.5, b"\xff", (1, "two")],
    )
    if protocol in (0, 1):  # their bytes are read as texts, as `encoding="latin1"` means it
        values["flags"][3] = None
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(values, protocol=protocol))
    found = read_pickle(tmp_path / "w.pkl")
    np.testing.assert_array_equal(found["model"]["a.weight"], values["model"]["a.weight"])
    np.testing.assert_array_equal(found["fortran"], np.eye(3))
    assert found["model"]["a.weight"].dtype == np.float32 and found["model"]["empty"].shape == (0, 4)
    assert found["model"]["b"] == 7 and found["__author__"] == "Ä" and found["flags"] == values["flags"]


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_names_of_both_numpys_are_known(tmp_path, module):
    written = pickle.dumps(np.arange(3.0), protocol=2)
    for name in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        written = written.replace(b"c" + name, b"c" + module.encode())
    assert module.encode() in written
    (tmp_path / "w.pkl").write_bytes(written)
    np.testing.assert_array_equal(read_pickle(tmp_path / "w.pkl"), [0, 1, 2])


def test_an_array_of_python_2_is_read(tmp_path):
    # Protocol 2 of Python 2: the array's bytes are a text of one byte per character, here 1.0 and -2.0.
    written = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89U\x08\x00\x00\x80\x3f\x00\x00\x00\xc0tb."
    )
    (tmp_path / "w.pkl").write_bytes(written)
    found = read_pickle(tmp_path / "w.pkl")
    assert found.dtype == np.float32 and found.tolist() == [1.0, -2.0]


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
def test_nothing_else_is_looked_up_or_run(tmp_path, protocol, call, name):
    trace = tmp_path / "trace"
    arguments = (
        f"echo > {trace}" if call is os.system else f"open({str(trace)!r}, 'w')",
        *(("x",) if call is getattr else ()),
    )
    (tmp_path / "w.pkl").write_bytes(
        pickle.dumps({"model": {"a": np.zeros(2), "b": Payload(call, *arguments)}}, protocol=protocol)
    )
    with pytest.raises(UserError, match=rf"w\.pkl: a pickle that calls {name}\nexpected: NumPy arrays"):
        read_pickle(tmp_path / "w.pkl")
    assert not trace.exists()


def test_a_codec_other_than_that_of_bytes_is_refused(tmp_path):
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02c_codecs\nencode\nX\x02\x00\x00\x00hiX\x05\x00\x00\x00rot13\x86R.")
    with pytest.raises(UserError, match="bytes in the encoding 'rot13'"):
        read_pickle(tmp_path / "w.pkl")


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
def test_what_is_no_pickle_is_said_so(tmp_path, name):
    (tmp_path / "w.pkl").write_bytes(broken_files()[name])
    with pytest.raises(UserError, match=r"w\.pkl: not a whole pickle of NumPy arrays"):
        read_pickle(tmp_path / "w.pkl")


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(UserError, match=r"no file .*w\.pkl"):
        read_pickle(tmp_path / "w.pkl")
