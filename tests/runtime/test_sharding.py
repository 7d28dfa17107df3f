"""The log of detections, and evaluations shared by processes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.runtime import Detector
from maskrcnn.runtime.evaluation.evaluate import Seconds, detect_records
from maskrcnn.runtime.evaluation.sharding import (
    DetectionsLog,
    DetectionTask,
    Origin,
    Share,
    detect_in_processes,
    detect_share,
    gathered,
    use_own_gpu,
)

ORIGIN = Origin(model="abc", backend="the default", annotations="def", batch_size=2)
NAMES = {"model": "m.onnx", "annotations": "gt.json"}
RESULT = {"image_id": 7, "category_id": 1, "bbox": [0.1, 2.0, 3.0, 4.0], "score": 0.5}


def new_log(tmp_path, **changes) -> DetectionsLog:
    return DetectionsLog(tmp_path / "log.jsonl", replace(ORIGIN, **changes), NAMES)


def write(log, *image_ids, rank=0):
    part = log.open_part(rank, {"runs_in": "NumPy"})
    log.append(part, image_ids, [[RESULT | {"image_id": i}] for i in image_ids], Seconds(2.0))


def test_appended_images_are_read(tmp_path):
    log = new_log(tmp_path)
    assert log.read() == {} and log.images() == 0 and log.facts() == {}
    write(log, 7, 8)
    write(log, 9)
    found = log.read()
    assert list(found) == [7, 8, 9]
    results, seconds = found[8]
    assert results == [RESULT | {"image_id": 8}]
    assert seconds.data == 1.0  # half of its batch's
    assert log.images() == 3 and log.images() == 3 and log.facts() == {"runs_in": "NumPy"}


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_an_incomplete_line_loses_only_its_image(tmp_path, cut):
    log = new_log(tmp_path)
    write(log, 7, 8)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-cut])
    assert list(log.read()) == [7]
    write(log, 8)
    assert log.path.read_bytes().count(b"\n") == 3 and list(log.read()) == [7, 8]


def test_garbage_after_an_interruption_is_cut_off(tmp_path):
    log = new_log(tmp_path)
    write(log, 7)
    with open(log.path, "ab") as file:
        file.write(b"\x00\x00\x00\n")
    write(log, 8)
    assert list(log.read()) == [7, 8] and b"\x00" not in log.path.read_bytes()


@pytest.mark.parametrize("length", [0, 1, 15, 60])
def test_an_incomplete_first_line_starts_over(tmp_path, length):
    log = new_log(tmp_path)
    write(log, 7)
    log.path.write_bytes(log.path.read_bytes()[:length])
    write(log, 8)
    assert list(log.read()) == [8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "xyz"}, r"detections of another model: m\.onnx \(sha256 abc…\)\n  expected: model m\.onnx"),
        ({"annotations": "xyz"}, r"another annotations: gt\.json \(sha256 def…\)"),
        ({"backend": "openvino"}, "another backend: the default\n  expected: backend openvino"),
        ({"batch_size": 3}, "another batch size: 2\n  expected: batch size 3"),
    ],
)
def test_detections_of_another_origin_are_refused_and_kept(tmp_path, changes, message):
    write(new_log(tmp_path), 7)
    before = (tmp_path / "log.jsonl").read_bytes()
    for call in (DetectionsLog.read, DetectionsLog.open_part):
        with pytest.raises(UserError, match=message):
            call(new_log(tmp_path, **changes))
    assert (tmp_path / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", ["hello", "hello\n", "[1]\n", '{"a": 1}\n', '{"maskrcnn_detections": 2}\n'])
def test_a_file_that_is_not_a_log_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "log.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"log\.jsonl: not a log of detections"):
        new_log(tmp_path).open_part()
    assert path.read_text() == content


def test_an_error_names_the_malformed_line(tmp_path):
    log = new_log(tmp_path)
    write(log, 7)
    with open(log.path, "ab") as file:
        file.write(b'{"image": 3}\n')
    with pytest.raises(UserError, match="line 3 is not an image"):
        log.read()


def test_the_parts_of_several_processes_are_one_log(tmp_path):
    log = new_log(tmp_path)
    for rank in (2, 0, 1):
        write(log, 10 + rank, rank=rank)
    (tmp_path / "log.old.jsonl").write_text("not a part")
    assert [part.name for part in log.parts()] == ["log.jsonl", "log.1.jsonl", "log.2.jsonl"]
    assert sorted(log.read()) == [10, 11, 12] and log.images() == 3


# Sharing


class Counting(Detector):
    """Counts the images of its calls."""

    def __init__(self, backend):
        super().__init__(backend)
        self.images = 0

    def detect(self, images):
        self.images += len(images)
        return super().detect(images)


@pytest.fixture
def detector(onnx_file):
    return Counting(Detector.load(onnx_file).backend)


@pytest.fixture
def task(onnx_file, shapes) -> DetectionTask:
    return DetectionTask(onnx_file, shapes, "val", batch_size=2)


@pytest.fixture
def dataset(shapes) -> CocoDataset:
    return CocoDataset.load(shapes, "val")


def test_the_shares_together_are_the_whole_in_order(detector, dataset, task, tmp_path):
    expected, _ = detect_records(detector, dataset.images, batch_size=2)
    detector.images = 0
    log = task.log(tmp_path / "log.jsonl", dataset)
    done = []
    for rank in (1, 0):
        detect_share(detector, dataset, log, Share(rank, 2, rank), progress=done.append)
    results, seconds = gathered(dataset, log, progress=done.append)
    assert results == json.loads(json.dumps(expected))
    assert detector.images == len(dataset.images) and sum(done) == 2 * len(dataset.images)
    assert min(seconds.data, seconds.compute, seconds.encode) > 0 and seconds.score == 0


def test_another_number_of_processes_continues(detector, dataset, task, tmp_path):
    log = task.log(tmp_path / "log.jsonl", dataset)
    detect_share(detector, dataset, log, Share(0, 3, 0))
    assert detector.images == 2
    log.path.write_bytes(b"".join(log.path.read_bytes().splitlines(keepends=True)[:-1]))  # half a batch
    detect_share(detector, dataset, log, Share())
    assert detector.images == 8
    detect_share(detector, dataset, log, Share())
    assert detector.images == 8
    assert gathered(dataset, log)[0] == json.loads(
        json.dumps(detect_records(detector, dataset.images, batch_size=2)[0])
    )


def test_gathering_waits_for_the_others_up_to_a_limit(detector, dataset, task, tmp_path):
    log = task.log(tmp_path / "log.jsonl", dataset)
    detect_share(detector, dataset, log, Share(0, 2, 0))
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            detect_share(detector, dataset, log, Share(1, 2, 1))

    results, _ = gathered(dataset, log, sleep=sleep)
    assert len(pauses) == 3 and {r["image_id"] for r in results} <= {r.id for r in dataset.images}
    (tmp_path / "log.1.jsonl").unlink()
    with pytest.raises(UserError, match="4 of 6 images, and none for 1 s"):
        gathered(dataset, log, patience_s=1.0, sleep=lambda seconds: None)


def test_processes_give_the_results_of_one(dataset, task, detector, tmp_path):
    log = task.log(tmp_path / "log.jsonl", dataset)
    done = []
    results, _ = detect_in_processes(task, dataset, log, 2, progress=done.append)
    expected = detect_records(detector, dataset.images, batch_size=2)[0]
    assert [r["image_id"] for r in results] == [r["image_id"] for r in expected]
    for field in ("bbox", "score"):  # threads may add up in another order
        np.testing.assert_allclose([r[field] for r in results], [r[field] for r in expected], rtol=1e-3, atol=1e-3)
    assert sum(done) == 6 and log.facts()["has_masks"] is True


def test_an_error_in_a_worker_is_raised(task, dataset, tmp_path):
    broken = replace(task, model=tmp_path / "broken.onnx")
    broken.model.write_text("no model")
    with pytest.raises(UserError, match=r"broken\.onnx"):
        detect_in_processes(broken, dataset, broken.log(tmp_path / "l.jsonl", dataset), 2, progress=lambda n: None)


def test_a_missing_model_is_named(task, dataset, tmp_path):
    for name in ("gone.onnx", "gone.xml"):
        with pytest.raises(UserError, match=rf"no file .*{name}"):
            replace(task, model=tmp_path / name).log(tmp_path / "l.jsonl", dataset)
    (tmp_path / "half.xml").write_text("")
    with pytest.raises(UserError, match=r"no file .*half\.bin"):
        replace(task, model=tmp_path / "half.xml").log(tmp_path / "l.jsonl", dataset)


def test_the_share_is_read_from_torchruns_variables():
    assert Share.of_environment({}) == Share(0, 1, 0)
    assert Share.of_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Share(5, 8, 1)
    assert Share.of_environment({"RANK": "1", "WORLD_SIZE": "2"}) == Share(1, 2, 1)
    for variables in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "-1"}, {"WORLD_SIZE": "many"}):
        with pytest.raises(UserError, match="0 ≤ RANK < WORLD_SIZE"):
            Share.of_environment(variables)


@pytest.mark.parametrize(
    ("variables", "gpus", "rank", "expected"),
    [
        ({}, 0, 1, None),
        ({}, 4, 2, "2"),
        ({}, 2, 3, "1"),
        ({"CUDA_VISIBLE_DEVICES": "5,7"}, 8, 1, "7"),
        ({"CUDA_VISIBLE_DEVICES": ""}, 8, 1, ""),
    ],
)
def test_each_process_sees_one_gpu(tmp_path, variables, gpus, rank, expected):
    folder = tmp_path / "gpus"
    for index in range(gpus):
        (folder / f"0000:{index}").mkdir(parents=True)
    use_own_gpu(Share(rank, 4, rank), variables, folder)
    assert variables.get("CUDA_VISIBLE_DEVICES") == expected
    alone: dict[str, str] = {}
    use_own_gpu(Share(), alone, folder)
    assert alone == {}


def test_a_glob_pattern_in_a_file_name_is_literal(tmp_path):
    log = DetectionsLog(tmp_path / "a[1]*.jsonl", ORIGIN)
    write(log, 1, rank=1)
    assert [Path(part).name for part in log.parts()] == ["a[1]*.1.jsonl"]
