"""`predict --ray` on a cluster of this machine."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from command_line import expect_error

import maskrcnn
from maskrcnn.runtime.predictions import read_parquet

pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")


def kill_an_actor(killed: list[int], stop: threading.Event) -> None:
    """Ends the first process that detects, as the system does where memory is short."""
    while not killed and not stop.wait(0.05):
        for process in psutil.Process().children(recursive=True):
            try:
                if "_DetectionActor" in " ".join(process.cmdline()) and process.cpu_times().user > 1:
                    process.kill()
                    killed.append(process.pid)
                    return
            except psutil.Error:
                continue


def test_the_cluster_finds_what_one_process_finds_even_if_an_actor_dies(shapes, onnx_file, tmp_path, run):
    photos = tmp_path / "photos"
    photos.mkdir()
    drawn = sorted((shapes / "val").glob("*.png"))
    for number in range(160):
        (photos / f"{number:03d}.png").symlink_to(drawn[number % len(drawn)])
    (photos / "077.png").unlink()
    (photos / "077.png").write_bytes(b"no image")
    plain = maskrcnn.predict(photos, model=onnx_file, output=tmp_path / "plain", save=["results"])
    wanted = json.loads(plain.results.read_text())
    killed: list[int] = []
    stop = threading.Event()
    killer = threading.Thread(target=kill_an_actor, args=(killed, stop))
    killer.start()
    found = maskrcnn.predict(photos, model=onnx_file, output=tmp_path / "ray", ray="local", actors=2)
    stop.set()
    killer.join()
    assert killed, "no actor was there to kill"
    assert found.total == plain.total == len(wanted)
    assert list(found.failed) == [str(photos / "077.png")] and len(found.images) == 159
    entries = sorted(read_parquet(Path(found.results)), key=lambda each: (each["image_id"], -each["score"]))
    wanted.sort(key=lambda each: (each["image_id"], -each["score"]))
    assert [each["image_id"] for each in entries] == [each["image_id"] for each in wanted]
    np.testing.assert_allclose([e["score"] for e in entries], [e["score"] for e in wanted], atol=1e-4)
    np.testing.assert_allclose([e["bbox"] for e in entries], [e["bbox"] for e in wanted], atol=0.05)
    again = maskrcnn.predict(photos, model=onnx_file, output=tmp_path / "ray", ray="local", overwrite=True)
    assert again.total == found.total and len(read_parquet(Path(again.results))) == found.total
    # The command refuses what it would replace, and what the cluster cannot do.
    model = ("--model", onnx_file, "--ray", "local")
    expect_error(run("predict", photos, *model, "--output", tmp_path / "ray"), "exists", "--overwrite")
    away = ("--model", onnx_file, "--ray", "127.0.0.1:1", "--overwrite")
    expect_error(run("predict", photos, *away, "--output", tmp_path / "ray"), "127.0.0.1:1")
    assert len(read_parquet(Path(found.results))) == found.total  # what was there stays until there is more
    expect_error(run("predict", photos, *model, "--save", "overlays"), "--save parquet")
    expect_error(run("predict", photos, *model, "--actors", "many"), "--actors many")
    expect_error(run("predict", photos, *model, "--actor-cpus", "4000"), "4000 CPUs", "--actor-cpus")


def test_no_cluster_at_the_address_is_said(shapes, onnx_file, run):
    failed = run("predict", shapes / "val", "--model", onnx_file, "--ray", "127.0.0.1:1")
    expect_error(failed, "--ray 127.0.0.1:1", "ray start --head")
