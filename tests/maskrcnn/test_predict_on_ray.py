"""`predict --ray` on a cluster of this machine."""

import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from command_line import expect_error

import maskrcnn
from maskrcnn.errors import UserError
from maskrcnn.runtime.predictions import read_parquet

ray = pytest.importorskip("ray")
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


def test_no_cluster_at_the_address_and_no_ray_are_said(shapes, onnx_file, run, monkeypatch):
    arguments = ("predict", shapes / "val", "--model", onnx_file, "--ray", "127.0.0.1:1")
    expect_error(run(*arguments), "--ray 127.0.0.1:1", "ray start --head")
    monkeypatch.setitem(sys.modules, "ray", None)
    expect_error(run(*arguments), "pip install 'maskrcnn[ray]'")


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


@pytest.fixture(scope="module")
def cluster():
    """A cluster that the runs of the tests after this share."""
    ray.init(num_cpus=1, log_to_driver=False, include_dashboard=False, configure_logging=False)
    yield "local"
    ray.shutdown()


def rows(folder: str) -> list[dict]:
    """The detections in a folder of Parquet files, in the order of images."""
    return sorted(read_parquet(Path(folder)), key=lambda each: (each["image_id"], -each["score"], each["bbox"]))


def test_an_interrupted_run_on_ray_continues_with_the_blocks_that_are_missing(shapes, onnx_file, tmp_path, cluster):
    photos = tmp_path / "photos"
    photos.mkdir()
    drawn = sorted((shapes / "val").glob("*.png"))
    names = [f"{number:02d}.png" for number in range(70)]  # three blocks
    names[2], names[3] = os.fsdecode(b"02 caf\xe9.png"), os.fsdecode(b"03 caf\xe9.png")
    for number, name in enumerate(names):
        (photos / name).symlink_to(drawn[number % len(drawn)])
    (photos / names[3]).unlink()
    (photos / names[3]).write_bytes(b"no image")
    given = {"model": onnx_file, "ray": cluster, "actors": 1}
    found = maskrcnn.predict(photos, output=tmp_path / "out", **given)
    assert list(found.failed) == [str(photos / names[3])] and str(photos / names[2]) in found.images
    whole = rows(found.results)
    assert {each["image_id"] for each in whole} <= {*range(1, 71)} - {4} and len(whole) == found.total
    # As a run that was killed leaves it: a block is missing, one is damaged.
    part = Path(f"{found.results}.part")
    Path(found.results).rename(part)
    kept, missing, damaged = sorted(part.iterdir())
    missing.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-20])
    (part / ".draft.parquet").write_bytes(b"PAR1")
    written = kept.stat().st_mtime_ns
    for options, message in (
        ({}, "--resume"),
        ({"resume": True, "tile": 64}, "a run with tiles None"),
        ({"resume": True, "limit": 40}, "other images"),
    ):
        with pytest.raises(UserError, match=message):
            maskrcnn.predict(photos, output=tmp_path / "out", **given, **options)
    again = maskrcnn.predict(photos, output=tmp_path / "out", resume=True, **given)
    assert rows(again.results) == whole
    assert (again.total, list(again.failed), again.images) == (found.total, list(found.failed), found.images)
    assert sorted(Path(found.results).iterdir()) == [
        Path(found.results, each.name) for each in (kept, missing, damaged)
    ]
    assert Path(found.results, kept.name).stat().st_mtime_ns == written and not part.exists()
    with pytest.raises(UserError, match="leave out --resume"):
        maskrcnn.predict(photos, output=tmp_path / "new", resume=True, **given)


def test_tiles_and_urls_on_ray(shapes, onnx_file, tmp_path, cluster):
    drawn = sorted((shapes / "val").glob("*.png"))[:3]
    given = {"model": onnx_file, "tile": 64, "batch_size": 2}
    maskrcnn.predict(drawn, output=tmp_path / "plain", save=["parquet"], **given)
    url = f"file://{tmp_path}/remote"
    found = maskrcnn.predict(drawn, output=url, ray=cluster, **given)
    assert found.results == f"{url}/detections.parquet"
    wanted, own = rows(tmp_path / "plain" / "detections.parquet"), rows(tmp_path / "remote" / "detections.parquet")
    assert len(wanted) == len(own) == found.total > 0
    assert [each["image_id"] for each in own] == [each["image_id"] for each in wanted]
    np.testing.assert_allclose([e["bbox"] for e in own], [e["bbox"] for e in wanted], atol=0.05)
    with pytest.raises(UserError, match="earlier run"):
        maskrcnn.predict(drawn, output=url, ray=cluster, **given)
    assert maskrcnn.predict(drawn, output=url, ray=cluster, resume=True, **given).total == found.total
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.png"):
        maskrcnn.predict([*drawn, tmp_path / "bad.png"], output=tmp_path / "out", ray=cluster, strict=True, **given)
