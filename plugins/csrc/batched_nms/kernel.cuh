// Greedy NMS within each group of each image, in two kernels: mark the kept boxes, then compact them. Contract:
// plugins/contract.py; design: README.md.

#ifndef MASKRCNN_BATCHED_NMS_KERNEL_CUH
#define MASKRCNN_BATCHED_NMS_KERNEL_CUH

#include "../device.h"

namespace maskrcnn {

struct Box {
    float x1, y1, x2, y2;
};

__host__ __device__ inline Box box_at(const float *boxes, int64_t row) {
    const float *box = boxes + row * 4;
    return {box[0], box[1], box[2], box[3]};
}

// Whether the IoU of two boxes is greater than the threshold, with the rounding of torchvision on a CPU; false if the
// IoU is NaN (two boxes without area, or a NaN coordinate).
__host__ __device__ inline bool overlaps(const Box &a, const Box &b, float threshold) {
    float width = fmaxf(fminf(a.x2, b.x2) - fmaxf(a.x1, b.x1), 0.f);
    float height = fmaxf(fminf(a.y2, b.y2) - fmaxf(a.y1, b.y1), 0.f);
    float both = product(width, height);
    if (both == 0.f && threshold >= 0.f) return false;  // the common case
    float area_a = product(a.x2 - a.x1, a.y2 - a.y1), area_b = product(b.x2 - b.x1, b.y2 - b.y1);
    float either = area_a + area_b - both;
    // Below the threshold by more than the rounding error: skips the division.
    if (threshold >= 0.f && either > 0.f && both < 0.99f * threshold * either) return false;
    return quotient(both, either) > threshold;
}

// The block that handles a group of an image; groups that share a block are compared by their number.
__host__ __device__ inline int bucket_of(int group, int buckets) { return int(uint32_t(group) % uint32_t(buckets)); }

// Number of blocks per image: enough for a block per class with 90 classes and many boxes, and few for few boxes, where
// more blocks would be idle.
__host__ __device__ inline int buckets_for(int num_boxes) {
    int buckets = num_boxes / 32;
    return buckets < 1 ? 1 : (buckets > 128 ? 128 : buckets);
}

constexpr int kTile = 64;  // boxes whose suppression is resolved together

// The tests set smaller sizes, so that small inputs take the code paths of large ones.
#ifndef MASKRCNN_NMS_THREADS
#define MASKRCNN_NMS_THREADS 1024
#endif
#ifndef MASKRCNN_NMS_KEPT
#define MASKRCNN_NMS_KEPT 1024
#endif
constexpr int kNmsThreads = MASKRCNN_NMS_THREADS, kNmsWarps = kNmsThreads / kWarp;
constexpr int kScanned = 4;                   // rows per thread and scan
constexpr int kKept = MASKRCNN_NMS_KEPT;      // kept boxes in shared memory; further ones are read from global memory
static_assert(kNmsThreads % kTile == 0 && kNmsWarps <= kWarp, "a block of whole tiles and at most 32 warps");

// Exclusive prefix sum over the threads of the block, and the total. Has barriers before and after the use of `warps`.
__device__ inline int sum_before(int value, int *warps, int &total) {
    int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, sum = value;
    for (int step = 1; step < kWarp; step *= 2) {
        int other = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == kWarp - 1) warps[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int i = 0; i < kNmsWarps; i++) {
        if (i < warp) before += warps[i];
        total += warps[i];
    }
    __syncthreads();
    return before + sum - value;
}

struct NmsShared {
    int queue[kNmsThreads * kScanned];  // rows of the block's boxes, not yet processed
    Box kept[kKept];
    int kept_groups[kKept];
    Box tile[kTile];
    int tile_groups[kTile];
    uint32_t tile_alive[2], tile_kept[2];
    uint32_t rivals[kTile][2];  // bit j of row i: box j precedes box i in the tile, is alive, and overlaps it
    int warps[kNmsWarps];
};

// Warp 0 decides which boxes of the tile are kept. In each round a box with a kept rival is suppressed, and a box whose
// rivals are all suppressed is kept. The first undecided box can always be decided, so the loop terminates; the number
// of rounds is the length of the longest chain of suppressions.
__device__ inline void resolve_tile(NmsShared &shared) {
    int lane = threadIdx.x % kWarp;
    uint32_t open[2] = {shared.tile_alive[0], shared.tile_alive[1]}, kept[2] = {0u, 0u};
    while (open[0] | open[1]) {
        uint32_t decided[2], staying[2];
        for (int half = 0; half < 2; half++) {
            const uint32_t *rivals = shared.rivals[half * kWarp + lane];
            bool is_open = open[half] >> lane & 1u;
            bool goes = is_open && ((rivals[0] & kept[0]) | (rivals[1] & kept[1]));
            bool stays = is_open && !goes && !((rivals[0] & open[0]) | (rivals[1] & open[1]));
            decided[half] = __ballot_sync(kAllLanes, goes || stays);
            staying[half] = __ballot_sync(kAllLanes, stays);
        }
        for (int half = 0; half < 2; half++) {
            open[half] &= ~decided[half];
            kept[half] |= staying[half];
        }
    }
    if (lane < 2) shared.tile_kept[lane] = kept[lane];
}

__device__ inline void find_rivals(NmsShared &shared, float threshold) {
    int lane = threadIdx.x % kWarp;
    for (int i = threadIdx.x / kWarp; i < kTile; i += kNmsWarps) {
        for (int half = 0; half < 2; half++) {
            int j = half * kWarp + lane;
            bool is_rival = j < i && (shared.tile_alive[half] >> lane & 1u) &&
                            (shared.tile_alive[i / kWarp] >> i % kWarp & 1u) &&
                            shared.tile_groups[i] == shared.tile_groups[j] &&
                            overlaps(shared.tile[j], shared.tile[i], threshold);
            uint32_t word = __ballot_sync(kAllLanes, is_rival);
            if (lane == 0) shared.rivals[i][half] = word;
        }
    }
}

// Whether a box kept in an earlier batch overlaps this one. Kept boxes that did not fit in shared memory, in rows
// [overflow, before), are found through `keep`, which this block has written for its groups.
__device__ inline bool is_suppressed(const NmsShared &shared, const Box &box, int group, int kept, int overflow,
                                     int before, const float *boxes, const int *groups, const int *keep,
                                     float threshold) {
    int held = kept < kKept ? kept : kKept;
    for (int k = 0; k < held; k++)
        if (shared.kept_groups[k] == group && overlaps(shared.kept[k], box, threshold)) return true;
    if (kept > kKept)
        for (int row = overflow; row < before; row++)
            if (groups[row] == group && keep[row] && overlaps(box_at(boxes, row), box, threshold)) return true;
    return false;
}

// One block: all groups g of one image with bucket_of(g) == bucket. boxes [K, 4], groups [K], keep [K] of the image.
// Writes keep[row] = 1 or 0 for the boxes of its groups, and 0 for its share of the rows from `count` on. After
// `max_output` kept boxes the others get 0, because none of them can be among the first max_output.
__device__ inline void nms_keep(const float *boxes, const int *groups, int count, int num_boxes, float threshold,
                                int max_output, int *keep, int bucket, int buckets) {
    __shared__ NmsShared shared;
    int thread = threadIdx.x, lane = thread % kWarp;
    count = count < 0 ? 0 : (count < num_boxes ? count : num_boxes);
    for (int64_t row = count + bucket * int64_t(kNmsThreads) + thread; row < num_boxes; row += buckets * int64_t(kNmsThreads))
        keep[row] = 0;
    int kept = 0;            // boxes kept by this block so far; the same in every thread
    int overflow = num_boxes;  // row of the first kept box that does not fit in shared memory
    constexpr int kChunk = kNmsThreads * kScanned;
    for (int base = 0; base < count; base += kChunk) {
        bool is_mine[kScanned];
        int found = 0, waiting;
        for (int i = 0; i < kScanned; i++) {
            int row = base + thread * kScanned + i;
            is_mine[i] = row < count && bucket_of(groups[row], buckets) == bucket;
            if (is_mine[i] && kept >= max_output) keep[row] = 0;
            found += is_mine[i];
        }
        if (kept >= max_output) continue;
        int place = sum_before(found, shared.warps, waiting);
        for (int i = 0; i < kScanned; i++)
            if (is_mine[i]) shared.queue[place++] = base + thread * kScanned + i;
        __syncthreads();
        for (int batch = 0; batch < waiting; batch += kNmsThreads) {
            int size = waiting - batch < kNmsThreads ? waiting - batch : kNmsThreads;
            bool has_box = thread < size, alive = has_box && kept < max_output;
            int row = has_box ? shared.queue[batch + thread] : 0, group = has_box ? groups[row] : 0;
            Box box = has_box ? box_at(boxes, row) : Box{0.f, 0.f, 0.f, 0.f};
            if (alive)
                alive = !is_suppressed(shared, box, group, kept, overflow, shared.queue[batch], boxes, groups, keep,
                                       threshold);
            for (int first = 0; first < size && kept < max_output; first += kTile) {
                int mine = thread - first;  // position of this thread in the tile, if it is in it
                if (mine >= 0 && mine < kTile) {
                    shared.tile[mine] = box;
                    shared.tile_groups[mine] = group;
                    uint32_t word = __ballot_sync(kAllLanes, alive);
                    if (lane == 0) shared.tile_alive[mine / kWarp] = word;
                }
                __syncthreads();
                find_rivals(shared, threshold);
                __syncthreads();
                if (thread < kWarp) resolve_tile(shared);
                __syncthreads();
                uint32_t kept_low = shared.tile_kept[0], kept_high = shared.tile_kept[1];
                if (mine >= 0 && mine < kTile) {
                    uint32_t word = mine < kWarp ? kept_low : kept_high;
                    alive = word >> lane & 1u;
                    int place = kept + __popc(word & ((1u << lane) - 1u)) + (mine < kWarp ? 0 : __popc(kept_low));
                    if (alive && place < kKept) {
                        shared.kept[place] = box;
                        shared.kept_groups[place] = group;
                    }
                    if (alive && place == kKept) shared.warps[0] = row;
                }
                for (int half = 0; half < 2; half++)
                    for (uint32_t left = half ? kept_high : kept_low; alive && mine >= kTile && left; left &= left - 1u) {
                        int j = half * kWarp + __ffs(int(left)) - 1;
                        alive = !(shared.tile_groups[j] == group && overlaps(shared.tile[j], box, threshold));
                    }
                __syncthreads();
                int before = kept;
                kept += __popc(kept_low) + __popc(kept_high);
                if (before <= kKept && kept > kKept) overflow = shared.warps[0];
                if (thread >= first + kTile && kept >= max_output) alive = false;
            }
            if (has_box) keep[row] = alive;
            __syncthreads();
        }
    }
}

// One block: writes the first max_output rows of one image with keep[row] != 0, in order, padded with zeros.
__device__ inline void nms_compact(const int *keep, int num_boxes, int max_output, int *indices, int *num) {
    __shared__ int warps[kNmsWarps];
    int written = 0, thread = threadIdx.x;
    for (int64_t base = 0; base < num_boxes && written < max_output; base += kNmsThreads * kScanned) {
        bool is_kept[kScanned];
        int found = 0, total;
        int64_t row = base + thread * kScanned;
        for (int i = 0; i < kScanned; i++) {
            is_kept[i] = row + i < num_boxes && keep[row + i];
            found += is_kept[i];
        }
        int64_t place = written + int64_t(sum_before(found, warps, total));
        for (int i = 0; i < kScanned; i++)
            if (is_kept[i] && place < max_output) indices[place++] = int(row) + i;
        written += total;
    }
    if (written > max_output) written = max_output;
    for (int64_t place = int64_t(written) + thread; place < max_output; place += kNmsThreads) indices[place] = 0;
    if (thread == 0) *num = written;
}

}  // namespace maskrcnn

#endif
