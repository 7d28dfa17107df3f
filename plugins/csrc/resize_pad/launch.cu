// C interface of resizing and padding.

#include "../launch.h"
#include "kernel.cuh"

namespace maskrcnn {
namespace {

constexpr int kPixelsOfBlock = 128;

__global__ void __launch_bounds__(kPixelsOfBlock) resize_kernel(const uint8_t *image, Size size, Size resized, Size padded,
                                                                bool swaps, float *planes) {
    int x = blockIdx.x * kPixelsOfBlock + threadIdx.x;
    for (int y = blockIdx.y; x < padded.width && y < padded.height; y += gridDim.y)
        resize_pixel(image, size, resized, padded, swaps, y, x, planes);
}

}  // namespace
}  // namespace maskrcnn

#if !defined(__CUDACC_RTC__)

int maskrcnn_resize_pad(const uint8_t *image, int32_t height, int32_t width, float *padded, int32_t resized_height,
                        int32_t resized_width, int32_t padded_height, int32_t padded_width, int32_t swap_channels,
                        void *stream) {
    using namespace maskrcnn;
    constexpr int kMostPixels = 1 << 24;  // per side; float32 represents them exactly
    bool is_valid = height >= 1 && height <= kMostPixels && width >= 1 && width <= kMostPixels && resized_height >= 1 &&
                    resized_height <= padded_height && padded_height <= kMostPixels && resized_width >= 1 &&
                    resized_width <= padded_width && padded_width <= kMostPixels;
    if (!is_valid) return MASKRCNN_INVALID;
    Size size = {height, width}, resized = {resized_height, resized_width}, whole = {padded_height, padded_width};
    dim3 grid(unsigned(ceil_div(padded_width, kPixelsOfBlock)),
              unsigned(padded_height < kMostRows ? padded_height : kMostRows));
    return MASKRCNN_LAUNCH(resize_kernel, grid, kPixelsOfBlock, stream, image, size, resized, whole, swap_channels != 0,
                           padded);
}

#endif
