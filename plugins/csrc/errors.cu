// Messages for the codes of the C interface.

#include "launch.h"

const char *maskrcnn_error_string(int code) {
    if (code == 0) return "no error";
    if (code == MASKRCNN_INVALID) return "an argument outside what kernels.h allows; nothing was launched";
#if defined(MASKRCNN_ON_CPU)
    return "unknown error";
#else
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
}

int maskrcnn_kernels_version(void) { return MASKRCNN_KERNELS_VERSION; }
