// Entry points of a plugin library (IPluginRegistry::loadLibrary, trtexec --dynamicPlugins).

#include <dlfcn.h>

#include <atomic>

#include "../kernels.h"
#include "message.h"
#include "plugin.h"

namespace maskrcnn {
namespace {

std::atomic<bool> fits{true};  // compiled for the TensorRT version that loads the library

// Major version of the TensorRT library that contains an object's class; 0 if unknown.
int major_version_of(const void *object) {
    const void *first_method = **static_cast<const void *const *const *>(object);
    Dl_info info;
    if (!dladdr(first_method, &info) || !info.dli_fname) return 0;
    void *library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return 0;
    auto version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
    int major = version ? version() / 10000 : 0;
    dlclose(library);
    return major;
}

}  // namespace
}  // namespace maskrcnn

extern "C" {

// Called by TensorRT first. A logger of another major version has other virtual methods, so it is not used, and no
// creators are returned.
MASKRCNN_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder *finder) {
    int major = finder ? maskrcnn::major_version_of(finder) : 0;
    maskrcnn::fits = major == 0 || major == NV_TENSORRT_MAJOR;
    maskrcnn::set_logger_finder(maskrcnn::fits ? finder : nullptr);
    if (!maskrcnn::fits) {
        maskrcnn::report("plugins", "a library compiled for the TensorRT that loads it",
                         "run `maskrcnn build-plugins` with the headers of this version, or load the library made so",
                         "a library compiled for TensorRT %d, loaded by TensorRT %d", NV_TENSORRT_MAJOR, major);
    }
}

MASKRCNN_EXPORT nvinfer1::IPluginCreatorInterface *const *getCreators(int32_t &count) {
    static nvinfer1::IPluginCreatorInterface *const creators[] = {
        maskrcnn::multilevel_roi_align_creator(),
        maskrcnn::batched_nms_creator(),
    };
    count = maskrcnn::fits ? int32_t(sizeof creators / sizeof *creators) : 0;
    return creators;
}
}
