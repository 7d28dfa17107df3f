// C interface of BatchedNms.

#include "../launch.h"
#include "kernel.cuh"

namespace maskrcnn {
namespace {

__global__ void __launch_bounds__(kNmsThreads) keep_kernel(const float *boxes, const int32_t *groups,
                                                           const int32_t *counts, int num_boxes, float threshold,
                                                           int max_output, int32_t *keep) {
    int64_t first = int64_t(blockIdx.y) * num_boxes;
    nms_keep(boxes + first * 4, groups + first, counts[blockIdx.y], num_boxes, threshold, max_output, keep + first,
             blockIdx.x, gridDim.x);
}

__global__ void __launch_bounds__(kNmsThreads) compact_kernel(const int32_t *keep, int num_boxes, int max_output,
                                                              int32_t *indices, int32_t *num) {
    nms_compact(keep + int64_t(blockIdx.x) * num_boxes, num_boxes, max_output,
                indices + int64_t(blockIdx.x) * max_output, num + blockIdx.x);
}

}  // namespace
}  // namespace maskrcnn

#if !defined(__CUDACC_RTC__)

size_t maskrcnn_batched_nms_workspace(int32_t batch, int32_t num_boxes) {
    return batch > 0 && num_boxes > 0 ? size_t(batch) * size_t(num_boxes) * sizeof(int32_t) : 0;
}

int maskrcnn_batched_nms(const float *boxes, const int32_t *groups, const int32_t *counts, int32_t batch,
                         int32_t num_boxes, float iou_threshold, int32_t max_output, void *workspace, int32_t *indices,
                         int32_t *num, void *stream) {
    using namespace maskrcnn;
    constexpr int32_t kMostBoxes = 0x7fffffff - kNmsThreads * kScanned;  // row indices are int
    if (batch < 0 || batch > kMostRows || num_boxes < 0 || num_boxes > kMostBoxes || max_output < 0)
        return MASKRCNN_INVALID;
    if (batch == 0) return 0;
    auto *keep = static_cast<int32_t *>(workspace);
    if (num_boxes > 0 && max_output > 0) {
        if (keep == nullptr) return MASKRCNN_INVALID;
        int code = MASKRCNN_LAUNCH(keep_kernel, dim3(buckets_for(num_boxes), unsigned(batch)), kNmsThreads, stream, boxes,
                                   groups, counts, num_boxes, iou_threshold, max_output, keep);
        if (code != 0) return code;
    }
    int rows = max_output > 0 ? num_boxes : 0;
    return MASKRCNN_LAUNCH(compact_kernel, dim3(unsigned(batch)), kNmsThreads, stream, keep, rows, max_output, indices,
                           num);
}

#endif
