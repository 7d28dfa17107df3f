// Pastes masks into the image as maskrcnn/imaging/paste.py does, and writes them as PGM files.

#pragma once

#include <cstdio>

#include "image.h"

namespace maskrcnn {

constexpr float kMaskThreshold = 0.5f;  // of `Detections.full_masks`; pixels above it belong to the object
constexpr int kBorder = 1;              // pixels of zeros around a mask before it is pasted

// Pixels of the image; pixel j covers [j, j + 1].
struct Box {
    float left, top, right, bottom;
};

// The image pixels that a mask covers along one axis, and the taps of each in the mask with its border.
struct Extent {
    int first;
    std::vector<Taps> taps;
};

// The box is enlarged like the mask by its border and truncated to whole pixels. Only the part inside the image is
// kept: nothing for a box outside the image or an invalid box.
inline Extent extent_of(float low, float high, int side, int limit) {
    float half = (high - low) * 0.5f * float(double(side + 2 * kBorder) / side), centre = (high + low) * 0.5f;
    float from = centre - half, to = centre + half;
    if (!(std::abs(from) < 1e9f && std::abs(to) < 1e9f)) return {0, {}};  // exceeds int, or NaN
    int first = int(from), last = int(to);
    int start = std::max(first, 0), stop = std::min(last + 1, limit);
    if (start >= stop) return {0, {}};
    return {start, linear_taps(side + 2 * kBorder, last - first + 1, start - first, stop - first)};
}

// Detection number of each pixel, row-major; 0 is background.
struct NumberedPixels {
    Size size;
    std::vector<uint16_t> pixels;
};

// Sets `number` at the pixels of a mask of side x side probabilities that no earlier mask covers.
inline void paste_mask(const float *mask, int side, const Box &box, uint16_t number, NumberedPixels &image) {
    Extent columns = extent_of(box.left, box.right, side, image.size.width);
    Extent rows = extent_of(box.top, box.bottom, side, image.size.height);
    size_t width = columns.taps.size();
    // Horizontally first, as in the NumPy version: each mask row is resized to the box's width. The border is zero.
    std::vector<float> lines(size_t(side + 2 * kBorder) * width);
    for (int row = 0; row < side; ++row) {
        auto at = [&](int place) {
            return place < kBorder || place >= side + kBorder ? 0.0f : mask[row * side + place - kBorder];
        };
        for (size_t x = 0; x < width; ++x) {
            const Taps &column = columns.taps[x];
            lines[size_t(row + kBorder) * width + x] = mix(at(column.low), at(column.high), column.weight);
        }
    }
    for (size_t y = 0; y < rows.taps.size(); ++y) {
        const Taps &row = rows.taps[y];
        const float *upper = lines.data() + size_t(row.low) * width, *lower = lines.data() + size_t(row.high) * width;
        uint16_t *out = image.pixels.data() + (size_t(rows.first) + y) * image.size.width + columns.first;
        for (size_t x = 0; x < width; ++x) {
            if (out[x] == 0 && mix(upper[x], lower[x], row.weight) > kMaskThreshold) out[x] = number;
        }
    }
}

// Writes a binary PGM file: one byte per pixel, or two (big-endian) if `largest` exceeds 255. The file gets its name
// when it is complete.
inline void write_pgm(const std::string &path, const NumberedPixels &image, int largest) {
    bool is_wide = largest > 255;
    std::string bytes = "P5\n" + std::to_string(image.size.width) + " " + std::to_string(image.size.height) + "\n" +
                        (is_wide ? "65535" : "255") + "\n";
    for (uint16_t pixel : image.pixels) {
        if (is_wide) bytes += char(pixel >> 8);
        bytes += char(pixel & 255);
    }
    std::string part = path + ".part";
    std::ofstream file(part, std::ios::binary);
    if (!file) throw std::runtime_error(path + " cannot be written");
    file << bytes;
    file.close();
    if (!file || std::rename(part.c_str(), path.c_str()) != 0) {
        std::remove(part.c_str());
        throw std::runtime_error(path + " cannot be written");
    }
}

}  // namespace maskrcnn
