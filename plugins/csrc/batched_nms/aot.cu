// BatchedNms for TensorRT's ahead-of-time plugins: two kernels for two plugins (BatchedNmsKeep, BatchedNmsCompact),
// because such a plugin has a single kernel.
//
// Arguments are in TensorRT's order: inputs, 32-bit integers, outputs. The attributes of the node are macros, set by
// plugins/aot_kernels.py; each kernel is compiled from this file alone.

#include "kernel.cuh"

namespace maskrcnn {

static_assert(MASKRCNN_THREADS == kNmsThreads, "aot_kernels.py starts blocks of the size the kernels are written for");

}  // namespace maskrcnn

extern "C" {

#if MASKRCNN_KEEP

// blockIdx.x: buckets of groups, blockIdx.y: images.
__global__ void __launch_bounds__(MASKRCNN_THREADS)
    maskrcnn_batched_nms_keep_aot(const float *boxes, const int32_t *groups, const int32_t *counts, int batch,
                                  int num_boxes, int32_t *keep) {
    if (int(blockIdx.y) >= batch) return;
    int64_t first = int64_t(blockIdx.y) * num_boxes;
    maskrcnn::nms_keep(boxes + first * 4, groups + first, counts[blockIdx.y], num_boxes, MASKRCNN_IOU_THRESHOLD,
                       MASKRCNN_MAX_OUTPUT, keep + first, blockIdx.x, gridDim.x);
}

#else

// blockIdx.x: images.
__global__ void __launch_bounds__(MASKRCNN_THREADS)
    maskrcnn_batched_nms_compact_aot(const int32_t *keep, int batch, int num_boxes, int32_t *indices, int32_t *num) {
    if (int(blockIdx.x) >= batch) return;
    maskrcnn::nms_compact(keep + int64_t(blockIdx.x) * num_boxes, num_boxes, MASKRCNN_MAX_OUTPUT,
                          indices + int64_t(blockIdx.x) * MASKRCNN_MAX_OUTPUT, num + blockIdx.x);
}

#endif
}
