// Errors for the user, through the logger of the TensorRT that loaded the library.

#ifndef MASKRCNN_TENSORRT_MESSAGE_H
#define MASKRCNN_TENSORRT_MESSAGE_H

#include <NvInferRuntime.h>

namespace maskrcnn {

// Takes over TensorRT's way to its logger. Before that, and where there is no logger, messages go to stderr.
void set_logger_finder(nvinfer1::ILoggerFinder *finder) noexcept;

// Reports what came (as printf writes it), what was expected and what to do; never throws, never allocates.
void report(const char *op, const char *expected, const char *remedy, const char *came, ...) noexcept
    __attribute__((format(printf, 4, 5)));

}  // namespace maskrcnn

#endif
