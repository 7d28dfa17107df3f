// Greedy NMS inside each group of each image, in two kernels: which boxes stay, then where they go. plugins/contract.py
// says what is computed, README.md how and why so.

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

// Whether the IoU of two boxes is greater than the threshold, rounded as torchvision rounds on a CPU; false where it is
// not a number (two boxes without area, a coordinate that is not a number).
__host__ __device__ inline bool overlaps(const Box &a, const Box &b, float threshold) {
    float width = fmaxf(fminf(a.x2, b.x2) - fmaxf(a.x1, b.x1), 0.f);
    float height = fmaxf(fminf(a.y2, b.y2) - fmaxf(a.y1, b.y1), 0.f);
    float both = product(width, height);
    if (both == 0.f && threshold >= 0.f) return false;  // nearly all pairs
    float area_a = product(a.x2 - a.x1, a.y2 - a.y1), area_b = product(b.x2 - b.x1, b.y2 - b.y1);
    float either = area_a + area_b - both;
    // Far below the threshold, by more than all roundings together: a division less.
    if (threshold >= 0.f && either > 0.f && both < 0.99f * threshold * either) return false;
    return quotient(both, either) > threshold;
}

// The block of an image that sees to a group: groups that share a block are told apart by `overlaps_in_group`.
__host__ __device__ inline int bucket_of(int group, int buckets) { return int(uint32_t(group) % uint32_t(buckets)); }

// Blocks for an image of so many boxes: enough that each of 90 classes has its own where there are many boxes, and few
// where a block more would find nothing to do.
__host__ __device__ inline int buckets_for(int num_boxes) {
    int buckets = num_boxes / 32;
    return buckets < 1 ? 1 : (buckets > 128 ? 128 : buckets);
}

constexpr int kTile = 64;  // boxes among which the order of suppression is resolved at once

// Sizes that the tests set smaller, so that the paths of large inputs are taken by small ones.
#ifndef MASKRCNN_NMS_THREADS
#define MASKRCNN_NMS_THREADS 1024
#endif
#ifndef MASKRCNN_NMS_KEPT
#define MASKRCNN_NMS_KEPT 1024
#endif
constexpr int kNmsThreads = MASKRCNN_NMS_THREADS, kNmsWarps = kNmsThreads / kWarp;
constexpr int kScanned = 4;                   // positions that a thread looks at before the block meets
constexpr int kKept = MASKRCNN_NMS_KEPT;      // kept boxes that shared memory holds; more are read from global memory
static_assert(kNmsThreads % kTile == 0 && kNmsWarps <= kWarp, "a block of whole tiles and at most 32 warps");

// The sum over the threads before this one, and over all; a barrier comes before and after `warps` is used.
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
    int queue[kNmsThreads * kScanned];  // rows of the block's boxes that wait for their turn
    Box kept[kKept];
    int kept_groups[kKept];
    Box tile[kTile];
    int tile_groups[kTile];
    uint32_t tile_alive[2], tile_kept[2];
    uint32_t rivals[kTile][2];  // bit j of row i: box j of the tile comes first, is alive, and overlaps box i
    int warps[kNmsWarps];
};

// Warp 0 finds out which boxes of the tile stay. In each round those are decided all of whose rivals are: a box with
// a kept rival goes, one whose rivals are all gone stays. The first undecided box always is, so the rounds come to an
// end; there are as many as the longest chain of boxes, not as there are boxes.
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

// Whether a box kept in an earlier batch overlaps this one. Kept boxes beyond shared memory, of rows
// [overflow, before), are found again through `keep`, which this block has written for its own groups.
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

// One block: all groups g of one image with bucket_of(g) == bucket. boxes [K, 4], groups [K], keep [K] of that image.
// Writes keep[row] = 1 or 0 for the boxes of its groups, and 0 for its share of the rows from `count` on. After
// `max_output` kept boxes the others get 0: as they come later, none of them could be among the first max_output.
__device__ inline void nms_keep(const float *boxes, const int *groups, int count, int num_boxes, float threshold,
                                int max_output, int *keep, int bucket, int buckets) {
    __shared__ NmsShared shared;
    int thread = threadIdx.x, lane = thread % kWarp;
    count = count < 0 ? 0 : (count < num_boxes ? count : num_boxes);
    for (int64_t row = count + bucket * int64_t(kNmsThreads) + thread; row < num_boxes; row += buckets * int64_t(kNmsThreads))
        keep[row] = 0;
    int kept = 0;            // boxes of this block so far, the same number in every thread
    int overflow = num_boxes;  // the row of the first kept box that shared memory has no place for
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
                int mine = thread - first;  // this thread's place in the tile, if it has one
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

// One block: the rows of one image with keep[row] != 0, in order, at most max_output of them; zeros behind.
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
