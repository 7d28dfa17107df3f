// GPU emulation for tests: runs CUDA kernels, compiled by a C++ compiler, on one CPU thread.
//
// Every CUDA thread of a block is a coroutine with its own stack. Barriers and warp operations switch between them, so
// kernels run unchanged, with barriers, shared memory and shuffles. Errors that hang or are undefined on a GPU end the
// process with a message: a barrier that not all threads reach, lanes in different warp operations, an invalid grid.
//
// CUDA_ON_CPU_ORDER sets the order of blocks, and of threads between two barriers. forward, backward: one warp after the
// other, each as far as possible; shuffled: random warps, each up to its next warp operation. A kernel without a necessary
// barrier gives different results in one of them. Shared memory is filled with NaN before each block.

#ifndef CUDA_ON_CPU_H
#define CUDA_ON_CPU_H

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;
enum class Waits { no, for_block, for_warp, finished };
enum class WarpCall { none, ballot, shuffle };

struct Thread {
    jmp_buf place;
    bool has_begun = false;
    Waits waits = Waits::no;
    WarpCall call = WarpCall::none;
    int calls = 0;  // warp operations so far: even and odd ones have slots of their own
    char *stack = nullptr;
};

struct Gpu {
    dim3 grid, block, block_index, thread_index;
    std::vector<Thread> threads;
    std::vector<uint64_t> slots[2];  // what each thread gave to its warp
    int current = 0;
    jmp_buf scheduler;
    std::function<void()> kernel;
    std::mt19937 shuffle{1};
    std::string order;
};

inline Gpu &gpu() {
    static Gpu one;
    return one;
}

[[noreturn]] inline void fail(const char *why) {
    Gpu &g = gpu();
    fprintf(stderr, "cuda_on_cpu: %s (block %u %u %u, thread %d)\n", why, g.block_index.x, g.block_index.y,
            g.block_index.z, g.current);
    abort();
}

inline void pause(Waits waits) {
    Gpu &g = gpu();
    Thread &thread = g.threads[g.current];
    thread.waits = waits;
    if (_setjmp(thread.place) == 0) _longjmp(g.scheduler, 1);
}

inline void body() {
    gpu().kernel();
    Thread &thread = gpu().threads[gpu().current];
    thread.waits = Waits::finished;
    _longjmp(gpu().scheduler, 1);
}

// Gives control to a thread until it waits or ends.
inline void resume(int index) {
    Gpu &g = gpu();
    Thread &thread = g.threads[index];
    g.current = index;
    g.thread_index = dim3(index % g.block.x, index / g.block.x % g.block.y, index / (g.block.x * g.block.y));
    if (_setjmp(g.scheduler) != 0) return;
    if (thread.has_begun) _longjmp(thread.place, 1);
    thread.has_begun = true;
    static ucontext_t here, there;
    getcontext(&there);
    there.uc_stack.ss_sp = thread.stack;
    there.uc_stack.ss_size = kStackBytes;
    there.uc_link = nullptr;
    makecontext(&there, body, 0);
    swapcontext(&here, &there);
}

inline std::vector<int> in_order(int first, int last) {
    Gpu &g = gpu();
    std::vector<int> indices(last - first);
    std::iota(indices.begin(), indices.end(), first);
    if (g.order == "backward") std::reverse(indices.begin(), indices.end());
    if (g.order == "shuffled") std::shuffle(indices.begin(), indices.end(), g.shuffle);
    return indices;
}

// Lets the threads of a warp run until each of them waits or ends; whether they waited for each other, and can go on.
inline bool step(int warp) {
    Gpu &g = gpu();
    int first = warp * kLanes, last = std::min(first + kLanes, int(g.threads.size())), waiting = 0;
    for (int index : in_order(first, last))
        if (g.threads[index].waits == Waits::no) resume(index);
    for (int i = first; i < last; i++) waiting += g.threads[i].waits == Waits::for_warp;
    if (waiting == 0) return false;
    if (waiting < last - first) fail("a warp operation that not all lanes of the warp reach");
    for (int i = first; i < last; i++) {
        if (g.threads[i].call != g.threads[first].call) fail("lanes of a warp in different warp operations");
        g.threads[i].waits = Waits::no;
    }
    return true;
}

// Lets all threads run until they end or wait for the block.
inline void run_warps() {
    Gpu &g = gpu();
    std::vector<int> running = in_order(0, int((g.threads.size() + kLanes - 1) / kLanes));
    if (g.order != "shuffled") {
        for (int warp : running)
            while (step(warp)) continue;
        return;
    }
    while (!running.empty()) {
        size_t chosen = g.shuffle() % running.size();
        if (!step(running[chosen])) running.erase(running.begin() + chosen);
    }
}

inline void run_block() {
    Gpu &g = gpu();
    for (Thread &thread : g.threads) thread.has_begun = false, thread.waits = Waits::no, thread.calls = 0;
    while (true) {
        run_warps();
        size_t waiting = 0, finished = 0;
        for (Thread &thread : g.threads)
            waiting += thread.waits == Waits::for_block, finished += thread.waits == Waits::finished;
        if (finished == g.threads.size()) return;
        if (waiting == 0 || finished > 0) fail("a barrier that not all threads of the block reach");
        for (Thread &thread : g.threads) thread.waits = Waits::no;
    }
}

extern "C" char __start_cuda_shared[] __attribute__((weak));
extern "C" char __stop_cuda_shared[] __attribute__((weak));

inline void prepare(dim3 grid, dim3 block) {
    Gpu &g = gpu();
    size_t count = size_t(block.x) * block.y * block.z;
    if (count == 0 || count > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff ||
        grid.y > 65535 || grid.z > 65535)
        fail("an impossible grid");
    const char *wanted = getenv("CUDA_ON_CPU_ORDER");
    g.order = wanted ? wanted : "forward";
    g.grid = grid, g.block = block;
    for (size_t i = count; i < g.threads.size(); i++) munmap(g.threads[i].stack, kStackBytes);
    size_t before = std::min(g.threads.size(), count);
    g.threads.resize(count);
    for (size_t i = before; i < count; i++)
        g.threads[i].stack = static_cast<char *>(
            mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    g.slots[0].assign(count, 0), g.slots[1].assign(count, 0);
}

inline int launch(dim3 grid, dim3 block, std::function<void()> kernel) {
    prepare(grid, block);
    Gpu &g = gpu();
    g.kernel = kernel;
    int64_t count = int64_t(grid.x) * grid.y * grid.z;
    std::vector<int> shuffled = g.order == "shuffled" ? in_order(0, int(count)) : std::vector<int>();
    for (int64_t i = 0; i < count; i++) {
        int64_t block = !shuffled.empty() ? shuffled[i] : g.order == "backward" ? count - 1 - i : i;
        g.block_index = dim3(block % grid.x, block / grid.x % grid.y, block / (grid.x * grid.y));
        if (__start_cuda_shared) memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
        run_block();
    }
    return 0;
}

// Every lane gives a value; afterwards each reads those of its warp.
inline const uint64_t *exchange(unsigned mask, uint64_t value, WarpCall call) {
    Gpu &g = gpu();
    if (mask != 0xffffffffu) fail("a warp operation with a mask of some lanes only");
    Thread &thread = g.threads[g.current];
    std::vector<uint64_t> &slots = g.slots[thread.calls++ % 2];
    slots[g.current] = value;
    thread.call = call;
    pause(Waits::for_warp);
    return slots.data() + g.current / kLanes * kLanes;
}

inline int lane() { return gpu().current % kLanes; }

template <class T>
T shuffled(unsigned mask, T value, int from) {
    uint64_t given = 0;
    static_assert(sizeof value <= sizeof given, "a value of at most 8 bytes");
    memcpy(&given, &value, sizeof value);
    const uint64_t *all = exchange(mask, given, WarpCall::shuffle);
    memcpy(&value, &all[from], sizeof value);
    return value;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::gpu().thread_index)
#define blockIdx (cuda_on_cpu::gpu().block_index)
#define blockDim (cuda_on_cpu::gpu().block)
#define gridDim (cuda_on_cpu::gpu().grid)

inline void __syncthreads() { cuda_on_cpu::pause(cuda_on_cpu::Waits::for_block); }

inline float atomicAdd(float *to, float value) {
    float before = *to;
    *to += value;
    return before;
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
    const uint64_t *all = cuda_on_cpu::exchange(mask, predicate, cuda_on_cpu::WarpCall::ballot);
    unsigned bits = 0;
    for (int i = 0; i < cuda_on_cpu::kLanes; i++) bits |= unsigned(all[i] != 0) << i;
    return bits;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
    return cuda_on_cpu::shuffled(mask, value, from & (cuda_on_cpu::kLanes - 1));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return cuda_on_cpu::shuffled(mask, value, cuda_on_cpu::lane() ^ bits);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
    int from = cuda_on_cpu::lane() - distance;
    return cuda_on_cpu::shuffled(mask, value, from < 0 ? cuda_on_cpu::lane() : from);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

#endif
