"""The page of `maskrcnn web`: what is written, and its detections in a real browser."""

import base64
import io
import json
import re
import shutil
import tarfile

import chromium
import numpy as np
import pytest
from chromium import ISOLATED, served
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage
from source_datasets import whole

from maskrcnn.data.shapes import CLASS_NAMES, shapes_image
from maskrcnn.errors import UserError
from maskrcnn.runtime import Detector
from maskrcnn.runtime.serving import web
from maskrcnn.runtime.serving.web import RUNTIME_FILES, RUNTIME_VERSION, write_page

needs_browser = pytest.mark.skipif(chromium.EXECUTABLE is None, reason="no Chromium")


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """A folder in place of the npm package, and its hashes."""
    folder = tmp_path / "package"
    (folder / "dist").mkdir(parents=True)
    monkeypatch.setattr(web, "RUNTIME_FILES", {})
    for name in RUNTIME_FILES:
        (folder / "dist" / name).write_text(name)
        web.RUNTIME_FILES[name] = web.hashlib.sha256(name.encode()).hexdigest()
    return folder


def test_the_folder_is_whole_and_written_again(tmp_path, onnx_file, fake_package):
    files, detections = write_page(onnx_file, tmp_path / "page", onnxruntime_web=fake_package)
    assert {path.name for path in files} == {path.name for path in (tmp_path / "page").iterdir()}
    own = {"index.html", "page.js", "detect.js", "model.json", "model.onnx", "check.json", "check.png"}
    assert own | set(RUNTIME_FILES) == {path.name for path in files}
    model = json.loads((tmp_path / "page/model.json").read_text())
    assert model["class_names"] == ["circle", "rectangle", "triangle"] and model["contract"] == 1
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        archive.add(fake_package, "package")
    again = write_page(onnx_file, tmp_path / "page", onnxruntime_web=tmp_path / "package.tgz")
    assert again == (files, detections)


def test_the_image_that_checks_a_browser(tmp_path, onnx_file, fake_package, image_file):
    def expected(image):
        _, detections = write_page(onnx_file, tmp_path / "page", onnxruntime_web=fake_package, image=image)
        check = json.loads((tmp_path / "page/check.json").read_text())
        (found,) = Detector.load(onnx_file).detect([tmp_path / "page/check.png"])
        assert check["detections"] == json.loads(json.dumps(found.to_coco())) and detections == len(found) > 5
        return check, Image.open(tmp_path / "page/check.png").size

    (drawn, size), (named, named_size) = expected(None), expected(image_file)
    assert size == (320, 240) and named_size == (150, 200) and drawn["detections"] != named["detections"]
    least = Detector.load(onnx_file).preprocessing.min_size_px
    assert named["tolerance"]["box_px"] == pytest.approx(0.5 * max(150 / least, 1), rel=0.02)
    Image.new("RGB", (3000, 2000)).save(tmp_path / "large.png")
    for image, text in ((tmp_path / "large.png", "6.0 megapixels"), (onnx_file, "not an image|cannot")):
        with pytest.raises(UserError, match=text):
            write_page(onnx_file, tmp_path / "other", onnxruntime_web=fake_package, image=image)
    assert not (tmp_path / "other").exists()


def test_what_cannot_become_a_page(tmp_path, onnx_file, fake_package, monkeypatch):
    def refused(text, model=onnx_file, out=tmp_path / "page", package=fake_package):
        with pytest.raises(UserError, match=text):
            write_page(model, out, onnxruntime_web=package)
        assert not (tmp_path / "page").exists()

    refused("'.xml'", model=tmp_path / "model.xml")
    refused("a folder with other files", out=onnx_file.parent)
    refused("a file\n", out=onnx_file)
    (tmp_path / "package.tgz").write_bytes(b"no archive")
    refused("not a package of onnxruntime-web", package=tmp_path / "package.tgz")
    (fake_package / "dist" / "ort.wasm.min.mjs").write_text("changed")
    refused(rf"SHA-256 (.|\n)*onnxruntime-web {RUNTIME_VERSION}")
    (fake_package / "dist" / "ort.wasm.min.mjs").unlink()
    refused(r"no ort\.wasm\.min\.mjs in")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    refused(r"no npm(.|\n)*--onnxruntime-web", package=None)


# In the browser


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The npm package, fetched once."""
    folder = tmp_path_factory.mktemp("npm")
    try:
        return web._fetched(folder)
    except UserError as error:
        pytest.skip(error.found)


@pytest.fixture(scope="module")
def pages(tmp_path_factory, onnx_file, boxes_onnx_file, joint_onnx_file, package):
    folder = tmp_path_factory.mktemp("pages")
    for name, model in (("masks", onnx_file), ("boxes", boxes_onnx_file), ("poses", joint_onnx_file)):
        write_page(model, folder / name, onnxruntime_web=package)
    return folder


@pytest.fixture
def image_file(request, tmp_path):
    path = tmp_path / getattr(request, "param", "photo.png")
    Image.fromarray(shapes_image(np.random.default_rng(5), (200, 150))[0]).save(path, quality=90)
    return path


def detect(browser, path, lowest=0.0):
    """Detects on a file; returns the page's COCO results."""
    browser.wait("document.body.dataset.state === 'ready' || document.body.dataset.state === 'done'")
    browser.value(f"threshold.value = {lowest}; document.body.dataset.state = 'ready'")
    browser.choose_file("#file", path)
    browser.wait("['done', 'error'].includes(document.body.dataset.state)")
    assert browser.value("document.body.dataset.state") == "done", browser.value("error.textContent")
    return browser.value("maskrcnn.results()")


def assert_as_detected(results, found):
    """The tolerances are those of `verify` for another runtime."""
    expected = found.to_coco()
    assert len(results) == len(expected) > 5
    for result, wanted in zip(results, expected, strict=True):
        assert result["category_id"] == wanted["category_id"]
        assert result["score"] == pytest.approx(wanted["score"], abs=1e-3)
        np.testing.assert_allclose(result["bbox"], wanted["bbox"], rtol=0, atol=0.5)
        mask, wanted_mask = result["segmentation"], wanted["segmentation"]
        assert coco_mask.iou([mask], [wanted_mask], [False])[0, 0] >= 0.99 or coco_mask.area(wanted_mask) < 20
        if "keypoints" in wanted:
            np.testing.assert_allclose(result["keypoints"], wanted["keypoints"], rtol=0, atol=0.5)


@needs_browser
@pytest.mark.parametrize(
    ("name", "headers", "image_file"),
    [("masks", None, "photo.png"), ("masks", ISOLATED, "photo.jpg"), ("poses", None, "photo.jpg")],
    indirect=["image_file"],
)
def test_the_page_detects_as_the_detector(browser, pages, onnx_file, joint_onnx_file, image_file, name, headers):
    (found,) = Detector.load({"masks": onnx_file, "poses": joint_onnx_file}[name]).detect([image_file])
    with served(pages / name, headers) as address:
        browser.open(address)
        results = detect(browser, image_file)
        assert browser.value("crossOriginIsolated") == (headers is not None)
        assert_as_detected(results, found)
        assert not browser.errors
        assert {result["segmentation"]["counts"] for result in results} & {rle["counts"] for rle in found.rles()}


@pytest.fixture(scope="module")
def gpu_browser(tmp_path_factory):
    """Chromium with a software adapter for WebGPU, and one page."""
    if chromium.EXECUTABLE is None:
        pytest.skip("no Chromium")
    running = chromium.Browser(tmp_path_factory.mktemp("gpu-browser"), webgpu=True)
    yield running
    running.close()


def status(browser):
    browser.wait("['ready', 'done', 'error'].includes(document.body.dataset.state)", timeout_s=600)
    return browser.value("document.getElementById('status').textContent || error.textContent")


@pytest.mark.parametrize("name", ["masks", "poses"])
def test_webgpu_detects_as_the_detector(gpu_browser, pages, onnx_file, joint_onnx_file, image_file, name):
    (found,) = Detector.load({"masks": onnx_file, "poses": joint_onnx_file}[name]).detect([image_file])
    with served(pages / name) as address:
        gpu_browser.open(f"{address}?runtime=webgpu")
        text = status(gpu_browser)
        compared, expected = re.match(
            r"ready: WebGPU; (\d+) of (\d+) detections of the test image match", text
        ).groups()
        assert compared == expected and int(expected) > 5
        assert_as_detected(detect(gpu_browser, image_file), found)
        assert not gpu_browser.errors


def test_which_runtime_the_page_takes(browser, gpu_browser, pages, tmp_path):
    """WebGPU where a GPU computes it and the check passes; as the address says; else WebAssembly."""
    with served(pages / "masks") as address:
        gpu_browser.open(address)
        assert status(gpu_browser).startswith("ready: WebAssembly")  # the adapter is software
        browser.open(f"{address}?runtime=webgpu")
        text = status(browser)
        assert "WebGPU" in text and "fix:      choose WebAssembly" in text
        browser.value("runtime.value = 'wasm'; runtime.dispatchEvent(new Event('change'))")
        browser.wait("location.search === '?runtime=wasm' && document.body.dataset.state === 'ready'")
    real = "Object.defineProperty(GPUAdapterInfo.prototype, 'isFallbackAdapter', { get: () => false })"
    script = gpu_browser.call("Page.addScriptToEvaluateOnNewDocument", source=real)["identifier"]
    other = shutil.copytree(pages / "masks", tmp_path / "other")
    check = json.loads((other / "check.json").read_text())
    check["detections"][0]["score"] -= 0.01
    (other / "check.json").write_text(json.dumps(check))
    for folder, text in ((pages / "masks", "ready: WebGPU"), (other, "ready: WebAssembly")):
        with served(folder) as address:
            gpu_browser.open(address)
            shown = status(gpu_browser)
            assert shown.startswith(text) and ("; WebGPU not used: differs: " in shown) == (folder == other)
    gpu_browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


@needs_browser
@pytest.mark.parametrize("name", ["masks", "poses"])
def test_the_check_of_a_browser(browser, pages, name):
    check = json.loads((pages / name / "check.json").read_text())
    first = check["detections"][0]  # of a score far from the lowest

    def differs(change, detections=None):
        changed = json.loads(json.dumps(detections or check["detections"]))
        change(changed)
        results = json.dumps(changed)
        call = f"import('./detect.js').then(({{ compare }}) => compare({results}, {json.dumps(check)}))"
        return browser.value(call)

    def turned(detections):  # the mask of another object, in the place of this one's
        detections[0]["segmentation"] = next(
            each["segmentation"] for each in detections if coco_mask.iou([each["segmentation"]], [mask], [False]) < 0.5
        )

    def moved(key, offset, by):
        def change(detections):
            detections[0][key][offset] += by

        return change

    mask = first["segmentation"]
    with served(pages / name) as address:
        browser.open(address)
        browser.wait("document.body.dataset.state === 'ready'")
        browser.value("document.getElementById('check').click()")
        browser.wait("document.body.dataset.state === 'done'")
        assert re.match(r"(\d+) of \1 detections of the test image match ONNX Runtime \(boxes ≤ ", status(browser))
        same = differs(lambda detections: None)
        assert same == {"equal": True, "expected": same["found"], "found": len(check["detections"]), "others": 0} | {
            "boxPx": 0,
            "score": 0,
        }
        least = check["tolerance"]["box_px"]
        for wrong in (
            moved("bbox", 0, 1.1 * least),
            lambda detections: detections[0].update(score=first["score"] - 0.006),
            lambda detections: detections[0].update(category_id=first["category_id"] % 3 + 1),
            lambda detections: detections.pop(0),
            turned,
            lambda detections: detections[0].pop("segmentation"),
        ):
            assert not differs(wrong)["equal"]
        assert differs(lambda detections: detections.append({**first, "bbox": [0, 0, 5, 5]}))["others"] == 1
        assert differs(moved("bbox", 0, 0.9 * least))["equal"]
        lowest = differs(lambda detections: detections.pop())  # whose score is at the lower end
        assert lowest["equal"] and lowest["expected"] == len(check["detections"]) - 1
        if name == "poses":
            assert differs(moved("keypoints", 0, 5))["equal"]  # one of many points may lie elsewhere
            nowhere = [0] * len(first["keypoints"])
            assert not differs(lambda detections: detections[0].update(keypoints=nowhere))["equal"]


def saved(browser, name):
    """A file that the page saves, once it is whole."""
    for _ in range(100):
        if (browser.downloads / name).is_file():
            break
        browser.value("new Promise((resolve) => setTimeout(resolve, 100))")
    return browser.downloads / name


def assert_same_objects(data, results):
    """A converted dataset has the detections of the page, but for holes and what the simplified outlines change."""
    (image,) = data["images"]
    ids = {category["name"]: category["id"] for category in data["categories"]}
    has_masks = "segmentation" in results[0]

    def converted(annotation):
        if not has_masks:
            return annotation["bbox"]
        return coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], image["height"], image["width"]))

    def detected(found):
        if not has_masks:
            return found["bbox"]
        filled = ndimage.binary_fill_holes(coco_mask.decode(found["segmentation"]))
        return coco_mask.encode(np.asfortranarray(filled.astype(np.uint8)))

    large = [found for found in results if found["bbox"][2] * found["bbox"][3] > 200]
    assert 3 < len(large) <= len(data["annotations"]) <= len(results)
    for found in large:
        category = ids[CLASS_NAMES[found["category_id"] - 1]]
        ours = [converted(each) for each in data["annotations"] if each["category_id"] == category]
        both = [detected(found)], ours
        both = both if has_masks else map(np.array, both)  # pycocotools takes arrays of boxes
        assert coco_mask.iou(*both, [False] * len(ours)).max() >= 0.9


@needs_browser
@pytest.mark.parametrize("name", ["masks", "boxes"])
def test_a_file_for_labelme(browser, pages, image_file, tmp_path, name):
    with served(pages / name) as address:
        browser.open(address)
        results = detect(browser, image_file)
        assert browser.value("document.body.dataset.state") == "done" and not browser.errors
        browser.value("labelme.click()")
        path = saved(browser, "photo.json")
    content = json.loads(path.read_text())
    (tmp_path / "labelled").mkdir()
    for file in (path, image_file):  # LabelMe's files lie beside their images
        shutil.move(file, tmp_path / "labelled")
    assert_same_objects(whole("labelme", tmp_path / "labelled", tmp_path / "dataset")[0], results)
    assert (content["imagePath"], content["imageHeight"], content["imageWidth"]) == ("photo.png", 200, 150)
    names = json.loads((pages / name / "model.json").read_text())["class_names"]
    shapes = content["shapes"]
    if name == "boxes":
        assert [shape["label"] for shape in shapes] == [names[found["category_id"] - 1] for found in results]
        for shape, found in zip(shapes, results, strict=True):
            (x0, y0), (x1, y1) = shape["points"]
            assert shape["shape_type"] == "rectangle"
            np.testing.assert_allclose([x0, y0, x1 - x0, y1 - y0], found["bbox"], rtol=0, atol=1e-3)
        return
    compared = 0
    for found in results:
        mask = coco_mask.decode(found["segmentation"]).astype(bool)
        parts, count = ndimage.label(mask)  # 4-connected
        own, shapes = shapes[:count], shapes[count:]
        assert {shape["shape_type"] for shape in own} <= {"polygon"}
        assert {shape["label"] for shape in own} <= {names[found["category_id"] - 1]}
        assert len(own) == count and len({shape["group_id"] for shape in own}) <= 1
        for part, shape in enumerate(own, start=1):
            area = ndimage.binary_fill_holes(parts == part).sum()
            x, y = np.array(shape["points"]).T
            drawn = (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2
            assert abs(drawn - area) <= 0.05 * area + 0.5
            compared += 1
    assert compared > 5 and not shapes


@needs_browser
def test_the_camera_until_it_is_stopped_or_a_file_is_chosen(browser, pages, onnx_file, image_file, tmp_path):
    with served(pages / "masks") as address:
        browser.open(address)
        browser.wait("document.body.dataset.state === 'ready'")
        browser.value("threshold.value = 0; camera.click()")
        browser.wait("document.body.dataset.state === 'running' && rows.children.length > 5")
        browser.value("camera.click()")
        browser.wait("document.body.dataset.state === 'done'")
        size = browser.value("[canvas.width, canvas.height]")
        assert_as_detected(browser.value("maskrcnn.results()"), in_frame(browser, onnx_file, size))
        browser.value("camera.click()")
        browser.wait("document.body.dataset.state === 'running' && camera.textContent === 'Stop the camera'")
        browser.choose_file("#file", image_file)  # while a frame is in the model
        browser.wait("document.body.dataset.state === 'done'")
        browser.value("new Promise((resolve) => setTimeout(resolve, 300))")
        assert browser.value("camera.textContent") == "Use the camera"
        assert browser.value("document.getElementById('status').textContent") == "photo.png, 150 × 200 px"
        (found,) = Detector.load(onnx_file).detect([image_file])
        assert_as_detected(browser.value("maskrcnn.results()"), found)
        browser.value("navigator.mediaDevices.getUserMedia = () => Promise.reject(new Error('denied')); camera.click()")
        browser.wait("document.body.dataset.state === 'error'")
        assert "no camera (denied)" in browser.value("error.textContent") and not browser.value("camera.disabled")
        assert not browser.errors


def in_frame(browser, onnx_file, size):
    """What the detector finds in the image of the camera that the page saves for LabelMe."""
    browser.value("labelme.click()")
    content = json.loads(saved(browser, "camera.json").read_text())
    image = Image.open(io.BytesIO(base64.b64decode(content["imageData"]))).convert("RGB")
    assert list(image.size) == size and min(size) > 100
    (found,) = Detector.load(onnx_file).detect([np.asarray(image)])
    return found


@needs_browser
def test_filters_downloads_and_a_narrow_screen(browser, pages, image_file):
    with served(pages / "masks") as address:
        browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        browser.open(address)
        every = detect(browser, image_file)
        middle = sorted(result["score"] for result in every)[len(every) // 2]
        browser.value(f"threshold.value = {middle}; threshold.dispatchEvent(new Event('input'))")
        lowest = browser.value("Number(threshold.value)")
        left = browser.value("maskrcnn.results()")
        assert left == [result for result in every if result["score"] >= lowest] and 0 < len(left) < len(every)
        browser.value("classes.querySelector('input').click()")
        left = [result for result in left if result["category_id"] != 1]
        assert browser.value("maskrcnn.results()") == left
        assert browser.value("rows.children.length") == len(left)
        assert browser.value("document.documentElement.scrollWidth") <= 390
        browser.value("coco.click(); png.click()")
        assert json.loads(saved(browser, "photo.coco.json").read_text()) == left
        assert Image.open(saved(browser, "photo.png")).size == (150, 200)
        assert not browser.errors
        browser.call("Emulation.clearDeviceMetricsOverride")


@needs_browser
def test_errors_are_shown(browser, pages, tmp_path, image_file):
    def error_of(path):
        browser.value("document.body.dataset.state = 'ready'")
        browser.choose_file("#file", path)
        browser.wait("['done', 'error'].includes(document.body.dataset.state)")
        return browser.value("error.hidden ? '' : error.textContent")

    (tmp_path / "notes.txt").write_text("no image")
    Image.new("L", (10_000, 10_000)).save(tmp_path / "large.png")
    with served(pages / "masks") as address:
        browser.open(address)
        browser.wait("document.body.dataset.state === 'ready'")
        text = error_of(tmp_path / "notes.txt")
        assert "notes.txt is not an image" in text and "expected:" in text and "fix:" in text
        assert "large.png: 100 megapixels" in error_of(tmp_path / "large.png")
        assert error_of(image_file) == ""
    shutil.copytree(pages / "masks", tmp_path / "other")
    model = tmp_path / "other" / "model.json"
    model.write_text(model.read_text().replace('"contract": 1', '"contract": 2'))
    with served(tmp_path / "other") as address:
        browser.open(address)
        browser.wait("document.body.dataset.state === 'error'")
        assert "contract version 2" in browser.value("error.textContent")
