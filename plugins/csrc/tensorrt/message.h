// Error messages, through the logger of the TensorRT that loaded the library.

#ifndef MASKRCNN_TENSORRT_MESSAGE_H
#define MASKRCNN_TENSORRT_MESSAGE_H

#include <NvInferRuntime.h>

namespace maskrcnn {

// Sets the finder of TensorRT's logger. Without one, or without a logger, messages go to stderr.
void set_logger_finder(nvinfer1::ILoggerFinder *finder) noexcept;

// Reports what was found (a printf format), what was expected and how to fix it; never throws and never allocates.
void report(const char *op, const char *expected, const char *remedy, const char *found, ...) noexcept
    __attribute__((format(printf, 4, 5)));

}  // namespace maskrcnn

#endif
