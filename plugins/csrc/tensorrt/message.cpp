#include "message.h"

#include <stdarg.h>
#include <stdio.h>

#include <atomic>

namespace maskrcnn {
namespace {

std::atomic<nvinfer1::ILoggerFinder *> logger_finder{nullptr};

nvinfer1::ILogger *find_logger() noexcept {
    nvinfer1::ILoggerFinder *finder = logger_finder;
    try {
        return finder ? finder->findLogger() : nullptr;
    } catch (...) {
        return nullptr;
    }
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder *finder) noexcept { logger_finder = finder; }

void report(const char *op, const char *expected, const char *remedy, const char *found, ...) noexcept {
    char what[512], text[1024];
    va_list values;
    va_start(values, found);
    vsnprintf(what, sizeof what, found, values);
    va_end(values);
    snprintf(text, sizeof text, "maskrcnn::%s\nfound: %s\nexpected: %s\nfix: %s", op, what, expected, remedy);
    if (nvinfer1::ILogger *logger = find_logger()) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, text);
    } else {
        fprintf(stderr, "%s\n", text);
    }
}

}  // namespace maskrcnn
