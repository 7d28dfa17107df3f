// MultilevelRoiAlign for TensorRT's ahead-of-time plugins: one kernel that becomes part of the engine.
//
// Arguments are in TensorRT's order: inputs, 32-bit integers, output. The attributes of the node are macros, set by
// plugins/aot_kernels.py; the kernel is compiled from this file alone.

#include "kernel.cuh"

#define EACH_1(F) F(0)
#define EACH_2(F) EACH_1(F) F(1)
#define EACH_3(F) EACH_2(F) F(2)
#define EACH_4(F) EACH_3(F) F(3)
#define EACH_5(F) EACH_4(F) F(4)
#define EACH_6(F) EACH_5(F) F(5)
#define EACH_7(F) EACH_6(F) F(6)
#define EACH_8(F) EACH_7(F) F(7)
#define EACH_9(F) EACH_8(F) F(8)
#define EACH_10(F) EACH_9(F) F(9)
#define EACH_11(F) EACH_10(F) F(10)
#define EACH_12(F) EACH_11(F) F(11)
#define EACH_13(F) EACH_12(F) F(12)
#define EACH_14(F) EACH_13(F) F(13)
#define EACH_15(F) EACH_14(F) F(14)
#define EACH_16(F) EACH_15(F) F(15)
#define JOINED(A, B) A##B
#define EACH_OF(LEVELS) JOINED(EACH_, LEVELS)
#define EACH_LEVEL EACH_OF(MASKRCNN_LEVELS)

#define FEATURE_ARGUMENT(L) const maskrcnn::Feature *feature_##L,
#define SIZE_ARGUMENTS(L) int height_##L, int width_##L,
// The level is selected by comparisons: an array indexed by it would be placed in local memory.
#define PICK(L) \
    if (level == L) map = {feature_##L, height_##L, width_##L, 0, ldexpf(1.f, -(MASKRCNN_MIN_LEVEL + L))};

namespace maskrcnn {

using Feature = MASKRCNN_FEATURE;  // float, Half or BFloat16; the output has the same type

static_assert(MASKRCNN_THREADS == (MASKRCNN_CHANNELS_LAST ? kBinThreads : kThreads),
              "aot_kernels.py starts blocks of the size that the kernel is written for");
constexpr int kWidth = MASKRCNN_CHANNELS_LAST ? MASKRCNN_CHANNELS_OF_BLOCK / kWarp : 1;  // channels per lane
static_assert(kWidth == 1 || kWidth == kChannelsOfLane<Feature>, "single channels, or 16 bytes of them");
static_assert(MASKRCNN_CHANNELS_LAST ? MASKRCNN_BINS * MASKRCNN_BINS <= MASKRCNN_PARTS * kBinsOfTile<Feature, kWidth>
                                     : MASKRCNN_PARTS == 1,
              "the bins of a part fit into a block's tile; planes have no tile");

}  // namespace maskrcnn

extern "C" {

// blockIdx.x: images, RoIs and parts of a RoI's bins; blockIdx.y: groups of channels. An empty dimension has one block,
// because CUDA has no empty grids.
__global__ void __launch_bounds__(MASKRCNN_THREADS, MASKRCNN_CHANNELS_LAST ? maskrcnn::kBinBlocks : 1)
    maskrcnn_multilevel_roi_align_aot(EACH_LEVEL(FEATURE_ARGUMENT) const float *rois, int batch, int num_rois,
                                      int channels, EACH_LEVEL(SIZE_ARGUMENTS) maskrcnn::Feature *pooled) {
    using namespace maskrcnn;
    int64_t index = blockIdx.x / MASKRCNN_PARTS;  // RoI index over all images
    if (index >= int64_t(batch) * num_rois || channels == 0) return;
    const float *roi = rois + index * 4;
    Feature *out = pooled + index * channels * (MASKRCNN_BINS * MASKRCNN_BINS);
    Pooling pooling = {channels, MASKRCNN_BINS, MASKRCNN_RATIO, MASKRCNN_ALIGNED != 0};
    LevelRule rule = {MASKRCNN_LEVELS, MASKRCNN_MIN_LEVEL, MASKRCNN_CANONICAL_LEVEL, MASKRCNN_CANONICAL_SIZE,
                      MASKRCNN_LEVEL_EPSILON};
    int level = level_of(roi[2] - roi[0], roi[3] - roi[1], rule);
    Map<Feature> map = {};
    EACH_LEVEL(PICK)
    int first = blockIdx.y * MASKRCNN_CHANNELS_OF_BLOCK, image = int(index / num_rois);
#if MASKRCNN_CHANNELS_LAST
    map.pitch = (channels + MASKRCNN_PITCH_UNIT - 1) / MASKRCNN_PITCH_UNIT * MASKRCNN_PITCH_UNIT;
    map.data += image * (int64_t(map.height) * map.width * map.pitch);
    constexpr int kAll = MASKRCNN_BINS * MASKRCNN_BINS;
    constexpr bool kIsUsual = kWidth > 1 && MASKRCNN_RATIO == 2 && 2 * MASKRCNN_BINS <= kTableTaps;
    int part = blockIdx.x % MASKRCNN_PARTS;
    pool_channels_last<Feature, Feature, kWidth, kIsUsual ? 2 : 0>(
        map, pooling, roi, out, first, int(int64_t(kAll) * part / MASKRCNN_PARTS),
        int(int64_t(kAll) * (part + 1) / MASKRCNN_PARTS));
#else
    map.data += image * (int64_t(map.height) * map.width * channels);
    int last = first + MASKRCNN_CHANNELS_OF_BLOCK < channels ? first + MASKRCNN_CHANNELS_OF_BLOCK : channels;
#if MASKRCNN_RATIO == 2
    pool_planes_by_quads<Feature, Feature>(map, pooling, roi, out, first, last);
#else
    pool_planes<Feature, Feature>(map, pooling, roi, out, first, last);
#endif
#endif
}
}
