"""Files of weights: tensors are found in whatever wraps them, and nothing in a pickle is looked up or called."""

import argparse
import datetime
import functools
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from maskrcnn.errors import UserError
from maskrcnn.weights.files import read_weights


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
    found = read_weights(tmp_path / "w.pkl").tensors
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
    assert read_weights(tmp_path / "w.pkl").tensors["a"].tolist() == [0, 1, 2]


def test_an_array_pickled_by_python_2_is_read(tmp_path):
    # Protocol 2 of Python 2: the bytes of the array are a string of one byte per character, here 1.0 and -2.0.
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89U\x08\x00\x00\x80\x3f\x00\x00\x00\xc0tb"
    )
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02}U\x05model}U\x01a" + array + b"ss.")
    assert read_weights(tmp_path / "w.pkl").tensors["a"].tolist() == [1.0, -2.0]


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
    with pytest.raises(
        UserError, match=rf"w\.pkl: 'model' 'b' is a pickled {name}, which was not run\n  expected: tensors"
    ):
        read_weights(tmp_path / "w.pkl")
    assert not trace.exists()


def test_other_codecs_are_refused(tmp_path):
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02c_codecs\nencode\nX\x02\x00\x00\x00hiX\x05\x00\x00\x00rot13\x86R.")
    with pytest.raises(UserError, match="bytes in the encoding 'rot13'"):
        read_weights(tmp_path / "w.pkl")


def whole_file(zipped: bool = True) -> bytes:
    """A state dict as torch.save writes it, or as it did before PyTorch 1.6."""
    path = Path("whole.pth")
    torch.save({"a": torch.arange(100.0)}, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


def safetensors_bytes() -> bytes:
    return save({"a": torch.arange(100.0)})


def script() -> bytes:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), "script.pt")
    return Path("script.pt").read_bytes()


def saved(content: object) -> bytes:
    torch.save(content, "saved.pth")
    return Path("saved.pth").read_bytes()


def exported() -> bytes:
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), "exported.pt2")
    return Path("exported.pt2").read_bytes()


PICKLE = pickle.dumps({"model": {"a": np.arange(100.0)}}, protocol=2)
OTHER_FILES = {
    "empty": (lambda: b"", "an empty file"),
    "half a pickle": (lambda: PICKLE[: len(PICKLE) // 2], "a damaged or incomplete file of"),
    "a pickle without an end": (lambda: PICKLE[:-1], "a damaged or incomplete file of"),
    "half a file": (lambda: whole_file()[:700], "a damaged or incomplete file of 700 bytes"),
    "half an old file": (lambda: whole_file(False)[:-300], "a damaged or incomplete file of"),
    "web page": (lambda: b"\n<!DOCTYPE html><html>sign in</html>", "a web page"),
    "lfs": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
        r"a pointer of Git LFS.*\n.*\n.*pull",
    ),
    "text": (lambda: b"the weights are on the other disk", r"a text file \(the weights are on"),
    "zip": (lambda: b"PK\x03\x04" + bytes(60), "a damaged or incomplete file of 64 bytes"),
    "keras": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(60), "an HDF5 file"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(60), "a gzip archive"),
    "random": (lambda: b"\x01\x02\x03" + bytes(range(256)), "an unknown kind of file"),
    "script": (script, "a TorchScript program"),
    "exported": (exported, "a torch.export program"),
    "sparse": (lambda: saved({"a": torch.eye(2).to_sparse()}), "'a' is a sparse tensor"),
    "float8": (lambda: saved({"a": torch.ones(2).to(torch.float8_e4m3fn)}), r"tensors in a type of later .*float8"),
    "meta": (lambda: saved({"a": torch.ones(2, device="meta")}), "'a' is a tensor without values"),
    "quantised": (
        lambda: saved({"a": torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)}),
        "'a' is a quantised tensor",
    ),
    "two models": (
        lambda: saved({key: {"a": torch.ones(2)} for key in ("student", "teacher")}),
        r"several entries that hold weights \(student, teacher\)",
    ),
    "half of safetensors": (lambda: safetensors_bytes()[:-8], "a damaged or incomplete file of"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_and_damaged_files_are_named_for_what_they_are(tmp_path, monkeypatch, name, suffix):
    monkeypatch.chdir(tmp_path)
    made, words = OTHER_FILES[name]
    (tmp_path / f"w{suffix}").write_bytes(made())
    with pytest.raises(UserError, match=rf"w{suffix}: {words}"):
        read_weights(tmp_path / f"w{suffix}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-00001-of-00002.safetensors", "part 1 of 2"),
        ("model.safetensors.index.json", "the index of a file in parts"),
    ],
)
def test_parts_of_weights_are_refused(tmp_path, name, words):
    (tmp_path / name).write_bytes(safetensors_bytes() if name.endswith("safetensors") else b"{}")
    with pytest.raises(UserError, match=f"{words}(.|\n)*into one file"):
        read_weights(tmp_path / name)


def test_a_folder_names_the_files_in_it(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model_final.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"run: a folder\n.*\n.*model_final\.pth"):
        read_weights(tmp_path / "run")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.ckpt", "weights"])
def test_the_suffix_does_not_matter(tmp_path, name):
    save_file({"rpn.a": torch.arange(3.0)}, tmp_path / name)
    assert read_weights(tmp_path / name).tensors["rpn.a"].tolist() == [0, 1, 2]
    torch.save({"rpn.a": torch.arange(3.0)}, tmp_path / name)
    assert read_weights(tmp_path / name).tensors["rpn.a"].tolist() == [0, 1, 2]


# State dicts in checkpoints

WEIGHTS = {"backbone.body.conv1.weight": torch.arange(6.0).reshape(2, 3), "rpn.head.bbox_pred.bias": torch.ones(2)}


class Odd:
    """A class of the program that trained."""

    def __init__(self):
        self.field = torch.zeros(3)


def surroundings() -> dict:
    """What training scripts save beside the weights."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"milestones": functools.partial(max, 3), "last_epoch": np.float64(3)},
        "args": argparse.Namespace(data_path=Path("/data"), lr=0.02),
        "epoch": 25,
        "best": torch.tensor(0.5),
        "odd": Odd(),
        "when": datetime.datetime(2024, 1, 1),
        "seen": {1, 2},
    }


def prefixed(prefix: str) -> dict:
    return {prefix + name: value for name, value in WEIGHTS.items()}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda: WEIGHTS, ""),
        (
            lambda: {"model": WEIGHTS, **surroundings()},
            "took the entry 'model'; left out optimizer, lr_scheduler, args",
        ),
        (lambda: {"model": WEIGHTS, "model_ema": prefixed("module.")}, "took the entry 'model'; left out model_ema"),
        (lambda: {"ema": {"module": WEIGHTS, "updates": 3}}, "took the entry 'module'; left out updates"),
        (lambda: {"optimizer": surroundings()["optimizer"], "my_detector": WEIGHTS}, "took the entry 'my_detector'"),
        (lambda: {"model_state_dict": prefixed("module.model.")}, "stripped the prefix model."),
        (lambda: prefixed("_orig_mod.module."), "stripped module., _orig_mod. from 2 names"),
        (lambda: {"n_averaged": torch.tensor(7), **prefixed("module.")}, "stripped module. from 2 names"),
        (
            lambda: {"state_dict": {**prefixed("model."), "loss.weight": torch.ones(1)}, "hyper_parameters": Odd()},
            "stripped the prefix model.; left out 1 tensors of loss",
        ),
        (lambda: OrderedDict(WEIGHTS, _extra_state=Odd()), "left out entries that are not tensors: _extra_state"),
        (lambda: {name: torch.nn.Parameter(value) for name, value in WEIGHTS.items()}, ""),
        (lambda: {name: value.numpy() for name, value in WEIGHTS.items()}, ""),
        (lambda: {name.replace("body.", "_orig_mod.body."): value for name, value in WEIGHTS.items()}, "_orig_mod."),
    ],
)
def test_weights_are_found_in_what_wraps_them(tmp_path, content, told, zipped):
    torch.save(content(), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    file = read_weights(tmp_path / "w.pth")
    assert {name: file.tensors[name].tolist() for name in WEIGHTS} == {n: v.tolist() for n, v in WEIGHTS.items()}
    assert set(file.tensors) <= {*WEIGHTS, "n_averaged"}
    assert told in "\n".join(file.notes) and bool(told) == bool(file.notes)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: torch.nn.Linear(2, 2), r"a whole pickled object, torch\.nn\.modules\.linear\.Linear, not its weights"),
        (lambda: {"model": torch.nn.Linear(2, 2), "epoch": 3}, r"'model' is a whole pickled object, torch\.nn"),
        (lambda: [1, 2, 3], r"a list that holds no weights"),
        (lambda: {"epoch": 3, "args": {"lr": 0.1}}, r"a dict with epoch, args that holds no weights"),
        (lambda: {"model": {"a": torch.ones(1), "b": Odd()}}, r"'model' 'b' is a pickled .*Odd, which was not run"),
        (lambda: {"model": {}}, "a dict with model that holds no weights"),
    ],
)
def test_what_is_no_state_dict_is_refused_with_how_to_save_one(tmp_path, content, words, zipped):
    torch.save(content(), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"w\.pth: {words}") as caught:
        read_weights(tmp_path / "w.pth")
    assert "torch.save(model.state_dict(), FILE)" in caught.value.fix


def test_code_in_a_file_of_torch_save_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    content = {"model": WEIGHTS, "optimizer": Payload(os.system, f"echo > {trace}")}
    for zipped in (True, False):
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        assert set(read_weights(tmp_path / "w.pth").tensors) == set(WEIGHTS)
    assert not trace.exists()


def test_tensors_of_any_device_type_and_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")  # as on a machine with GPUs
    base = torch.arange(24.0).reshape(4, 6)
    given = {
        "rpn.half": base.half(),
        "rpn.bfloat16": base.bfloat16(),
        "rpn.double": base.double(),
        "rpn.turned": base.T,
        "rpn.part": base[1:3, ::2],
        "rpn.tied": base,
        "rpn.expanded": torch.ones(1).expand(3, 4),
    }
    torch.save(given, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth").tensors
    for name, value in given.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*w\.pkl"):
        read_weights(tmp_path / "w.pkl")
