// C interface of MultilevelRoiAlign: argument checks and kernel selection.

#include "../launch.h"
#include "kernel.cuh"

namespace maskrcnn {
namespace {

using Params = maskrcnn_roi_align_params;

constexpr int kPlanesOfBlock = 64;  // channels per block in the kernels for planes

template <class T>
__device__ inline Map<T> map_of(const Params &params, const float *roi, int image) {
    LevelRule rule = {params.num_levels, params.min_level, params.canonical_level, params.canonical_size,
                      params.level_epsilon};
    int level = level_of(roi[2] - roi[0], roi[3] - roi[1], rule), pitch = params.channel_pitch;
    int64_t of_image = int64_t(params.heights[level]) * params.widths[level] *
                       (params.layout == MASKRCNN_NHWC ? pitch : params.channels);
    return {static_cast<const T *>(params.features[level]) + image * of_image, params.heights[level],
            params.widths[level], pitch, ldexpf(1.f, -(params.min_level + level))};
}

// Common to the blocks of all kernels. blockIdx.x: images, RoIs and parts of a RoI's bins; blockIdx.y: groups of
// channels.
template <class T, class Out>
struct Block {
    const float *roi;
    Out *pooled;
    int image, part;
    Pooling pooling;

    template <class Void>
    __device__ Block(const Params &params, const float *rois, Void *out, int parts) {
        int64_t index = blockIdx.x / parts;  // RoI index over all images
        part = blockIdx.x % parts;
        image = int(index / params.num_rois);
        roi = rois + index * 4;
        pooled = static_cast<Out *>(out) + index * params.channels * params.output_size * params.output_size;
        pooling = {params.channels, params.output_size, params.sampling_ratio, params.aligned != 0};
    }
};

template <class T, class Out, int W, int RATIO>
__global__ void __launch_bounds__(kBinThreads, kBinBlocks)
    channels_last_kernel(Params params, const float *rois, void *out, int parts) {
    Block<T, Out> block(params, rois, out, parts);
    int bins = params.output_size * params.output_size;
    int first = int(int64_t(bins) * block.part / parts), last = int(int64_t(bins) * (block.part + 1) / parts);
    pool_channels_last<T, Out, W, RATIO>(map_of<T>(params, block.roi, block.image), block.pooling, block.roi,
                                         block.pooled, blockIdx.y * kWarp * W, first, last);
}

template <class T, class Out, bool QUADS>
__global__ void __launch_bounds__(kThreads) planes_kernel(Params params, const float *rois, void *out, int parts) {
    Block<T, Out> block(params, rois, out, parts);
    Map<T> map = map_of<T>(params, block.roi, block.image);
    int first = blockIdx.y * kPlanesOfBlock, last = first + kPlanesOfBlock;
    if (last > params.channels) last = params.channels;
    if (QUADS)
        pool_planes_by_quads<T, Out>(map, block.pooling, block.roi, block.pooled, first, last);
    else
        pool_planes<T, Out>(map, block.pooling, block.roi, block.pooled, first, last);
}

template <class Out>
__global__ void __launch_bounds__(kBinThreads)
    gradient_kernel(Params params, const float *rois, const void *pooled, int parts) {
    Block<float, const Out> block(params, rois, pooled, parts);
    Map<float> map = map_of<float>(params, block.roi, block.image);
    int bins = params.output_size * params.output_size;
    int first = int(int64_t(bins) * block.part / parts), last = int(int64_t(bins) * (block.part + 1) / parts);
    spread_channels_last<Out>(map, const_cast<float *>(map.data), block.pooling, block.roi, block.pooled,
                              blockIdx.y * kWarp, first, last);
}

}  // namespace
}  // namespace maskrcnn

#if !defined(__CUDACC_RTC__)

namespace maskrcnn {
namespace {

constexpr int64_t kMostRowElements = 0x7fffffff / 4;  // of a row of a channels-last map, whose bytes have 32-bit offsets

// Whether a lane can read 16 bytes at once, that is, every pixel begins at a multiple of 16 bytes.
template <class T>
bool has_wide_pixels(const Params &params) {
    bool has = params.channel_pitch % kChannelsOfLane<T> == 0;
    for (int level = 0; level < params.num_levels; level++)
        has = has && reinterpret_cast<uintptr_t>(params.features[level]) % kLaneBytes == 0;
    return has;
}

template <class T, class Out, int W, int RATIO>
int run_channels_last(const Params &params, const float *rois, void *pooled, void *stream) {
    int64_t num_rois = int64_t(params.batch) * params.num_rois, bins = int64_t(params.output_size) * params.output_size;
    int64_t parts = ceil_div(bins, kBinsOfTile<Out, W>);
    if (num_rois * parts > kMostBlocks) return MASKRCNN_INVALID;
    dim3 grid(unsigned(num_rois * parts), unsigned(ceil_div(params.channels, kWarp * W)));
    auto kernel = channels_last_kernel<T, Out, W, RATIO>;
    return MASKRCNN_LAUNCH(kernel, grid, kBinThreads, stream, params, rois, pooled, int(parts));
}

template <class T, class Out>
int run(const Params &params, const float *rois, void *pooled, void *stream) {
    if (params.layout == MASKRCNN_NCHW) {
        dim3 grid(unsigned(params.batch * params.num_rois), unsigned(ceil_div(params.channels, kPlanesOfBlock)));
        bool quads = params.sampling_ratio == 2;
        auto kernel = quads ? planes_kernel<T, Out, true> : planes_kernel<T, Out, false>;
        return MASKRCNN_LAUNCH(kernel, grid, kThreads, stream, params, rois, pooled, 1);
    }
    constexpr int kWide = kChannelsOfLane<T>;
    if (!has_wide_pixels<T>(params)) return run_channels_last<T, Out, 1, 0>(params, rois, pooled, stream);
    bool is_usual = params.sampling_ratio == 2 && 2 * params.output_size <= kTableTaps;
    return is_usual ? run_channels_last<T, Out, kWide, 2>(params, rois, pooled, stream)
                    : run_channels_last<T, Out, kWide, 0>(params, rois, pooled, stream);
}

template <class Out>
int run_gradient(const Params &params, const float *rois, const void *pooled, void *stream) {
    int64_t num_rois = int64_t(params.batch) * params.num_rois, bins = int64_t(params.output_size) * params.output_size;
    int64_t parts = ceil_div(bins, kMostBins);
    if (num_rois * parts > kMostBlocks) return MASKRCNN_INVALID;
    dim3 grid(unsigned(num_rois * parts), unsigned(ceil_div(params.channels, kWarp)));
    return MASKRCNN_LAUNCH(gradient_kernel<Out>, grid, kBinThreads, stream, params, rois, pooled, int(parts));
}

bool is_type(int32_t dtype) { return dtype >= MASKRCNN_FLOAT32 && dtype <= MASKRCNN_BFLOAT16; }

bool is_valid(const Params &params) {
    bool has_layout = params.layout == MASKRCNN_NCHW ||
                      (params.layout == MASKRCNN_NHWC && params.channel_pitch >= params.channels);
    bool has_shape = params.num_levels >= 1 && params.num_levels <= MASKRCNN_MAX_LEVELS && params.batch >= 0 &&
                     params.num_rois >= 0 && params.channels >= 0 && params.output_size >= 1 &&
                     params.output_size <= 32767 && params.sampling_ratio >= 0 &&
                     int64_t(params.batch) * params.num_rois <= kMostBlocks &&
                     ceil_div(params.channels, kWarp) <= kMostRows;
    for (int level = 0; has_shape && level < params.num_levels; level++)
        has_shape = params.heights[level] >= 1 && params.widths[level] >= 1 &&
                    (params.layout == MASKRCNN_NCHW ||
                     int64_t(params.widths[level]) * params.channel_pitch <= kMostRowElements);
    return is_type(params.dtype) && has_layout && has_shape && params.canonical_size > 0.f;
}

}  // namespace
}  // namespace maskrcnn

int maskrcnn_multilevel_roi_align(const maskrcnn_roi_align_params *params, const float *rois, void *pooled,
                                  void *stream) {
    using namespace maskrcnn;
    if (params == nullptr || !is_valid(*params)) return MASKRCNN_INVALID;
    bool to_float32 = params->output_dtype == MASKRCNN_FLOAT32;
    if (!to_float32 && params->output_dtype != params->dtype) return MASKRCNN_INVALID;
    if (params->batch == 0 || params->num_rois == 0 || params->channels == 0) return 0;
    switch (params->dtype) {
        case MASKRCNN_FLOAT16:
            return to_float32 ? run<Half, float>(*params, rois, pooled, stream)
                              : run<Half, Half>(*params, rois, pooled, stream);
        case MASKRCNN_BFLOAT16:
            return to_float32 ? run<BFloat16, float>(*params, rois, pooled, stream)
                              : run<BFloat16, BFloat16>(*params, rois, pooled, stream);
        default:
            return run<float, float>(*params, rois, pooled, stream);
    }
}

int maskrcnn_multilevel_roi_align_gradient(const maskrcnn_roi_align_params *params, const float *rois,
                                           const void *pooled, void *stream) {
    using namespace maskrcnn;
    if (params == nullptr || !is_valid(*params) || !is_type(params->output_dtype) ||
        params->dtype != MASKRCNN_FLOAT32 || params->layout != MASKRCNN_NHWC)
        return MASKRCNN_INVALID;
    if (params->batch == 0 || params->num_rois == 0 || params->channels == 0) return 0;
    switch (params->output_dtype) {
        case MASKRCNN_FLOAT16:
            return run_gradient<Half>(*params, rois, pooled, stream);
        case MASKRCNN_BFLOAT16:
            return run_gradient<BFloat16>(*params, rois, pooled, stream);
        default:
            return run_gradient<float>(*params, rois, pooled, stream);
    }
}

#endif
