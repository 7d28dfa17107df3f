// Arithmetic functions of plugins/csrc, the same code on GPU and CPU, applied to arrays, for ctypes. `n` is the length of
// the arrays.

#include "batched_nms/kernel.cuh"
#include "mask_paste/kernel.cuh"
#include "multilevel_roi_align/kernel.cuh"

using namespace maskrcnn;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void singles_from_halves(const Half *from, float *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
}

EXPORT void halves_from_singles(const float *from, Half *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) from_float(from[i], to[i]);
}

EXPORT void singles_from_bfloat16s(const BFloat16 *from, float *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
}

EXPORT void bfloat16s_from_singles(const float *from, BFloat16 *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) from_float(from[i], to[i]);
}

EXPORT void levels(const float *widths, const float *heights, const LevelRule *rule, int *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = level_of(widths[i], heights[i], *rule);
}

EXPORT void taps(const float *positions, const int *sizes, Tap *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = tap_at(positions[i], sizes[i]);
}

struct AxisCase {
    float low, high, scale;
    int size, bins, ratio, aligned;
};

EXPORT void axes(const AxisCase *cases, Axis *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const AxisCase &c = cases[i];
        to[i] = axis_of(c.low, c.high, c.scale, c.size, c.bins, c.ratio, c.aligned != 0);
    }
}

// Of each bin of an axis: how many samples `range` gives, and how many with a weight it leaves out. Where there are
// very many samples, only those around what is given and those at both ends are looked at.
EXPORT void ranges(const AxisCase *axis_case, int *given, int *lost) {
    constexpr int kAround = 100000;
    Axis axis;
    axes(axis_case, &axis, 1);
    for (int bin = 0; bin < axis_case->bins; bin++) {
        int first, last;
        axis.range(bin, first, last);
        given[bin] = last > first ? last - first : 0, lost[bin] = 0;
        auto look = [&](int64_t from, int64_t to) {
            for (int64_t sample = from < 0 ? 0 : from; sample < to && sample < axis.samples; sample++) {
                Tap tap = axis.tap(bin, int(sample));
                bool has_weight = tap.low_weight != 0.f || tap.high_weight != 0.f;
                lost[bin] += has_weight && (sample < first || sample >= last);
            }
        };
        if (axis.samples <= 4 * kAround) {
            look(0, axis.samples);
            continue;
        }
        look(0, kAround), look(first - int64_t(kAround), first);
        look(last, last + int64_t(kAround)), look(axis.samples - int64_t(kAround), axis.samples);
    }
}

EXPORT void overlap(const Box *a, const Box *b, const float *thresholds, uint8_t *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = overlaps(a[i], b[i], thresholds[i]);
}

EXPORT void spans(const float *lows, const float *highs, int mask_size, Span *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = span_of(lows[i], highs[i], mask_size);
}
