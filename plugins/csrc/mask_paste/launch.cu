// C interface of mask pasting.

#include "../launch.h"
#include "kernel.cuh"

namespace maskrcnn {
namespace {

// blockIdx.x: groups of lines, blockIdx.y: groups of 32 words, blockIdx.z: masks, with a stride of gridDim.z.
template <class T>
__global__ void __launch_bounds__(kPasteThreads) paste_kernel(const T *masks, const float *boxes, int num_masks, int size,
                                                              int lines, int length, float threshold, int by_columns,
                                                              uint32_t *bits) {
    int line = blockIdx.x * kPasteWarps + threadIdx.x / kWarp, words = (length + kWarp - 1) / kWarp;
    if (line >= lines) return;
    MaskFrame frame = {size, by_columns ? size : 1, by_columns ? 1 : size};
    for (int64_t mask = blockIdx.z; mask < num_masks; mask += gridDim.z) {
        const float *box = boxes + mask * 4;
        Span rows = span_of(box[1], box[3], size), columns = span_of(box[0], box[2], size);
        paste_words(masks + mask * size * size, frame, by_columns ? columns : rows, by_columns ? rows : columns, line,
                    length, blockIdx.y * kWarp, words, threshold, bits + (mask * lines + line) * words);
    }
}

}  // namespace
}  // namespace maskrcnn

#if !defined(__CUDACC_RTC__)

int maskrcnn_paste_masks(const void *masks, const float *boxes, int32_t num_masks, int32_t mask_size, int32_t dtype,
                         int32_t height, int32_t width, float threshold, int32_t by_columns, uint32_t *bits,
                         void *stream) {
    using namespace maskrcnn;
    constexpr int kMostPixels = 1 << 24;  // per side; float32 represents them exactly
    bool is_valid = num_masks >= 0 && mask_size >= 1 && mask_size <= 32767 && height >= 0 && height <= kMostPixels &&
                    width >= 0 && width <= kMostPixels && (dtype == MASKRCNN_FLOAT32 || dtype == MASKRCNN_FLOAT16);
    if (!is_valid) return MASKRCNN_INVALID;
    if (num_masks == 0 || height == 0 || width == 0) return 0;
    int lines = by_columns ? width : height, length = by_columns ? height : width;
    dim3 grid(unsigned(ceil_div(lines, kPasteWarps)), unsigned(ceil_div(ceil_div(length, kWarp), kWarp)),
              unsigned(num_masks < kMostRows ? num_masks : kMostRows));
    if (dtype == MASKRCNN_FLOAT16)
        return MASKRCNN_LAUNCH(paste_kernel<Half>, grid, kPasteThreads, stream, static_cast<const Half *>(masks), boxes,
                               num_masks, mask_size, lines, length, threshold, by_columns, bits);
    return MASKRCNN_LAUNCH(paste_kernel<float>, grid, kPasteThreads, stream, static_cast<const float *>(masks), boxes,
                           num_masks, mask_size, lines, length, threshold, by_columns, bits);
}

#endif
