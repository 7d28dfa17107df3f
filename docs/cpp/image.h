// Reads PPM images, and resizes and pads them as maskrcnn/imaging/preprocess.py does.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace maskrcnn {

struct Size {
    int height, width;
};

// Row-major RGB pixels, 8 bits.
struct Image {
    Size size;
    std::vector<uint8_t> pixels;
};

// Reads a binary PPM file (`P6`, 8 bits). Comments are skipped.
inline Image read_ppm(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + " cannot be opened");
    auto word = [&] {
        std::string text;
        while (file >> text && text[0] == '#') file.ignore(1 << 16, '\n');
        return text;
    };
    auto number = [&] { return std::atoi(word().c_str()); };
    bool is_ppm = word() == "P6";
    int width = number(), height = number(), largest = number();
    if (!is_ppm || width < 1 || height < 1 || width > 65535 || height > 65535 || largest != 255) {
        throw std::runtime_error(path + " is not a binary PPM file of 8 bits (convert it: magick photo.jpg photo.ppm)");
    }
    file.ignore(1);  // the white space that ends the header
    Image image{{height, width}, std::vector<uint8_t>(size_t(height) * width * 3)};
    file.read(reinterpret_cast<char *>(image.pixels.data()), std::streamsize(image.pixels.size()));
    if (!file) throw std::runtime_error(path + " ends before its last pixel");
    return image;
}

// Image size after resizing: shorter side `shorter`, longer side at most `longest`, px.
inline Size resized_size(Size image, int shorter, int longest) {
    double scale = std::min(double(shorter) / std::min(image.height, image.width),
                            double(longest) / std::max(image.height, image.width));
    auto scaled = [&](int side) { return std::max(int(side * scale), 1); };
    return {scaled(image.height), scaled(image.width)};
}

inline Size padded_size(Size size, int divisor) {
    auto up = [&](int side) { return (side + divisor - 1) / divisor * divisor; };
    return {up(size.height), up(size.width)};
}

// Source pixels and weight of linear interpolation along one axis; pixel centres are at half-integers.
struct Taps {
    int low, high;
    float weight;  // of `high`
};

// The taps of output pixels `start` to `stop`, when `in` pixels are resized to `out`.
inline std::vector<Taps> linear_taps(int in, int out, int start, int stop) {
    std::vector<Taps> taps;
    float scale = float(in) / float(out);
    for (int j = start; j < stop; ++j) {
        // In double, so that rounding happens once, after the subtraction.
        float position = std::max(float(double(float(j) + 0.5f) * double(scale) - 0.5), 0.0f);
        int low = std::min(int(position), in - 1);
        taps.push_back({low, std::min(low + 1, in - 1), std::clamp(position - float(low), 0.0f, 1.0f)});
    }
    return taps;
}

inline float mix(float low, float high, float weight) { return low + weight * (high - low); }

// The detector's input [3, H, W]: float32, 0 to 255, resized without antialiasing, zero-padded right and bottom.
inline std::vector<float> network_input(const Image &image, Size resized, Size padded) {
    std::vector<float> input(size_t(3) * padded.height * padded.width);
    auto rows = linear_taps(image.size.height, resized.height, 0, resized.height);
    auto columns = linear_taps(image.size.width, resized.width, 0, resized.width);
    auto at = [&](int y, int x, int channel) {
        return float(image.pixels[(size_t(y) * image.size.width + x) * 3 + channel]);
    };
    for (int channel = 0; channel < 3; ++channel) {
        for (int y = 0; y < resized.height; ++y) {
            const Taps &row = rows[size_t(y)];
            float *out = &input[(size_t(channel) * padded.height + y) * padded.width];
            for (int x = 0; x < resized.width; ++x) {
                const Taps &column = columns[size_t(x)];
                auto across = [&](int source) {  // vertically first, as in the NumPy version
                    return mix(at(row.low, source, channel), at(row.high, source, channel), row.weight);
                };
                out[x] = mix(across(column.low), across(column.high), column.weight);
            }
        }
    }
    return input;
}

}  // namespace maskrcnn
