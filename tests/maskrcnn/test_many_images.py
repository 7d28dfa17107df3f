"""`predict` on folders, lists, URLs and videos: sources, order, memory, continued runs, and labels for other tools."""

import json
import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from command_line import expect_error
from PIL import Image
from pycocotools import mask as mask_api

import maskrcnn
from maskrcnn.api.progress import Progress
from maskrcnn.data.coco import CocoDataset, instance_mask
from maskrcnn.data.images import ImageNotes
from maskrcnn.data.prelabels import mask_window, outlines
from maskrcnn.data.sources import ImageItem, find_sources
from maskrcnn.data.video import VIDEO
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.pipeline import detect_images

av = pytest.importorskip("av")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def photos(shapes, tmp_path) -> Path:
    """Six images in two folders, one of them smaller."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, path in enumerate(sorted((shapes / "val").glob("*.png"))[:6]):
        target = folder / ("more" if number > 3 else "") / f"{number}.png"
        shutil.copy(path, target)
    small = Image.open(folder / "1.png")
    small.resize((small.width // 2, small.height // 2)).save(folder / "1.png")
    return folder


def video(path: Path, frames: int, size_hw=(64, 96), rate=Fraction(30000, 1001)) -> Path:
    """A square that moves by two pixels a frame, with a sound."""
    with av.open(str(path), "w") as file:
        pictures = file.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
        pictures.height, pictures.width, pictures.pix_fmt = *size_hw, "yuv420p"
        sound = file.add_stream("aac", rate=44100)
        for index in range(frames):
            pixels = np.full((*size_hw, 3), 60, np.uint8)
            pixels[20:44, 2 * index : 2 * index + 24] = (220, 40, 40)
            file.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for index in range(int(frames / rate * 44100) // 1024):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
            samples.rate, samples.pts = 44100, 1024 * index
            file.mux(sound.encode(samples))
        file.mux(pictures.encode())
        file.mux(sound.encode())
    return path


def names_of(named, **options) -> list[str]:
    return [source.name for source in find_sources(named, **options)]


def test_sources_of_every_kind_name_the_same_images(photos, tmp_path, monkeypatch):
    import fsspec
    import pyarrow

    monkeypatch.chdir(tmp_path)
    files = [*(f"photos/{n}.png" for n in range(4)), "photos/more/4.png", "photos/more/5.png"]
    assert names_of("photos") == files
    assert names_of("photos/**/*.png") == files
    assert names_of("photos", leave_out=photos / "more") == files[:4]
    assert names_of("photos", leave_out=tmp_path) == files  # the images are inside of what is left out
    inner = [name.removeprefix("photos/") for name in files]
    (photos / "list.txt").write_text("# chosen\n" + "\n".join(inner) + "\n")
    (photos / "list.json").write_text(json.dumps(inner))
    parquet.write_table(pyarrow.table({"number": range(6), "file_name": inner}), photos / "list.parquet")
    (photos / "named.json").write_text(json.dumps({"images": inner}))
    for name in ("list.txt", "list.json", "list.parquet", "named.json"):
        assert names_of(f"photos/{name}") == files, name
    (tmp_path / "outside.txt").write_text("\n".join(files))  # relative to the working directory too
    assert names_of("outside.txt") == files
    memory = fsspec.filesystem("memory")
    for name in files:
        memory.pipe(f"/{name}", (tmp_path / name).read_bytes())
    assert names_of("memory://photos") == [f"memory:///{name}" for name in files]
    assert names_of("memory://photos/?.png") == [f"memory:///{name}" for name in files[:4]]
    signed = "https://host/a.png?signature=[*]"  # a query, not wildcards: nothing is looked up
    assert names_of(signed) == [signed] and find_sources(signed)[0].stem == "a"
    item = next(find_sources("memory://photos/1.png")[0].images())
    pixels, _ = item.read(Preprocessing(), ImageNotes())
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(photos / "1.png").convert("RGB")))


def test_an_annotation_file_gives_its_images_and_ids(shapes, tmp_path):
    file = shapes / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["images"] = [{**image, "id": 1000 - image["id"]} for image in reversed(content["images"])]
    content["annotations"] = []
    named = tmp_path / "set" / "chosen.json"
    shutil.copytree(shapes / "val", named.parent / "images")
    named.write_text(json.dumps(content))
    found = find_sources(named)
    assert [(Path(each.name).name, each.image_id) for each in found] == [
        (image["file_name"], image["id"]) for image in content["images"]
    ]
    assert all(Path(each.name).is_file() for each in found)
    odd = {"7": 7, 8.0: 8, 1e999: None, float("nan"): None, None: None, True: None, 1.5: None}
    content["images"] = [{**content["images"][0], "id": image_id} for image_id in odd]
    named.write_text(json.dumps(content))
    assert [each.image_id for each in find_sources(named)] == list(odd.values())


def test_an_id_that_is_none_does_not_hide_those_of_other_images(shapes, onnx_file, tmp_path):
    content = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    content["images"] = [{**content["images"][0], "id": float("inf")}, 5, *content["images"]]
    (tmp_path / "odd.json").write_text(json.dumps(content))
    last = content["images"][-1]
    maskrcnn.predict(
        shapes / "val" / last["file_name"], model=onnx_file, output=tmp_path / "out", annotations=tmp_path / "odd.json"
    )
    assert json.loads((tmp_path / "out" / "images.json").read_text()) == {
        str(last["id"]): str(shapes / "val" / last["file_name"])
    }


def test_results_are_those_of_single_images_in_their_order(photos, onnx_file):
    detector = Detector.load(onnx_file)
    files = names_of(photos)
    taken = []

    def items():
        for name in files * 5:
            taken.append(name)
            yield ImageItem(name)

    wanted = {name: detector.detect([name])[0] for name in files}
    results = detect_images(detector, items(), lambda *found: found[-1], batch=3, calls=2, threads=2)
    for number, (item, found) in enumerate(results):
        assert item.name == (files * 5)[number]
        assert len(taken) - number <= 2 * (2 + 2 * 3) + 1  # no more than a window is read ahead
        np.testing.assert_allclose(found.boxes_xyxy_px, wanted[item.name].boxes_xyxy_px, atol=1e-2)
        np.testing.assert_allclose(found.scores, wanted[item.name].scores, atol=1e-4)
    assert number == 29
    streamed = list(maskrcnn.predict(photos, model=onnx_file, stream=True))
    assert [each.name for each in streamed] == files
    assert streamed[1].draw(min_score=0).size[0] % streamed[1].image.shape[1] == 0
    np.testing.assert_allclose(streamed[1].boxes_xyxy_px, wanted[files[1]].boxes_xyxy_px, atol=1e-2)


class Told(Progress):
    """Keeps the messages of a run."""

    def __init__(self) -> None:
        self.texts = list[str]()

    def message(self, text: str) -> None:
        self.texts.append(text)


class Stopped(Progress):
    """Interrupts a run after some images."""

    def __init__(self, after: int) -> None:
        self.left = after

    def task(self, title, total=None):
        from contextlib import contextmanager

        @contextmanager
        def counting():
            yield self.count

        return counting()

    def count(self, steps: int) -> None:
        self.left -= steps
        if self.left <= 0:
            raise KeyboardInterrupt


def test_a_run_that_was_killed_goes_on_where_it_stopped(photos, onnx_file, tmp_path):
    (photos / "3.png").write_bytes(b"no image")
    saved = {"model": onnx_file, "save": ["results", "parquet", "coco", "overlays"], "threshold": 0.05}
    maskrcnn.predict(photos, output=tmp_path / "whole", **saved)
    folder = tmp_path / "parts"
    for after in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            maskrcnn.predict(photos, output=folder, resume=after > 2, progress=Stopped(after + 0), **saved)
        lines = folder / "detections.jsonl"
        assert lines.read_bytes().count(b"\n") == after
        with lines.open("ab") as file:  # what a killed process leaves of its last line
            file.write(b'{"image_id": 4, "fi')
    with pytest.raises(UserError, match="interrupted") as refused:
        maskrcnn.predict(photos, output=folder, **saved)
    assert "--resume" in refused.value.fix
    found = maskrcnn.predict(photos, output=folder, resume=True, **saved)
    assert len(found.images) == 5 and list(found.failed) == [str(photos / "3.png")]
    for name in ("detections.jsonl", "results.json", "images.json", "annotations.json", "failed.txt", "5.png"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    again = maskrcnn.predict(photos, output=folder, resume=True, **saved)
    assert again.counts == found.counts and again.images == found.images
    assert names_of(folder / "failed.txt") == [str(photos / "3.png")]


def test_a_complete_run_goes_on_with_more_images_and_more_outputs(photos, onnx_file, tmp_path):
    out, given = tmp_path / "out", {"model": onnx_file, "output": tmp_path / "out", "threshold": 0.05}
    maskrcnn.predict(photos, limit=2, save=["results", "labelme"], **given)
    corrected = out / "labelme" / "0.json"
    corrected.write_text("corrected")
    found = maskrcnn.predict(photos, resume=True, save=["results", "labelme", "coco"], **given)
    assert len(found.images) == 6 and len(json.loads((out / "results.json").read_text())) == found.total
    assert len(json.loads((out / "annotations.json").read_text())["images"]) == 6
    assert corrected.read_text() == "corrected" and (out / "labelme" / "more" / "5.json").is_file()
    maskrcnn.predict(photos, resume=True, save=["parquet"], **given)
    assert parquet.read_metadata(out / "detections.parquet").num_rows == found.total


def test_a_complete_run_says_that_it_draws_nothing(photos, onnx_file, tmp_path):
    given = {"model": onnx_file, "output": tmp_path / "out"}
    maskrcnn.predict(photos, limit=2, save=["overlays"], **given)
    (tmp_path / "out" / "0.png").unlink()
    told = Told()
    found = maskrcnn.predict(photos, limit=3, save=["overlays"], resume=True, progress=told, **given)
    assert [path.name for path in found.overlays] == ["1.png", "2.png"]
    assert [text for text in told.texts if text.startswith("1 of them without a drawing")]


def test_a_new_run_leaves_no_results_of_the_one_before(photos, onnx_file, tmp_path):
    out = tmp_path / "out"
    maskrcnn.predict(photos, model=onnx_file, output=out, save=["results", "coco"])
    (photos / "3.png").write_bytes(b"no image")
    maskrcnn.predict(photos, model=onnx_file, output=out, save=["parquet"])
    assert {path.name for path in out.iterdir()} == {
        *("detections.jsonl", "detections.parquet", "failed.txt", "images.json", "run.json")
    }
    with pytest.raises(UserError, match=r"failed\.txt, a file that the command reads"):  # nor does it lose the others'
        maskrcnn.predict(out / "failed.txt", model=onnx_file, output=out)


def test_a_run_is_not_continued_with_other_images_or_another_model(photos, onnx_file, boxes_onnx_file, tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(UserError, match=r"run\.json"):
        maskrcnn.predict(photos, output=folder, model=onnx_file, resume=True)
    with pytest.raises(KeyboardInterrupt):
        maskrcnn.predict(photos, output=folder, model=onnx_file, save=["results"], progress=Stopped(2))
    before = (folder / "detections.jsonl").read_bytes()
    with pytest.raises(UserError, match="model_sha256"):
        maskrcnn.predict(photos, output=folder, model=boxes_onnx_file, resume=True)
    with pytest.raises(UserError, match=r"image 1 is .*4\.png, not .*0\.png"):
        maskrcnn.predict(photos / "more", output=folder, model=onnx_file, resume=True)
    assert (folder / "detections.jsonl").read_bytes() == before


def test_a_video_gives_its_frames_and_an_annotated_video(onnx_file, tmp_path):
    clip = video(tmp_path / "clip.mp4", 20)
    found = maskrcnn.predict(clip, model=onnx_file, output=tmp_path / "out", threshold=0.05)
    assert found.images == [f"{clip}#{index}" for index in range(20)]
    records = [json.loads(line) for line in (tmp_path / "out" / "detections.jsonl").read_text().splitlines()]
    assert [record["frame"] for record in records] == list(range(20))
    assert records[15]["time_s"] == pytest.approx(15 * 1001 / 30000, abs=1e-4)
    assert (records[0]["height"], records[0]["width"]) == (64, 96)
    drawn = tmp_path / "out" / "clip.mp4"
    assert found.overlays == [drawn] and VIDEO.recognises(drawn) and not VIDEO.recognises(clip)
    with av.open(str(drawn)) as file, av.open(str(clip)) as original:
        assert file.streams.video[0].average_rate == Fraction(30000, 1001)
        times = [frame.time for frame in file.decode(video=0)]
        assert times == pytest.approx([frame.time for frame in original.decode(video=0)], abs=1e-3)
        assert len(times) == 20
    with av.open(str(drawn)) as file, av.open(str(clip)) as original:
        sounds = [
            [bytes(packet) for packet in each.demux(audio=0) if packet.dts is not None] for each in (file, original)
        ]
        assert sounds[0] == sounds[1] and len(sounds[0]) > 10
    first, limited = found.counts[:3], maskrcnn.predict(clip, model=onnx_file, limit=3)
    assert limited.counts == first


def test_an_interrupted_video_starts_again_and_a_finished_one_does_not(onnx_file, tmp_path):
    clips = [video(tmp_path / f"{name}.mp4", 6) for name in "ab"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    maskrcnn.predict(clips, model=onnx_file, output=whole)
    with pytest.raises(KeyboardInterrupt):
        maskrcnn.predict(clips, model=onnx_file, output=parts, progress=Stopped(9))
    assert (parts / "a.mp4").is_file() and not (parts / "b.mp4").exists()
    first = (parts / "a.mp4").stat().st_mtime_ns
    found = maskrcnn.predict(clips, model=onnx_file, output=parts, resume=True)
    assert (parts / "a.mp4").stat().st_mtime_ns == first
    assert sorted(found.overlays) == [parts / "a.mp4", parts / "b.mp4"]
    assert (parts / "detections.jsonl").read_bytes() == (whole / "detections.jsonl").read_bytes()
    with av.open(str(parts / "b.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 6


def test_files_that_folders_are_not_searched_for_are_named(photos, onnx_file, tmp_path):
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.save(folder / "a.npy", np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(UserError, match=r"no image in it .*, but files \.npy\n.*\n.*arrays/\*\.npy"):
        maskrcnn.predict(folder, model=onnx_file)
    assert len(maskrcnn.predict(f"{folder}/*.npy", model=onnx_file).images) == 1
    Image.new("RGB", (64, 64)).save(folder / "b.gif")
    told = Told()
    assert maskrcnn.predict(folder, model=onnx_file, progress=told).images == [str(folder / "b.gif")]
    assert [text for text in told.texts if text.startswith("1 file(s) .npy of ") and "a.npy" in text]
    (folder / "c.HEIC").write_bytes(b"of a phone")
    told = Told()
    assert len(maskrcnn.predict(f"{folder}/*", model=onnx_file, progress=told).images) == 2
    assert told.texts[0] == (
        f"1 file(s) .heic of {folder}/* are left out, such as {folder / 'c.HEIC'}: convert them to JPEG or PNG"
    )


def test_sources_that_are_bad_are_named(run, road, photos, tmp_path, monkeypatch):
    model = ("--model", road / "model.onnx")
    (tmp_path / "empty").mkdir()
    expect_error(run("predict", "empty", *model), "empty", "no image")
    expect_error(run("predict", "photos/*.tif", *model), "photos/*.tif", "matches no image")
    (tmp_path / "list.txt").write_text("x.png\ny.png\n")
    expect_error(run("predict", "list.txt", *model), "none of its 2 images exists", "x.png")
    (tmp_path / "list.json").write_text('{"a": 1}')
    expect_error(run("predict", "list.json", *model), "list.json")
    expect_error(run("predict", "nothing://bucket/a.jpg", *model), "nothing://bucket/a.jpg")
    (tmp_path / "bad.mp4").write_bytes(b"\0" * 1000)
    expect_error(run("predict", "bad.mp4", *model), "bad.mp4", "decoded as a video")
    expect_error(run("predict", "camera:87", *model), "camera:87")
    clip = video(tmp_path / "clip.mp4", 5)
    expect_error(run("predict", clip, *model, "--save", "yolo"), "labels of", "image files")
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        sound = file.add_stream("aac", rate=44100)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        samples.rate = 44100
        file.mux(sound.encode(samples))
        file.mux(sound.encode())
    expect_error(run("predict", "sound.mp4", *model), "no video stream")
    (tmp_path / "clips").mkdir()
    clip.rename(tmp_path / "clips" / "clip.mp4")
    expect_error(run("predict", "clips", *model), "no image in it, but 1 video", "'clips/*'")
    (photos / ".hidden").mkdir()
    for name in ("._0.png", ".hidden/0.png"):  # as macOS and notebooks leave them
        (photos / name).write_bytes(b"no image")
    assert len(names_of(photos)) == 6
    shutil.copy(photos / "0.png", photos / "0.bmp")
    expect_error(run("predict", photos, *model, "--save", "yolo"), "0.bmp", "0.png", "one file")
    expect_error(run("predict", photos / "0.png", "--model", "no.xml", "--output", "new/out"), "no.xml")
    (photos / "bad.png").write_bytes(b"no image")
    expect_error(run("predict", photos / "bad.png", *model, "--output", "new/out"), "bad.png")
    assert not (tmp_path / "predictions").exists() and not list(tmp_path.glob("new/*"))


def test_a_video_that_ends_early_keeps_its_frames(run, road, tmp_path):
    whole = video(tmp_path / "whole.mkv", 60, size_hw=(128, 192)).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    _, out, _ = run("predict", "cut.mkv", "--model", road / "model.onnx", "--save", "results")
    frames = (tmp_path / "predictions" / "detections.jsonl").read_text().count('"frame"')
    assert 0 < frames < 60 and f"of {frames} images" in out


def mask_of(segmentation) -> np.ndarray:
    return mask_api.decode(segmentation).astype(bool)


def rle(mask: np.ndarray) -> dict:
    coded = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(coded["size"]), "counts": coded["counts"].decode()}


def filled(rings, size_hw) -> np.ndarray:
    polygons = [ring.ravel().tolist() for ring in rings]
    return mask_of(mask_api.merge(mask_api.frPyObjects(polygons, *size_hw)))


@pytest.mark.parametrize("tolerance", [0, 1])
def test_outlines_keep_holes_and_parts(tolerance):
    rows, columns = np.mgrid[:200, :300]
    ring = (np.hypot(rows - 90, columns - 100) < 70) & (np.hypot(rows - 90, columns - 90) > 25)
    ring &= np.hypot(rows - 60, columns - 135) > 12  # a second hole
    part = (np.abs(rows - 150) < 30) & (columns > 240)  # to the right edge of the image
    mask = ring | part
    window, top, left = mask_window(rle(mask))
    whole = np.zeros_like(mask)
    whole[top : top + window.shape[0], left : left + window.shape[1]] = window
    np.testing.assert_array_equal(whole, mask)
    rings = outlines(rle(mask), tolerance)
    assert len(rings) == 2
    got = filled(rings, mask.shape)
    edge = mask ^ got
    assert (mask & got).sum() / (mask | got).sum() > (0.99 if tolerance == 0 else 0.98)
    # Only pixels on an outline may differ.
    inside = np.zeros_like(mask)
    inside[1:-1, 1:-1] = mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    if tolerance == 0:
        assert not (edge & inside).any()


def test_labels_go_back_into_a_dataset(photos, onnx_file, tmp_path, run):
    saved = ["coco", "labelme", "yolo", "results"]
    maskrcnn.predict(photos, model=onnx_file, output=tmp_path / "out", save=saved, threshold=0.1, tolerance=0.5)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    files = json.loads((tmp_path / "out" / "images.json").read_text())
    wanted: dict[str, list] = {}
    for each in results:
        if each["score"] >= 0.1 and mask_api.area(each["segmentation"]) > 30:
            wanted.setdefault(Path(files[str(each["image_id"])]).name, []).append(each)
    assert sum(map(len, wanted.values())) > 20
    linked, real = tmp_path / "linked", tmp_path / "far" / "away"
    real.mkdir(parents=True)
    linked.symlink_to(real)
    maskrcnn.predict(photos, model=onnx_file, output=linked, save=["labelme", "yolo"])
    labels = json.loads((linked / "labelme" / "0.json").read_text())
    for path in (linked / "yolo" / "images" / "0.png", linked / "labelme" / labels["imagePath"]):
        assert path.samefile(photos / "0.png")
    code, _, err = run("data", "convert", "labelme", tmp_path / "out" / "labelme", tmp_path / "lm")
    assert code == 0, err
    sets = {
        "coco": [CocoDataset.load(tmp_path / "out" / "annotations.json", "annotations", images=photos)],
        "yolo": [CocoDataset.load(tmp_path / "out" / "yolo", "train")],
        "labelme": [CocoDataset.load(tmp_path / "lm", split) for split in ("train", "val")],
    }
    corrected = next((tmp_path / "out" / "labelme").rglob("*.json"))
    corrected.write_text("corrected")
    with pytest.raises(UserError, match="corrected"):
        maskrcnn.predict(photos, model=onnx_file, output=tmp_path / "out", save=saved)
    maskrcnn.predict(photos, model=onnx_file, output=tmp_path / "out", save=saved, resume=True)
    assert corrected.read_text() == "corrected"
    for name, datasets in sets.items():
        records = {record.path.name: (record, dataset) for dataset in datasets for record in dataset.images}
        for file, entries in wanted.items():
            record, dataset = next(found for key, found in records.items() if key.endswith(file))
            masks = [(dataset.class_names[i.label - 1], instance_mask(record, i)) for i in record.instances]
            for entry in entries:
                truth = mask_of(entry["segmentation"])
                overlaps = [
                    (truth & mask).sum() / (truth | mask).sum()
                    for label, mask in masks
                    if label == entry["category_name"]
                ]
                assert max(overlaps) > 0.8, (name, file, entry["bbox"])


def test_parquet_and_lines_score_as_the_json_results(photos, shapes, onnx_file, tmp_path, run):
    file = shapes / "annotations" / "instances_val.json"
    folder = tmp_path / "out"
    maskrcnn.predict(shapes / "val", model=onnx_file, output=folder, save=["results", "parquet"])
    reports = []
    for name in ("results.json", "detections.parquet", "detections.jsonl"):
        code, _, err = run("evaluate", "--results", folder / name, "--annotations", file, "--json", "scores.json")
        assert code == 0, err
        reports.append(json.loads((tmp_path / "scores.json").read_text())["per_class"])
    assert reports[0] == reports[1] == reports[2] and set(reports[0]) == {"box", "mask"}


def test_a_name_that_is_not_utf8_is_kept_or_escaped_in_every_format(photos, onnx_file, tmp_path):
    folder = tmp_path / "bytes"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(photos / "0.png", folder / name)
    (folder / os.fsdecode(b"cut\xe9.png")).write_bytes((photos / "0.png").read_bytes()[:99])
    out, save = tmp_path / "out", ["results", "parquet", "coco", "labelme", "yolo", "overlays"]
    maskrcnn.predict(folder, model=onnx_file, output=out, save=save, threshold=0.05)
    good, cut = [json.loads(line)["file"] for line in (out / "detections.jsonl").read_text().splitlines()]
    assert [Path(good).name, Path(cut).name] == [name, os.fsdecode(b"cut\xe9.png")]
    rows = parquet.read_table(out / "detections.parquet").to_pylist()
    assert {Path(row["file"]).name for row in rows} == {"caf\\udce9.png", "cut\\udce9.png"}
    assert (out / "yolo" / "labels" / name).with_suffix(".txt").is_file()
    assert json.loads((out / "annotations.json").read_text())["images"][0]["file_name"] == name


def test_the_orientation_that_was_applied_is_recorded(tmp_path, onnx_file):
    image = Image.new("RGB", (64, 32), (200, 30, 30))
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    maskrcnn.predict(tmp_path / "turned.jpg", model=onnx_file, output=tmp_path / "out", save=["results"])
    record = json.loads((tmp_path / "out" / "detections.jsonl").read_text())
    assert (record["height"], record["width"], record["orientation"]) == (64, 32, 6)
