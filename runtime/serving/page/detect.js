// Preprocessing and postprocessing of `maskrcnn.imaging` for one image, without the page: plain functions on arrays.
// Sources: imaging/preprocess.py, imaging/postprocess.py, imaging/paste.py, imaging/run_lengths.py.

export const CONTRACT = 1; // metadata.py
export const MAX_PIXELS = 64_000_000; // of a photo: its pixels and their copies take 16 bytes each
const PADDING = 1; // zeros around a mask before pasting

/** An error in three parts: what was found, what was expected, how to fix it. */
export class UserError extends Error {
  constructor(found, expected, fix) {
    super(`${found}\nexpected: ${expected}\nfix: ${fix}`);
    Object.assign(this, { found, expected, fix });
  }
}

/** Checks that the metadata of a model are of the contract that this code implements. */
export function checkModel(model) {
  if (model.contract !== CONTRACT) {
    throw new UserError(
      `model.json: contract version ${model.contract}`,
      `version ${CONTRACT}`,
      "write the page again with the version of maskrcnn that exported the model",
    );
  }
}

/** Checks the size of a photo before its pixels are copied. */
export function checkSize(name, width, height) {
  if (width * height > MAX_PIXELS) {
    throw new UserError(
      `${name}: ${Math.round((width * height) / 1e6)} megapixels`,
      `at most ${MAX_PIXELS / 1e6} megapixels`,
      "reduce the photo first; the model sees a far smaller one",
    );
  }
}

/** Height and width of an image after resizing, in pixels. */
export function resizedSize(height, width, preprocessing) {
  const { min_size_px: least, max_size_px: most } = preprocessing;
  const scale = Math.min(least / Math.min(height, width), most / Math.max(height, width));
  return [height, width].map((side) => Math.max(Math.trunc(side * scale), 1));
}

/** Taps of linear interpolation from `sizeIn` to `sizeOut` pixels, for output pixels `start` to `stop`. */
function linearTaps(sizeIn, sizeOut, start = 0, stop = sizeOut) {
  const count = stop - start;
  const taps = { low: new Int32Array(count), high: new Int32Array(count), weight: new Float32Array(count) };
  const scale = Math.fround(sizeIn / sizeOut);
  for (let k = 0; k < count; k++) {
    const position = Math.max(Math.fround((start + k + 0.5) * scale - 0.5), 0);
    const low = Math.min(Math.trunc(position), sizeIn - 1);
    taps.low[k] = low;
    taps.high[k] = Math.min(low + 1, sizeIn - 1);
    taps.weight[k] = Math.min(Math.max(position - low, 0), 1);
  }
  return taps;
}

/**
 * The network's inputs for one image: resized by linear interpolation, padded with zeros to a multiple of the divisor.
 *
 * rgba: pixels as a canvas gives them, `[height, width, 4]` of 0–255.
 */
export function networkInputs(rgba, height, width, preprocessing) {
  const [h, w] = resizedSize(height, width, preprocessing);
  const divisor = preprocessing.divisor;
  const [paddedH, paddedW] = [h, w].map((side) => Math.ceil(side / divisor) * divisor);
  const images = new Float32Array(3 * paddedH * paddedW);
  const rows = linearTaps(height, h);
  const columns = linearTaps(width, w);
  const channels = preprocessing.channel_order === "BGR" ? [2, 1, 0] : [0, 1, 2];
  for (let y = 0; y < h; y++) {
    const top = rows.low[y] * width;
    const bottom = rows.high[y] * width;
    const weightY = rows.weight[y];
    for (let x = 0; x < w; x++) {
      const left = columns.low[x];
      const right = columns.high[x];
      const weightX = columns.weight[x];
      for (let c = 0; c < 3; c++) {
        const at = (pixel) => rgba[4 * pixel + channels[c]];
        const upper = at(top + left) + weightX * (at(top + right) - at(top + left));
        const lower = at(bottom + left) + weightX * (at(bottom + right) - at(bottom + left));
        images[(c * paddedH + y) * paddedW + x] = upper + weightY * (lower - upper);
      }
    }
  }
  return { images, shape: [1, 3, paddedH, paddedW], size: [h, w] };
}

/**
 * Detections in pixels of the original image, by descending score.
 *
 * outputs: data of the network's outputs for one image, by name; size: height and width of the resized image.
 */
export function unpack(outputs, size, height, width, model) {
  const ratioY = Math.fround(height / size[0]);
  const ratioX = Math.fround(width / size[1]);
  const points = model.keypoint_names.length;
  const side = outputs.masks && Math.sqrt(outputs.masks.length / outputs.scores.length);
  return Array.from({ length: outputs.num_detections[0] }, (_, k) => {
    const box = Array.from(outputs.boxes.subarray(4 * k, 4 * k + 4), (v, n) => Math.fround(v * (n % 2 ? ratioY : ratioX)));
    const label = Number(outputs.labels[k]);
    const found = { box, label, name: model.class_names[label - 1], score: outputs.scores[k] };
    if (outputs.masks) {
      found.mask = pastedMask(outputs.masks.subarray(k * side * side, (k + 1) * side * side), side, box, height, width);
    }
    if (points) {
      const values = outputs.keypoints.subarray(3 * points * k, 3 * points * (k + 1));
      found.keypoints = Array.from({ length: points }, (_, n) => [
        Math.fround(values[3 * n] * ratioX),
        Math.fround(values[3 * n + 1] * ratioY),
        values[3 * n + 2],
      ]);
    }
    return found;
  });
}

/** Pastes a mask `[side, side]` of probabilities: the part of its box inside the image, 1 where it exceeds one half. */
export function pastedMask(mask, side, box, height, width) {
  const padded = side + 2 * PADDING;
  const [x0, y0, x1, y1] = box;
  const grown = (low, high) => {
    const half = Math.fround(Math.fround(Math.fround(high - low) * 0.5) * Math.fround(padded / side));
    const centre = Math.fround(Math.fround(high + low) * 0.5);
    return [Math.trunc(Math.fround(centre - half)), Math.trunc(Math.fround(centre + half))];
  };
  const [firstX, lastX] = grown(x0, x1);
  const [firstY, lastY] = grown(y0, y1);
  const [x, y] = [Math.max(firstX, 0), Math.max(firstY, 0)];
  const [w, h] = [Math.min(lastX + 1, width) - x, Math.min(lastY + 1, height) - y];
  if (!(w > 0 && h > 0)) return { x: 0, y: 0, width: 0, height: 0, pixels: new Uint8Array(0) };
  const taps = (first, last, start, count) =>
    linearTaps(padded, Math.max(last - first + 1, 1), start - first, start - first + count);
  const columns = taps(firstX, lastX, x, w);
  const rows = taps(firstY, lastY, y, h);
  const at = (row, column) =>
    row < PADDING || row > side || column < PADDING || column > side ? 0 : mask[(row - PADDING) * side + column - PADDING];
  // Columns first, each operation rounded to single precision, as imaging/paste.py.
  const mixed = (a, b, weight) => Math.fround(a + Math.fround(weight * Math.fround(b - a)));
  const lines = new Float32Array(padded * w);
  for (let row = 0; row < padded; row++) {
    for (let k = 0; k < w; k++) {
      lines[row * w + k] = mixed(at(row, columns.low[k]), at(row, columns.high[k]), columns.weight[k]);
    }
  }
  const pixels = new Uint8Array(w * h);
  for (let j = 0; j < h; j++) {
    for (let k = 0; k < w; k++) {
      pixels[j * w + k] = mixed(lines[rows.low[j] * w + k], lines[rows.high[j] * w + k], rows.weight[j]) > 0.5;
    }
  }
  return { x, y, width: w, height: h, pixels };
}

/** COCO's compressed run lengths of a pasted mask in an image: down the columns, starting with background. */
export function runLengths(mask, height, width) {
  const runs = [];
  let [value, run] = [0, 0];
  const add = (pixel, count) => {
    if (pixel !== value && count) {
      runs.push(run);
      [value, run] = [pixel, 0];
    }
    run += count;
  };
  add(0, mask.x * height);
  for (let k = 0; k < mask.width; k++) {
    add(0, mask.y);
    for (let j = 0; j < mask.height; j++) add(mask.pixels[j * mask.width + k], 1);
    add(0, height - mask.y - mask.height);
  }
  add(0, (width - mask.x - mask.width) * height);
  return coded([...runs, run]);
}

/** Runs as COCO's string: differences to the run before the previous one, five bits a character. */
function coded(runs) {
  let text = "";
  runs.forEach((run, k) => {
    let rest = k > 2 ? run - runs[k - 2] : run;
    for (let more = true; more; ) {
      const low = rest & 31;
      rest >>= 5;
      more = rest !== (low & 16 ? -1 : 0);
      text += String.fromCharCode(48 + low + (more ? 32 : 0));
    }
  });
  return text;
}

/** Detections in COCO's results format. */
export function cocoResults(detections, height, width, model, imageId = 0) {
  return detections.map(({ box: [x0, y0, x1, y1], label, score, mask, keypoints }) => ({
    image_id: imageId,
    category_id: model.category_ids[label - 1],
    bbox: [x0, y0, x1 - x0, y1 - y0],
    score,
    ...(mask && { segmentation: { size: [height, width], counts: runLengths(mask, height, width) } }),
    ...(keypoints && {
      keypoints: keypoints.flatMap(([x, y]) => [x, y, 1]),
      keypoint_scores: keypoints.map((point) => point[2]),
    }),
  }));
}

const OUTLINE_TOLERANCE_PX = 0.5; // largest distance of an outline from the edge of its mask
const OUTLINE_AREA_SHARE = 0.04; // of a part that simplifying may change; small parts get a smaller tolerance

/**
 * Outlines of a pasted mask in pixels of the image, one closed ring of [x, y] per 4-connected part; holes are left out.
 *
 * The edges between pixels are followed clockwise, and the ring joins their middles, which takes half a pixel off the
 * area of every part. Then it is simplified (Douglas and Peucker, 1973).
 */
export function outlines({ x: left, y: top, width, height, pixels }) {
  const at = (x, y) => x >= 0 && y >= 0 && x < width && y < height && pixels[y * width + x] === 1;
  const steps = [[1, 0], [0, 1], [-1, 0], [0, -1]]; // right, down, left, up
  const sides = [[0, 0], [-1, 0], [-1, -1], [0, -1]]; // the pixel at the right hand of an edge from a corner
  const isEdge = (x, y, turn) => {
    const [inside, outside] = [sides[turn], sides[(turn + 3) % 4]];
    return at(x + inside[0], y + inside[1]) && !at(x + outside[0], y + outside[1]);
  };
  const seen = new Uint8Array(width * height); // pixels whose upper edge lies on a ring
  const rings = [];
  for (let start = 0; start < seen.length; start++) {
    const [x0, y0] = [start % width, Math.trunc(start / width)];
    if (seen[start] || !isEdge(x0, y0, 0)) continue;
    const ring = [];
    let [x, y, turn, area] = [x0, y0, 0, 0];
    do {
      if (turn === 0) seen[y * width + x] = 1;
      const [dx, dy] = steps[turn];
      ring.push([left + x + dx / 2, top + y + dy / 2]);
      area += x * dy;
      [x, y] = [x + dx, y + dy];
      turn = [1, 0, 3].map((change) => (turn + change) % 4).find((next) => isEdge(x, y, next));
    } while (x !== x0 || y !== y0 || turn !== 0);
    if (area <= 0) continue; // a hole, which is followed counterclockwise
    rings.push(simplified(ring, Math.min(OUTLINE_TOLERANCE_PX, (OUTLINE_AREA_SHARE * area) / ring.length)));
  }
  return rings;
}

/** The points of a closed ring without those that lie within a tolerance of the line between points that stay. */
function simplified(ring, tolerance) {
  const distance = ([x, y], [x0, y0], [x1, y1]) => {
    const [dx, dy] = [x1 - x0, y1 - y0];
    const along = Math.min(Math.max(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy || 1), 0), 1);
    return Math.hypot(x - x0 - along * dx, y - y0 - along * dy);
  };
  const closed = [...ring, ring[0]];
  const stays = new Set([0]);
  const open = [[0, ring.length]];
  while (open.length) {
    const [first, last] = open.pop();
    let [farthest, most] = [0, tolerance];
    for (let k = first + 1; k < last; k++) {
      const far = distance(closed[k], closed[first], closed[last]);
      if (far > most) [farthest, most] = [k, far];
    }
    if (!farthest) continue;
    stays.add(farthest);
    open.push([first, farthest], [farthest, last]);
  }
  return ring.filter((_, k) => stays.has(k));
}

/**
 * Detections as a file of LabelMe for the photo beside it: outlines of the masks, or the boxes of a model without masks.
 * The parts of one object share a `group_id`. A mask without pixels has no shape.
 */
export function labelMe(detections, height, width, imageName, imageData = null) {
  const shapes = detections.flatMap(({ box: [x0, y0, x1, y1], name, score, mask }, k) => {
    const parts = mask ? outlines(mask) : [[[x0, y0], [x1, y1]]];
    return parts.map((points) => ({
      label: name,
      points,
      group_id: parts.length > 1 ? k + 1 : null,
      description: `score ${score.toFixed(3)}`,
      shape_type: mask ? "polygon" : "rectangle",
      flags: {},
    }));
  });
  const head = { version: "5.4.1", flags: {}, shapes, imagePath: imageName, imageData };
  return { ...head, imageHeight: height, imageWidth: width };
}

/** Pixels of COCO's compressed run lengths, `[width, height]` of 0 and 1: the inverse of `runLengths`. */
function decoded({ counts, size: [height, width] }) {
  const pixels = new Uint8Array(height * width);
  const runs = [];
  let [at, position] = [0, 0];
  while (position < counts.length) {
    let [run, bits, code] = [0, 0, 0];
    do {
      code = counts.charCodeAt(position++) - 48;
      run |= (code & 31) << bits;
      bits += 5;
    } while (code & 32);
    if (code & 16) run |= -1 << bits;
    if (runs.length > 2) run += runs[runs.length - 2];
    if (runs.length % 2) pixels.fill(1, at, at + run);
    at += run;
    runs.push(run);
  }
  return pixels;
}

/**
 * Compares detections of an image with those expected, both COCO results in descending order of score.
 *
 * As verification/compare.py: each expected one takes the best overlap of its class that is left. Scores at the lower
 * end need no partner.
 *
 * check: content of check.json.
 *
 * Returns `{ equal, expected, found, others, boxPx, score }`: whether all are within the tolerance, how many were expected
 * and found so, how many others were found, and the largest differences of those that were expected.
 */
export function compare(results, { detections, tolerance }) {
  const left = new Set(results);
  const difference = { found: 0, boxPx: 0, score: 0 };
  const lowest = Math.min(...detections.map(({ score }) => score), ...results.map(({ score }) => score));
  const isExcused = ({ score }) => score <= lowest + tolerance.score;
  let [excused, departing] = [0, 0];
  for (const expected of detections) {
    const overlap = (result) => (result.category_id === expected.category_id ? boxIou(result.bbox, expected.bbox) : -1);
    const best = [...left].reduce((a, b) => (a && overlap(a) >= overlap(b) ? a : b), null);
    if (!best || !(overlap(best) >= tolerance.min_iou)) {
      if (isExcused(expected)) excused++;
      else departing++;
      continue;
    }
    left.delete(best);
    const boxPx = Math.max(...corners(best.bbox).map((side, k) => Math.abs(side - corners(expected.bbox)[k])));
    const score = Math.abs(best.score - expected.score);
    const near = boxPx <= tolerance.box_px && score <= tolerance.score;
    if (near && areMasksNear(best, expected, tolerance) && arePointsNear(best, expected, tolerance)) {
      difference.found++;
      difference.boxPx = Math.max(difference.boxPx, boxPx);
      difference.score = Math.max(difference.score, score);
    } else departing++;
  }
  const others = [...left].filter((result) => !isExcused(result)).length;
  const equal = departing + others <= tolerance.departing_share * detections.length;
  return { equal, expected: detections.length - excused, others, ...difference };
}

const corners = ([x, y, width, height]) => [x, y, x + width, y + height];

function boxIou(first, second) {
  const [a, b] = [corners(first), corners(second)];
  const side = (k) => Math.max(Math.min(a[k + 2], b[k + 2]) - Math.max(a[k], b[k]), 0);
  const both = side(0) * side(1);
  return both / Math.max(first[2] * first[3] + second[2] * second[3] - both, 1e-9);
}

/** Masks may differ along the outline by the tolerance of the box, and elsewhere by that of the probabilities. */
function areMasksNear({ segmentation }, { bbox, segmentation: expected }, tolerance) {
  if (!expected) return !segmentation;
  if (!segmentation || String(segmentation.size) !== String(expected.size)) return false;
  const [pixels, wanted] = [decoded(segmentation), decoded(expected)];
  let different = 0;
  for (let k = 0; k < pixels.length; k++) different += pixels[k] !== wanted[k];
  const [, , width, height] = bbox;
  return different <= tolerance.box_px * 2 * (width + height) + tolerance.mask_mean * width * height;
}

function arePointsNear({ keypoints = [] }, { keypoints: expected = [] }, tolerance) {
  const far = expected.filter((value, k) => !(Math.abs(value - keypoints[k]) <= tolerance.keypoint_px)).length;
  return keypoints.length === expected.length && far <= 2 * Math.ceil((tolerance.keypoint_share * expected.length) / 3);
}
