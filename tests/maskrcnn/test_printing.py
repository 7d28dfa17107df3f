"""What a terminal, a pipe and a file get: names as they are, whatever the encoding; errors without a traceback."""

import io
import shutil
import subprocess
import sys

import pytest
from command_line import expect_error

from maskrcnn.cli import main
from maskrcnn.cli.console import ConsoleProgress, console, show
from maskrcnn.errors import UserError, report_errors, require_memory

NAMES = ("x[/red]y.png", "a[bold]b.png", ":smile:.png", "[link=http://x]z", "back\\", "caf\udce9.png", "→×.png")


@pytest.fixture
def stdout(monkeypatch):
    """Standard output in an encoding; returns its bytes."""

    def use(encoding):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(console, "_file", None)
        return stream

    return use


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "latin-1"])
@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_are(stdout, encoding, name):
    stream = stdout(encoding)
    with report_errors():
        show(f"{name} → done")
        progress = ConsoleProgress()
        with progress.task(name, 2) as advance:
            advance(1)
            progress.message(name)
    printed = stream.buffer.getvalue().decode(encoding)
    if encoding == "utf-8":
        shown = name.replace("\udce9", "\\udce9")
        assert printed == f"{shown} → done\n{shown}\n"
    elif encoding == "ascii":
        shown = name.replace("\udce9", "\\udce9").replace("→", "->").replace("×", "x")
        assert printed == f"{shown} -> done\n{shown}\n"
    else:
        assert " -> done\n" in printed


def fail_with(error):
    def command(*arguments, **options):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("found [/b]", "this", "do that"), 1, "Error: found [/b]\n  expected: this\n  fix:      do that"),
        (MemoryError("Unable to allocate 80.0 GiB"), 1, "Error: out of memory (Unable to allocate 80.0 GiB)"),
        (RuntimeError("CUDA out of memory."), 1, "Error: out of memory (CUDA out of memory.)"),
        (OSError(28, "No space left on device", "out.json"), 1, "Error: out.json: No space left on device"),
        (ZeroDivisionError("division by zero"), 1, "Error: internal error, ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_every_error_ends_without_a_traceback(run, monkeypatch, tmp_path, error, code, words):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("maskrcnn.api.inspect.lint_file", fail_with(error))
    found, _, err = run("lint", "m.onnx")
    assert found == code and err.startswith(words) and "Traceback" not in err
    if isinstance(error, ZeroDivisionError):
        (saved,) = tmp_path.glob("maskrcnn-*.txt")
        assert str(saved) in err and "ZeroDivisionError" in saved.read_text() and "lint m.onnx" in saved.read_text()
    if code == 1 and not isinstance(error, BrokenPipeError):
        assert "\n  expected: " in err and "\n  fix:      " in err
        assert "Traceback" in run("--verbose", "lint", "m.onnx")[2]


@pytest.mark.parametrize(("stream", "code"), [("stdout=/dev/full", 1), ("stdout=closed", 0), ("stdout=pipe", (0, 1))])
def test_an_output_that_takes_nothing(stream, code):
    target = {"stdout=/dev/full": ">/dev/full", "stdout=closed": ">&-", "stdout=pipe": "| true"}[stream]
    command = f"{sys.executable} -m maskrcnn --version {target}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode in (code if isinstance(code, tuple) else (code,)), done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert ("No space left" in done.stderr) == (stream == "stdout=/dev/full")


def test_more_memory_than_there_is_is_refused(run, tmp_path, checkpoint):
    with pytest.raises(UserError, match=r"x, which takes at least 1000000000\.0 GB"):
        require_memory(1e18, "x", "less")
    require_memory(1e6, "x", "less")
    expect_error(run("data", "shapes", "out", "--size", 1_000_000), "11000.0 GB of memory", "GB that are available")
    assert list(tmp_path.iterdir()) == []
    expect_error(run("verify", checkpoint, checkpoint, "--size", 1_000_000), "GB of memory", "GB that are available")


def test_usage_errors_show_brackets(run):
    code, _, err = run("lint", "m.onnx", "--[/red]")
    assert code == 2 and "[/red]" in err


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "?", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "LOCAL_RANK=?"),
    ],
)
def test_an_environment_that_torchrun_did_not_set(run, shapes, monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    expect_error(run("train", "--data", shapes), words, "torchrun")
    if "?" not in words:  # the evaluation reads RANK, WORLD_SIZE and LOCAL_RANK only
        expect_error(run("evaluate", "m.onnx", "--data", shapes), words, "torchrun")


# Files that are not what they are given as

CONTENTS = {
    "random": bytes(range(256)) * 8,
    "empty": b"",
    "metadata of another kind": b'{"contract": 1, "preprocessing": 5, "stamp": 3}',
}
COMMANDS = [
    "predict image.png --model {}",
    "evaluate {} --data data",
    "verify {0} {0} --max-images 1",
    "inspect {}",
    "lint {}",
    "triton {} repository",
    "web {} page",
    "export {} --onnx --output out.onnx",
    "export --onnx --weights {} --output out.onnx",
    "build-engine {} --fp16 --target openvino",
    "refit-engine {0} {0} --output out.engine",
    "train --data data --weights {}",
    "train --data data --config {}",
    "evaluate --results {0} --annotations {0}",
    "data check {}",
    "data convert via {} out",
    "data convert coco data out --sets val --alias {}",
]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("suffix", ["onnx", "xml", "engine", "safetensors", "pth"])
def test_a_file_of_any_content_is_an_error_without_a_traceback(run, tmp_path, shapes, content, suffix):
    """Every command that reads a file, in this process; a folder, a loop of links and a missing file as well."""
    shutil.copytree(shapes, tmp_path / "data")
    shutil.copy(shapes / "val" / "000000.png", tmp_path / "image.png")
    names = [f"file.{suffix}"]
    (tmp_path / names[0]).write_bytes(CONTENTS[content])
    (tmp_path / f"{names[0]}.json").write_bytes(CONTENTS[content])
    (tmp_path / "file.bin").write_bytes(b"")
    if content == "empty":  # once for each suffix
        (tmp_path / f"folder.{suffix}").mkdir()
        (tmp_path / f"loop.{suffix}").symlink_to(f"loop.{suffix}")
        names += [f"folder.{suffix}", f"loop.{suffix}", f"missing.{suffix}"]
    for name in names:
        for command in COMMANDS:
            if "--alias" in command and name == names[0]:
                continue  # any text is a list of names
            code, out, err = run(*command.format(name).split())
            assert code == 1 and "internal error" not in err, (command, name, err)
            if not (command.startswith("data check") and out):  # a report with an error
                assert err.startswith("Error: ") and "\n  fix:      " in err, (command, name, err)


def test_the_home_folder_is_found_where_the_shell_did_not(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["maskrcnn", "inspect", "--json=~/new/x.json", "~/no.onnx"])
    with pytest.raises(SystemExit):
        main()
    assert f"no file {tmp_path}/no.onnx" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["maskrcnn", "inspect", "--json=~/file/x.json", "~/no.onnx"])
    with pytest.raises(SystemExit):
        main()
    assert f"{tmp_path}/file is no folder" in capsys.readouterr().err
