// Kernel launches of the C interface: by the CUDA runtime, or by the tests' emulation on a CPU. NVRTC compiles only the
// kernels of launch.cu, whose host part is repeated by plugins/nvrtc.py.

#ifndef MASKRCNN_LAUNCH_H
#define MASKRCNN_LAUNCH_H

#include "device.h"
#include "kernels.h"

#if !defined(__CUDACC_RTC__)

#if defined(MASKRCNN_ON_CPU)
#define MASKRCNN_LAUNCH(kernel, grid, threads, stream, ...) \
    cuda_on_cpu::launch(grid, threads, [&] { kernel(__VA_ARGS__); })
#else
#define MASKRCNN_LAUNCH(kernel, grid, threads, stream, ...) \
    (kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), int(cudaGetLastError()))
#endif

namespace maskrcnn {

constexpr int64_t kMostBlocks = 0x7fffffff;  // along x; 65535 along y and z
constexpr int64_t kMostRows = 65535;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace maskrcnn

#endif
#endif
