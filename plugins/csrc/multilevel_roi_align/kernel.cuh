// RoIAlign of each RoI at its own pyramid level. Contract: plugins/contract.py; design: README.md.

#ifndef MASKRCNN_MULTILEVEL_ROI_ALIGN_KERNEL_CUH
#define MASKRCNN_MULTILEVEL_ROI_ALIGN_KERNEL_CUH

#include "../device.h"

namespace maskrcnn {

// FPN equation 1: index of the level for a box of this size in pixels.
struct LevelRule {
    int num_levels, min_level, canonical_level;
    float canonical_size, epsilon;
};

__host__ __device__ inline int level_of(float width, float height, const LevelRule &rule) {
    float area = product(width, height);
    if (!(area > 0.f)) return 0;  // true for NaN
    float level = floorf(float(rule.canonical_level) + log2f(quotient(sqrtf(area), rule.canonical_size)) + rule.epsilon);
    float highest = float(rule.min_level + rule.num_levels - 1);
    return int(fminf(fmaxf(level, float(rule.min_level)), highest)) - rule.min_level;
}

// Two neighbouring pixels that a sample along an axis reads, and their weights; zero for a sample outside the map.
struct alignas(16) Tap {
    int low, high;
    float low_weight, high_weight;
};

__host__ __device__ inline Tap tap_at(float position, int size) {
    if (!(position >= -1.f && position <= float(size))) return {0, 0, 0.f, 0.f};
    position = fmaxf(position, 0.f);
    int low = int(position);
    if (low >= size - 1) return {size - 1, size - 1, 1.f, 0.f};
    float fraction = position - float(low);
    return {low, low + 1, 1.f - fraction, fraction};
}

// One axis of one RoI, in pixels of its level: `bins` bins of `samples` samples each.
struct Axis {
    float start, bin;
    int samples, size;

    __host__ __device__ Tap tap(int index_of_bin, int sample) const {
        return tap_at(start + bin * (float(index_of_bin) + (float(sample) + 0.5f) / float(samples)), size);
    }

    // Range [first, last) of a bin's samples that contains all samples inside the map. A box much larger than the map
    // has a huge number of samples, almost all of them outside.
    __host__ __device__ void range(int index_of_bin, int &first, int &last) const {
        first = 0, last = samples;
        if (!(bin > 0.f)) return;
        float origin = start + bin * float(index_of_bin), per_pixel = float(samples) / bin;
        // Bounds of the rounding error: 2^-20 of the summands for positions, two for sample counts.
        float slack = fabsf(start) * 0x1p-20f + bin * 0x1p-20f * float(index_of_bin + 1);
        float from = (-1.f - slack - origin) * per_pixel - 2.f, to = (float(size) + slack - origin) * per_pixel + 2.f;
        if (from > 0.f) first = from < float(samples) ? int(from) : samples;
        if (to < float(samples)) last = to > 0.f ? int(to) : 0;
    }
};

constexpr int kMostSamples = 1 << 24;  // integers that float32 represents exactly

__host__ __device__ inline Axis axis_of(float low, float high, float scale, int size, int bins, int ratio, bool aligned) {
    float offset = aligned ? 0.5f : 0.f, start = product(low, scale) - offset;
    float length = (product(high, scale) - offset) - start;
    if (!aligned) length = length < 1.f ? 1.f : length;  // NaN stays NaN
    float bin = length / float(bins);
    // With an adaptive ratio an empty, infinite or NaN RoI has no samples.
    bool has_bins = bin > 0.f && bin <= 3.402823466e38f;
    int samples = ratio > 0 ? ratio : (has_bins ? int(fminf(ceilf(bin), float(kMostSamples))) : 0);
    return {start, bin, samples, size};
}

// A feature map of one image.
template <class T>
struct Map {
    const T *data;  // [C, height, width], or [height, width, pitch]
    int height, width, pitch;
    float scale;  // 1 / stride
};

struct Pooling {
    int channels, bins, ratio;  // C, S, sampling ratio
    bool aligned;
};

constexpr int kThreads = 256, kWarps = kThreads / kWarp;  // kernels for planes
constexpr int kTableTaps = 64;  // samples along an axis whose taps are computed once per block

// Channels last. Seven warps: 7 x 7 bins, and the four parts of 14 x 14, are seven bins for each.
constexpr int kBinWarps = 7, kBinThreads = kBinWarps * kWarp;
constexpr int kBinBlocks = 5;          // per multiprocessor at least, which bounds the registers of a thread
constexpr int kLaneBytes = 16;         // of neighbouring channels per lane
constexpr int kTileBytes = 32 * 1024;  // results of a block
constexpr int kMostBins = 49;          // per block

template <class T>
constexpr int kChannelsOfLane = kLaneBytes / int(sizeof(T));

// Maximum number of bins per block; W: channels per lane.
template <class Out, int W>
constexpr int kBinsOfTile = kTileBytes / (kWarp * W * int(sizeof(Out))) < kMostBins
                                ? kTileBytes / (kWarp * W * int(sizeof(Out)))
                                : kMostBins;

struct Taps {
    Tap table[2][kTableTaps];  // 0: rows, 1: columns
};

// A tap of one axis, from the table or computed.
__device__ inline Tap look_up(const Tap *table, const Axis &axis, int bin, int sample) {
    if (axis.samples > kTableTaps) return axis.tap(bin, sample);  // the index could overflow
    int index = bin * axis.samples + sample;
    return index < kTableTaps ? table[index] : axis.tap(bin, sample);
}

__device__ inline void fill(Taps &taps, const Axis &rows, const Axis &columns, int bins) {
    for (int i = threadIdx.x; i < 2 * kTableTaps; i += blockDim.x) {
        Axis axis = i < kTableTaps ? rows : columns;
        int index = i % kTableTaps;
        if (axis.samples > 0 && index / axis.samples < bins)
            taps.table[i / kTableTaps][index] = axis.tap(index / axis.samples, index % axis.samples);
    }
    __syncthreads();
}

template <class T>
__device__ inline void axes_of(const float *roi, const Map<T> &map, const Pooling &pooling, Axis &rows, Axis &columns) {
    rows = axis_of(roi[1], roi[3], map.scale, map.height, pooling.bins, pooling.ratio, pooling.aligned);
    columns = axis_of(roi[0], roi[2], map.scale, map.width, pooling.bins, pooling.ratio, pooling.aligned);
}

// Weighted sum over the samples of one bin for W neighbouring channels. RATIO: samples along each axis; 0: variable.
template <int RATIO, class T, int W>
__device__ inline void sum_of_bin(const Map<T> &map, const Axis &rows, const Axis &columns, const Taps &taps, int y,
                                  int x, int channel, float (&sum)[W]) {
    int first_row = 0, last_row = RATIO, first_column = 0, last_column = RATIO;
    if (RATIO == 0) {
        rows.range(y, first_row, last_row);
        columns.range(x, first_column, last_column);
    }
    for (int i = 0; i < W; i++) sum[i] = 0.f;
#pragma unroll
    for (int a = first_row; a < last_row; a++) {
        Tap row = look_up(taps.table[0], rows, y, a);
#pragma unroll
        for (int edge = 0; edge < 2; edge++) {
            const T *line = map.data + int64_t(edge ? row.high : row.low) * map.width * map.pitch + channel;
            float weight = edge ? row.high_weight : row.low_weight, of_line[W] = {};
#pragma unroll
            for (int b = first_column; b < last_column; b++) {
                Tap column = look_up(taps.table[1], columns, x, b);
                float low[W], high[W];
                load(line + int64_t(column.low) * map.pitch, low);
                load(line + int64_t(column.high) * map.pitch, high);
                for (int i = 0; i < W; i++) of_line[i] += column.low_weight * low[i] + column.high_weight * high[i];
            }
            for (int i = 0; i < W; i++) sum[i] += weight * of_line[i];
        }
    }
}

// The same, scaled by `share`, for two samples along each axis whose taps are all in the table: 16 pixels, each
// multiplied by one weight. A pixel's address is one multiplication of 32 bits; a line of the map has less than 4 GB.
template <class T, int W>
__device__ inline void sum_of_pixels(const Map<T> &map, const Taps &taps, uint32_t y, uint32_t x, int channel, float share,
                                     float (&sum)[W]) {
    uint32_t pixel = uint32_t(map.pitch) / W, line = uint32_t(map.width) * uint32_t(map.pitch) * uint32_t(sizeof(T));
    uint32_t columns[4];  // in units of the W channels of a lane
    float weights[4];
    for (int b = 0; b < 2; b++) {
        Tap tap = taps.table[1][2 * x + b];
        columns[2 * b] = tap.low * pixel, columns[2 * b + 1] = tap.high * pixel;
        weights[2 * b] = tap.low_weight * share, weights[2 * b + 1] = tap.high_weight * share;
    }
    for (int i = 0; i < W; i++) sum[i] = 0.f;
#pragma unroll
    for (int a = 0; a < 2; a++) {
        Tap tap = taps.table[0][2 * y + a];
#pragma unroll
        for (int edge = 0; edge < 2; edge++) {
            uint64_t skipped = uint64_t(uint32_t(edge ? tap.high : tap.low)) * line;
            keep(skipped);
            auto *row = reinterpret_cast<const Vector<T, W> *>(reinterpret_cast<const char *>(map.data + channel) + skipped);
            float of_row = edge ? tap.high_weight : tap.low_weight;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float values[W], weight = of_row * weights[k];
                load(row[columns[k]].values, values);
                for (int i = 0; i < W; i++) sum[i] += weight * values[i];
            }
        }
    }
}

// Channels last: a lane computes W neighbouring channels of a bin, a warp 32 W channels, the warps of the block
// different bins. Results pass through shared memory, so that writes to `pooled` [C, S, S] are contiguous.
// One block of kBinThreads: channels from `first_channel` on, bins [first_bin, last_bin), at most kBinsOfTile.
// RATIO 2: two samples along each axis, and at most kTableTaps / 2 bins.
template <class T, class Out, int W, int RATIO>
__device__ inline void pool_channels_last(const Map<T> &map, const Pooling &pooling, const float *roi, Out *pooled,
                                          int first_channel, int first_bin, int last_bin) {
    // A row of the tile has 8 bytes more than its channels, which spreads a column of it over the banks.
    constexpr int kOfEight = 8 / int(sizeof(Out)), kRow = kWarp * W + kOfEight;
    constexpr int kWide = W < kOfEight ? W : kOfEight, kPair = W > 1 && sizeof(Out) == 2 ? 2 : 1;  // moved at once
    __shared__ Taps taps;
    __shared__ Vector<Out, kOfEight> tile_memory[kRow / kOfEight * kBinsOfTile<Out, W>];
    Out *tile = reinterpret_cast<Out *>(tile_memory);
    Axis rows, columns;
    axes_of(roi, map, pooling, rows, columns);
    fill(taps, rows, columns, pooling.bins);
    int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, width = last_bin - first_bin;
    int channel = first_channel + lane * W;
    float share = 1.f / fmaxf(float(rows.samples) * float(columns.samples), 1.f);
    for (int bin = warp; bin < width && channel < pooling.channels; bin += kBinWarps) {
        float sum[W];
        uint32_t y = uint32_t(first_bin + bin) / uint32_t(pooling.bins), x = first_bin + bin - y * pooling.bins;
        if (RATIO == 2) {
            sum_of_pixels(map, taps, y, x, channel, share, sum);
        } else {
            sum_of_bin<RATIO>(map, rows, columns, taps, y, x, channel, sum);
            for (int i = 0; i < W; i++) sum[i] *= share;
        }
#pragma unroll
        for (int i = 0; i < W; i += kWide) {
            auto &wide = *reinterpret_cast<Vector<Out, kWide> *>(&tile[bin * kRow + lane * W + i]);
            for (int j = 0; j < kWide; j++) from_float(sum[i + j], wide.values[j]);
        }
    }
    __syncthreads();
    int channels = pooling.channels - first_channel;
    if (channels > kWarp * W) channels = kWarp * W;
    int area = pooling.bins * pooling.bins;
    for (int c = warp * kPair; c < channels; c += kBinWarps * kPair) {
        Out *to = pooled + int64_t(first_channel + c) * area + first_bin;
        for (int bin = lane; bin < width; bin += kWarp) {
            auto pair = *reinterpret_cast<const Vector<Out, kPair> *>(&tile[bin * kRow + c]);
            to[bin] = pair.values[0];
            if (kPair == 2 && c + 1 < channels) to[area + bin] = pair.values[kPair - 1];
        }
    }
}

// Planes [H, W], two samples per bin and axis: the 2 x 2 samples of a bin read four columns, so four lanes share a bin
// and a warp computes 8 bins of a row. Neighbouring lanes read neighbouring pixels of a line. One block: channels
// [first_channel, last_channel).
template <class T, class Out>
__device__ inline void pool_planes_by_quads(const Map<T> &map, const Pooling &pooling, const float *roi, Out *pooled,
                                            int first_channel, int last_channel) {
    constexpr int kRatio = 2, kBins = kWarp / (2 * kRatio);
    __shared__ Taps taps;
    Axis rows, columns;
    axes_of(roi, map, pooling, rows, columns);
    fill(taps, rows, columns, pooling.bins);
    int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, entry = lane % 4, bins = pooling.bins;
    int64_t area = int64_t(bins) * bins, plane = int64_t(map.height) * map.width;
    for (int x0 = 0; x0 < bins; x0 += kBins) {
        int x = x0 + lane / 4;
        Tap column = look_up(taps.table[1], columns, x < bins ? x : bins - 1, entry / 2);
        int at = entry % 2 ? column.high : column.low;
        float weight = (entry % 2 ? column.high_weight : column.low_weight) * 0.25f;
        for (int channel = first_channel + warp; channel < last_channel; channel += kWarps) {
            const T *from = map.data + channel * plane + at;
            Out *to = pooled + channel * area + x;
            float mine = 0.f;
            for (int y = 0; y < bins; y++) {
                Tap upper = look_up(taps.table[0], rows, y, 0), lower = look_up(taps.table[0], rows, y, 1);
                float sum = upper.low_weight * to_float(from[int64_t(upper.low) * map.width]) +
                            upper.high_weight * to_float(from[int64_t(upper.high) * map.width]) +
                            lower.low_weight * to_float(from[int64_t(lower.low) * map.width]) +
                            lower.high_weight * to_float(from[int64_t(lower.high) * map.width]);
                sum *= weight;
                sum += __shfl_xor_sync(kAllLanes, sum, 1);
                sum += __shfl_xor_sync(kAllLanes, sum, 2);
                // Each of four lanes keeps every fourth row of bins, so that a store fills whole sectors.
                if (y % 4 == entry) mine = sum;
                if (y % 4 == 3 || y == bins - 1) {
                    int row = y - y % 4 + entry;
                    if (x < bins && row < bins) from_float(mine, to[int64_t(row) * bins]);
                }
            }
        }
    }
}

// Planes, any number of samples: a thread computes one bin of one channel.
template <class T, class Out>
__device__ inline void pool_planes(const Map<T> &map, const Pooling &pooling, const float *roi, Out *pooled,
                                   int first_channel, int last_channel) {
    __shared__ Taps taps;
    Axis rows, columns;
    axes_of(roi, map, pooling, rows, columns);
    fill(taps, rows, columns, pooling.bins);
    int64_t area = int64_t(pooling.bins) * pooling.bins, plane = int64_t(map.height) * map.width;
    float share = 1.f / fmaxf(float(rows.samples) * float(columns.samples), 1.f);
    for (int64_t i = threadIdx.x; i < (last_channel - first_channel) * area; i += blockDim.x) {
        int channel = first_channel + int(i / area), bin = int(i % area);
        Map<T> one = {map.data + channel * plane, map.height, map.width, 1, map.scale};
        float sum[1];
        sum_of_bin<0>(one, rows, columns, taps, bin / pooling.bins, bin % pooling.bins, 0, sum);
        from_float(sum[0] * share, pooled[channel * area + bin]);
    }
}

constexpr int kGradientRow = kMostBins;  // of a channel in the tile; odd, so that lanes read different banks

// The gradient of the features, added to `gradient` [height, width, pitch] of this image, which has the map's size. A
// lane adds one channel, the warps of the block different bins, of which each sample reads four pixels. One block of
// kBinThreads: 32 channels from `first_channel` on, bins [first_bin, last_bin), at most kMostBins.
template <class Out>
__device__ inline void spread_channels_last(const Map<float> &map, float *gradient, const Pooling &pooling,
                                            const float *roi, const Out *pooled, int first_channel, int first_bin,
                                            int last_bin) {
    __shared__ Taps taps;
    __shared__ float tile[kWarp * kGradientRow];
    Axis rows, columns;
    axes_of(roi, map, pooling, rows, columns);
    fill(taps, rows, columns, pooling.bins);
    int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, width = last_bin - first_bin;
    int channels = pooling.channels - first_channel, area = pooling.bins * pooling.bins;
    for (int c = warp; c < kWarp && c < channels; c += kBinWarps)
        for (int bin = lane; bin < width; bin += kWarp)
            tile[c * kGradientRow + bin] = to_float(pooled[int64_t(first_channel + c) * area + first_bin + bin]);
    __syncthreads();
    float share = 1.f / fmaxf(float(rows.samples) * float(columns.samples), 1.f);
    for (int bin = warp; bin < width && lane < channels; bin += kBinWarps) {
        float of_bin = tile[lane * kGradientRow + bin] * share;
        int y = (first_bin + bin) / pooling.bins, x = (first_bin + bin) % pooling.bins;
        int first_row, last_row, first_column, last_column;
        rows.range(y, first_row, last_row);
        columns.range(x, first_column, last_column);
        for (int a = first_row; a < last_row; a++) {
            Tap row = look_up(taps.table[0], rows, y, a);
            for (int edge = 0; edge < 2; edge++) {
                float *line = gradient + int64_t(edge ? row.high : row.low) * map.width * map.pitch + first_channel + lane;
                float of_line = of_bin * (edge ? row.high_weight : row.low_weight);
                for (int b = first_column; b < last_column; b++) {
                    Tap column = look_up(taps.table[1], columns, x, b);
                    float low = of_line * column.low_weight, high = of_line * column.high_weight;
                    if (low != 0.f) atomicAdd(line + int64_t(column.low) * map.pitch, low);
                    if (high != 0.f) atomicAdd(line + int64_t(column.high) * map.pitch, high);
                }
            }
        }
    }
}

}  // namespace maskrcnn

#endif
