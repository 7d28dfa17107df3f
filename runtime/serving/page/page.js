// The page of `maskrcnn web`: a photo or the camera in, detections drawn on it out. Nothing leaves the browser.

import { UserError, checkModel, checkSize, cocoResults, compare, labelMe, networkInputs, unpack } from "./detect.js";

const RUNTIMES = {
  webgpu: { name: "WebGPU", module: "./ort.webgpu.min.mjs" },
  wasm: { name: "WebAssembly", module: "./ort.wasm.min.mjs" },
};

const POINT_SCORE = 2; // lowest score of a keypoint that is drawn, as imaging/draw.py
const OPACITY = 0.45; // of masks
const element = (id) => document.getElementById(id);
const canvas = element("canvas");
const context = canvas.getContext("2d", { willReadFrequently: true });

let model, session, ort;
let stream = null; // of the camera while it runs
let photo = null; // of the last detections: name, pixels, detections; isFrame: of the camera, in no file
let busy = false; // with a file
let turn = Promise.resolve(); // the end of the last call of the model, which takes one at a time

function show(state, text = "") {
  document.body.dataset.state = state; // loading, ready, running, done or error
  element("status").textContent = text;
}

function fail(error) {
  const parts = error instanceof UserError ? error : new UserError(String(error), "", "reload the page, or choose another runtime");
  show("error");
  element("error").hidden = false;
  element("error").textContent =
    `Error: ${parts.found}` + (parts.expected && `\n  expected: ${parts.expected}`) + `\n  fix:      ${parts.fix}`;
}

async function load() {
  show("loading", "loading the model …");
  model = await (await fetch("model.json")).json();
  checkModel(model);
  document.title = element("title").textContent = model.model;
  const asked = new URLSearchParams(location.search).get("runtime");
  const isAsked = Object.hasOwn(RUNTIMES, asked);
  let runtime = isAsked ? asked : (await hasGpu()) ? "webgpu" : "wasm";
  let note = "";
  element("runtime").value = runtime;
  element("runtime").disabled = false;
  if (runtime === "webgpu") {
    // The first call compiles the shaders, which takes long: the check is that call.
    try {
      await start("webgpu");
      show("loading", "checking WebGPU on the test image …");
      const checked = await check();
      note = inWords(checked);
      if (!checked.equal && !isAsked) throw new Error(note);
    } catch (error) {
      if (isAsked) throw new UserError(`WebGPU: ${error.message}`, "a browser with WebGPU", "choose WebAssembly");
      note = `WebGPU not used: ${error.message}`;
      await session?.release();
      runtime = "wasm";
    }
  }
  if (runtime === "wasm") await start("wasm");
  element("runtime").value = runtime;
  model.class_names.forEach((name, k) => {
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true, value: k + 1 });
    box.addEventListener("change", draw);
    const label = document.createElement("label");
    label.append(box, ` ${name}`);
    element("classes").append(label);
  });
  const threads = runtime === "wasm" ? `, ${ort.env.wasm.numThreads} thread(s)` : "";
  show("ready", `ready: ${RUNTIMES[runtime].name}${threads}${note && `; ${note}`}`);
  for (const id of ["file", "camera", "check"]) element(id).disabled = false;
}

/** Whether the browser offers WebGPU on a GPU; a software adapter is slower than WebAssembly. */
async function hasGpu() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
}

async function start(runtime) {
  session = null;
  ort = await import(RUNTIMES[runtime].module);
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 8) : 1;
  const options = { executionProviders: [runtime], logSeverityLevel: 3 }; // errors only: operators on the CPU are no fault
  session = await ort.InferenceSession.create("model.onnx", options);
}

/** Compares the detections in the test image with those of ONNX Runtime where the page was written. */
async function check() {
  const expected = await (await fetch("check.json")).json();
  const image = await createImageBitmap(await (await fetch("check.png")).blob(), { colorSpaceConversion: "none" });
  const { width, height } = image;
  const copy = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
  copy.drawImage(image, 0, 0);
  const detections = await inTurn(() => run(copy.getImageData(0, 0, width, height)));
  return compare(cocoResults(detections, height, width, model), expected);
}

function inWords({ equal, expected, found, others, boxPx, score }) {
  const size = `boxes ≤ ${boxPx.toPrecision(2)} px, scores ≤ ${score.toPrecision(2)}`;
  const more = others ? `, and ${others} other(s)` : "";
  return `${equal ? "" : "differs: "}${found} of ${expected} detections of the test image match ONNX Runtime (${size})${more}`;
}

/** Runs a call of the model after the calls before. */
function inTurn(call) {
  const done = turn.then(call);
  turn = done.catch(() => {});
  return done;
}

/** Detects in an image or a video frame, and draws what was found. */
function detect(...what) {
  return inTurn(() => detectNow(...what));
}

async function detectNow(source, width, height, name, isFrame = false) {
  const times = [["decoded", performance.now()]];
  const mark = (stage) => times.push([stage, performance.now()]);
  [canvas.width, canvas.height] = [width, height];
  context.drawImage(source, 0, 0);
  const pixels = context.getImageData(0, 0, width, height);
  photo = { name, isFrame, pixels, detections: await run(pixels, mark) };
  draw();
  mark("draw");
  element("timing").textContent = times
    .slice(1)
    .map(([stage, time], k) => `${stage} ${(time - times[k][1]).toFixed(0)} ms`)
    .join(", ");
}

/** The detections in the pixels of a canvas. */
async function run({ data, height, width }, mark = () => {}) {
  const { images, shape, size } = networkInputs(data, height, width, model.preprocessing);
  mark("resize");
  const results = await session.run({
    images: new ort.Tensor("float32", images, shape),
    image_sizes: new ort.Tensor("int64", BigInt64Array.from(size, BigInt), [1, 2]),
  });
  mark("network");
  const outputs = Object.fromEntries(Object.entries(results).map(([key, tensor]) => [key, tensor.data]));
  const detections = unpack(outputs, size, height, width, model);
  mark("masks");
  return detections;
}

async function detectFile(file) {
  if (busy || !file) return;
  busy = true;
  stopCamera();
  element("error").hidden = true;
  show("running", `detecting on ${file.name} …`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" }).catch(() => {
      throw new UserError(`${file.name} is not an image that this browser can read`, "JPEG, PNG, WebP, BMP or GIF", "choose another file");
    });
    checkSize(file.name, bitmap.width, bitmap.height);
    await detect(bitmap, bitmap.width, bitmap.height, file.name);
    show("done", `${file.name}, ${bitmap.width} × ${bitmap.height} px`);
  } catch (error) {
    fail(error);
  } finally {
    bitmap?.close();
    busy = false;
  }
}

async function startCamera() {
  if (stream) return stopCamera();
  const video = element("video");
  element("camera").disabled = true; // until the user has answered the browser's question
  let own;
  try {
    const allowed = navigator.mediaDevices ?? { getUserMedia: () => Promise.reject(new Error("the page is not secure")) };
    own = await allowed.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    return fail(new UserError(`no camera (${error.message})`, "a camera, allowed for this page", "allow it, over https or localhost"));
  } finally {
    element("camera").disabled = false;
  }
  stream = own;
  element("error").hidden = true;
  element("camera").textContent = "Stop the camera";
  try {
    video.srcObject = own;
    await video.play();
    while (stream === own) {
      if (!own.active || own.getVideoTracks().some((track) => track.readyState === "ended"))
        throw new UserError("the camera has stopped", "a connected camera", "connect it and start it again");
      show("running", "camera");
      await detect(video, video.videoWidth, video.videoHeight, "camera.png", true);
      await new Promise(requestAnimationFrame);
    }
    if (!busy && !stream) show("done", "camera");
  } catch (error) {
    if (stream !== own) return; // stopped by the user
    stopCamera();
    fail(error);
  }
}

function stopCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  element("camera").textContent = "Use the camera";
}

/** The pixels of the photo as a PNG file, in base64. */
function encoded() {
  const { width, height } = photo.pixels;
  const copy = Object.assign(document.createElement("canvas"), { width, height });
  copy.getContext("2d").putImageData(photo.pixels, 0, 0);
  return copy.toDataURL("image/png").split(",")[1];
}

/** Detections that pass the filters. */
function shown() {
  const lowest = Number(element("threshold").value);
  const labels = new Set([...element("classes").querySelectorAll(":checked")].map((box) => Number(box.value)));
  return photo ? photo.detections.filter((found) => found.score >= lowest && labels.has(found.label)) : [];
}

function colour(label) {
  const hue = ((label - 1) * 0.61803398875) % 1;
  const channel = (n) => {
    const k = (n + hue * 6) % 6;
    return Math.round(255 * (1 - 0.75 * Math.max(0, Math.min(k, 4 - k, 1))));
  };
  return [channel(5), channel(3), channel(1)];
}

function draw() {
  element("lowest").textContent = Number(element("threshold").value).toFixed(2);
  if (!photo) return;
  const { width, height } = photo.pixels;
  const found = shown();
  const image = new ImageData(new Uint8ClampedArray(photo.pixels.data), width, height);
  for (const { mask, label } of found.toReversed()) {
    const rgb = colour(label);
    for (let k = 0; mask && k < mask.pixels.length; k++) {
      if (!mask.pixels[k]) continue;
      const at = 4 * ((mask.y + Math.trunc(k / mask.width)) * width + mask.x + (k % mask.width));
      for (let c = 0; c < 3; c++) image.data[at + c] += OPACITY * (rgb[c] - image.data[at + c]);
    }
  }
  context.putImageData(image, 0, 0);
  const line = Math.max(1, Math.round(Math.max(width, height) / 400));
  context.lineWidth = line;
  context.font = `${6 * line + 6}px system-ui, sans-serif`;
  for (const detection of found.toReversed()) drawDetection(detection, line);
  element("rows").replaceChildren(
    ...found.map(({ name, score, box }) => {
      const row = document.createElement("tr");
      row.append(...[name, score.toFixed(3), box.map((side) => side.toFixed(0)).join(", ")].map((text) => {
        const cell = document.createElement("td");
        cell.textContent = text;
        return cell;
      }));
      return row;
    }),
  );
  for (const id of ["png", "coco", "labelme"]) element(id).disabled = false;
}

function drawDetection({ box: [x0, y0, x1, y1], label, name, score, keypoints }, line) {
  context.strokeStyle = context.fillStyle = `rgb(${colour(label)})`;
  context.strokeRect(x0, y0, x1 - x0, y1 - y0);
  const text = `${name} ${score.toFixed(2)}`;
  const size = 6 * line + 6;
  const top = Math.max(y0 - size - 2, 0);
  context.fillRect(x0, top, context.measureText(text).width + 4, size + 2);
  context.fillStyle = "black";
  context.fillText(text, x0 + 2, top + size - 2);
  if (!keypoints) return;
  for (const [a, b] of model.keypoint_skeleton) {
    const [from, to] = [keypoints[a - 1], keypoints[b - 1]];
    if (Math.min(from[2], to[2]) < POINT_SCORE) continue;
    context.beginPath();
    context.moveTo(from[0], from[1]);
    context.lineTo(to[0], to[1]);
    context.stroke();
  }
  context.fillStyle = "white";
  for (const [x, y, strength] of keypoints) {
    if (strength < POINT_SCORE) continue;
    context.beginPath();
    context.arc(x, y, 2 * line, 0, 7);
    context.fill();
  }
}

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** COCO results of the detections shown. */
function results() {
  return cocoResults(shown(), photo.pixels.height, photo.pixels.width, model);
}
globalThis.maskrcnn = { results };

const stem = () => photo.name.replace(/\.[^.]*$/, "");
element("file").addEventListener("change", ({ target }) => {
  detectFile(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
});
element("camera").addEventListener("click", startCamera);
element("runtime").addEventListener("change", ({ target }) => (location.search = `runtime=${target.value}`));
element("check").addEventListener("click", async () => {
  if (busy) return;
  busy = true;
  stopCamera();
  element("error").hidden = true;
  show("running", "checking the test image …");
  try {
    show("done", inWords(await check()));
  } catch (error) {
    fail(error);
  } finally {
    busy = false;
  }
});
element("threshold").addEventListener("input", draw);
element("png").addEventListener("click", () => canvas.toBlob((blob) => save(blob, `${stem()}.png`)));
const saveJson = (content, name) => save(new Blob([JSON.stringify(content)], { type: "application/json" }), name);
element("coco").addEventListener("click", () => saveJson(results(), `${stem()}.coco.json`));
element("labelme").addEventListener("click", () => {
  const { width, height } = photo.pixels;
  const image = photo.isFrame ? encoded() : null;
  saveJson(labelMe(shown(), height, width, photo.name, image), `${stem()}.json`); // the name that LabelMe looks for
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (session) detectFile(event.dataTransfer.files[0]);
});
load().catch(fail);
