// Pastes masks into the image as bits. Interface: kernels.h; design: README.md.

#ifndef MASKRCNN_MASK_PASTE_KERNEL_CUH
#define MASKRCNN_MASK_PASTE_KERNEL_CUH

#include "../device.h"
#include "../linear.h"

namespace maskrcnn {

// One axis of a mask's box with a border of one mask pixel of zeros, in integer image pixels, both ends included.
struct Span {
    int first, last;
};

// torchvision's paste_masks_in_image with its float32 arithmetic; a span with NaN is empty.
__host__ __device__ inline Span span_of(float low, float high, int mask_size) {
    float scale = quotient(float(mask_size + 2), float(mask_size));
    float half = product(product(high - low, 0.5f), scale), centre = product(high + low, 0.5f);
    float from = centre - half, to = centre + half;
    if (!(fabsf(from) < 1e9f && fabsf(to) < 1e9f)) return {0, -2};
    return {int(from), int(to)};
}

// Memory order of a mask relative to the lines of bits.
struct MaskFrame {
    int size;            // S
    int along, across;   // stride between mask pixels along a line of bits, and between lines
};

// A pixel of the mask with its border of zeros.
template <class T>
__device__ inline float padded(const T *mask, const MaskFrame &frame, int line, int place) {
    bool is_inside = line > 0 && line <= frame.size && place > 0 && place <= frame.size;
    return is_inside ? to_float(mask[(line - 1) * frame.across + (place - 1) * frame.along]) : 0.f;
}

__device__ inline float mix(float low, float high, float weight) {
    return product(low, 1.f - weight) + product(high, weight);
}

constexpr int kPasteThreads = 256, kPasteWarps = kPasteThreads / kWarp;

// One warp: 32 words of a line of bits. `line`: the row of the image (by_columns: its column); `length`: pixels of a
// line; `across`, `along`: the spans of the box over the lines and over the pixels of a line.
template <class T>
__device__ inline void paste_words(const T *mask, const MaskFrame &frame, Span across, Span along, int line, int length,
                                   int first_word, int words, float threshold, uint32_t *bits) {
    int lane = threadIdx.x % kWarp, size = frame.size + 2;
    uint32_t mine = 0;
    if (line >= across.first && line <= across.last && along.first <= along.last) {
        Lerp of_line = lerp_at(line - across.first, size, across.last - across.first + 1);
        auto blend = [&](int place) {
            return mix(padded(mask, frame, of_line.low, place), padded(mask, frame, of_line.high, place),
                       of_line.weight);
        };
        // A mask of up to 30 pixels: each lane holds one value of the interpolated line.
        float held = size <= kWarp && lane < size ? blend(lane) : 0.f;
        int from = along.first > 0 ? along.first / kWarp : 0;
        int to = along.last < length ? along.last / kWarp : words - 1;
        if (from < first_word) from = first_word;
        if (to > first_word + kWarp - 1) to = first_word + kWarp - 1;
        for (int word = from; word <= to; word++) {
            int pixel = word * kWarp + lane;
            Lerp of_pixel = lerp_at(pixel - along.first, size, along.last - along.first + 1);
            float low = __shfl_sync(kAllLanes, held, of_pixel.low % kWarp);
            float high = __shfl_sync(kAllLanes, held, of_pixel.high % kWarp);
            bool is_inside = pixel >= along.first && pixel <= along.last && pixel < length;
            if (size > kWarp && is_inside) low = blend(of_pixel.low), high = blend(of_pixel.high);
            uint32_t set = __ballot_sync(kAllLanes, is_inside && mix(low, high, of_pixel.weight) > threshold);
            if (lane == word - first_word) mine = set;
        }
    }
    if (first_word + lane < words) bits[first_word + lane] = mine;
}

}  // namespace maskrcnn

#endif
