// Resizes an image, converts it to planes and pads it. Interface: kernels.h.

#ifndef MASKRCNN_RESIZE_PAD_KERNEL_CUH
#define MASKRCNN_RESIZE_PAD_KERNEL_CUH

#include "../device.h"
#include "../linear.h"

namespace maskrcnn {

__host__ __device__ inline float between(float low, float high, float weight) {
    return low + product(high - low, weight);
}

struct Size {
    int height, width;
};

constexpr int kColors = 3;

// One pixel of the padded result in all three channels; neighbouring threads write neighbouring pixels of each plane.
__device__ inline void resize_pixel(const uint8_t *image, Size size, Size resized, Size padded, bool swaps, int y, int x,
                                    float *planes) {
    int64_t area = int64_t(padded.height) * padded.width;
    float *to = planes + int64_t(y) * padded.width + x;
    if (y >= resized.height || x >= resized.width) {
        for (int color = 0; color < kColors; color++) to[color * area] = 0.f;
        return;
    }
    Lerp row = lerp_at(y, size.height, resized.height), column = lerp_at(x, size.width, resized.width);
    const uint8_t *upper = image + int64_t(row.low) * size.width * kColors;
    const uint8_t *lower = image + int64_t(row.high) * size.width * kColors;
    for (int color = 0; color < kColors; color++) {
        int left = column.low * kColors + color, right = column.high * kColors + color;
        float first = between(float(upper[left]), float(lower[left]), row.weight);
        float second = between(float(upper[right]), float(lower[right]), row.weight);
        to[(swaps ? kColors - 1 - color : color) * area] = between(first, second, column.weight);
    }
}

}  // namespace maskrcnn

#endif
