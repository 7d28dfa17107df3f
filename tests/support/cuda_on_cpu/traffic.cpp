// RoIAlign's kernels with element types that note where each lane reads and writes: which requests a warp makes, and how
// many 32-byte sectors and 128-byte lines of memory each touches. Called by tests/plugins/test_memory_traffic.py.

#include "cuda_on_cpu.h"

#include <map>
#include <set>
#include <tuple>

#include "../../../plugins/csrc/multilevel_roi_align/kernel.cuh"

namespace traffic {

struct Request {
    std::set<uintptr_t> sectors, lines;
    int lanes = 0;
};
struct Totals {
    double requests, lanes, sectors, lines;
};

// The requests of one block: by warp, kind (0: load, 1: store) and position in the lanes' sequence.
std::map<std::tuple<int, int, int>, Request> requests;
std::vector<int> counts[2];
const void *first_output, *last_output;
Totals totals[2];

void end_block() {
    for (auto &[key, request] : requests) {
        Totals &total = totals[std::get<1>(key)];
        total.requests += 1, total.lanes += request.lanes;
        total.sectors += request.sectors.size(), total.lines += request.lines.size();
    }
    requests.clear();
    for (auto &count : counts) count.assign(1024, 0);
}

void note(const void *address, size_t size, int kind) {
    if (kind == 1 && (address < first_output || address >= last_output)) return;  // shared memory
    int thread = cuda_on_cpu::gpu().current;
    Request &request = requests[{thread / 32, kind, counts[kind][thread]++}];
    request.lanes++;
    for (uintptr_t byte = uintptr_t(address); byte < uintptr_t(address) + size; byte += 2)
        request.sectors.insert(byte / 32), request.lines.insert(byte / 128);
}

}  // namespace traffic

namespace maskrcnn {

template <class Bits>
struct Noted {
    Bits bits;
    Noted &operator=(const Noted &other) {
        traffic::note(this, sizeof *this, 1);
        bits = other.bits;
        return *this;
    }
};
template <class Bits>
float to_float(const Noted<Bits> &value) {
    traffic::note(&value, sizeof value, 0);
    return float(value.bits);
}
template <class Bits>
void from_float(float value, Noted<Bits> &to) {
    traffic::note(&to, sizeof to, 1);
    to.bits = Bits(value);
}
template <class Bits, int W>
void load(const Noted<Bits> *from, float (&to)[W]) {
    traffic::note(from, W * sizeof *from, 0);
    for (int i = 0; i < W; i++) to[i] = float(from[i].bits);
}

// One RoI [4] on one level of `channels` channels. way: 0 a thread per bin, 1 quads, 2 channels last.
template <class T>
void pool(int way, const T *data, int height, int width, float scale, const float *roi, int channels, int bins, T *out) {
    Pooling pooling = {channels, bins, 2, true};
    bool is_last = way == 2;
    Map<T> map = {data, height, width, channels, scale};
    constexpr int kLane = kChannelsOfLane<T>, kBins = kBinsOfTile<T, kLane>;
    int step = is_last ? kWarp * kLane : 64, parts = is_last ? (bins * bins + kBins - 1) / kBins : 1;
    cuda_on_cpu::launch(dim3(parts, (channels + step - 1) / step), is_last ? kBinThreads : kThreads, [&] {
        if (threadIdx.x == 0) traffic::end_block();
        int first = int(blockIdx.y) * step, last = std::min(channels, first + step);
        int area = bins * bins, part = blockIdx.x;
        if (way == 0) pool_planes<T, T>(map, pooling, roi, out, first, last);
        if (way == 1) pool_planes_by_quads<T, T>(map, pooling, roi, out, first, last);
        if (way == 2)
            pool_channels_last<T, T, kLane, 2>(map, pooling, roi, out, first, area * part / parts,
                                               area * (part + 1) / parts);
    });
    traffic::end_block();
}

}  // namespace maskrcnn

// Adds up what a RoI costs; totals: loads, then stores, each as requests, lanes, sectors, lines.
extern "C" void trace(int way, int element_bytes, const void *data, int height, int width, float scale, const float *roi,
                      int channels, int bins, void *out, double *totals) {
    using namespace maskrcnn;
    memset(traffic::totals, 0, sizeof traffic::totals);
    for (auto &count : traffic::counts) count.assign(1024, 0);
    traffic::first_output = out;
    traffic::last_output = static_cast<char *>(out) + int64_t(channels) * bins * bins * element_bytes;
    if (element_bytes == 4)
        pool(way, static_cast<const Noted<float> *>(data), height, width, scale, roi, channels, bins,
             static_cast<Noted<float> *>(out));
    else
        pool(way, static_cast<const Noted<int16_t> *>(data), height, width, scale, roi, channels, bins,
             static_cast<Noted<int16_t> *>(out));
    for (int kind = 0; kind < 2; kind++) {
        traffic::Totals &total = traffic::totals[kind];
        double all[4] = {total.requests, total.lanes, total.sectors, total.lines};
        for (int i = 0; i < 4; i++) totals[kind * 4 + i] += all[i];
    }
}
