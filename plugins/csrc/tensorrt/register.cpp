// libmaskrcnn_plugins_register.so: registers the plugins when it is loaded, for programs that only load a library
// (Triton's `plugins`, trtexec --staticPlugins, dlopen). It is a separate library because a registry rejects a library
// whose plugins are already registered. In other builds this file is empty.

#if defined(MASKRCNN_REGISTER_WHEN_LOADED)

#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

namespace {

#define TEXT_OF(value) #value
#define TEXT(value) TEXT_OF(value)

void fail(const char *found, const char *expected, const char *remedy) {
    fprintf(stderr, "maskrcnn plugins\nfound: %s\nexpected: %s\nfix: %s\n", found, expected, remedy);
}

// Path of libmaskrcnn_plugins.so beside this library.
bool find_plugins(char (&path)[PATH_MAX]) {
    Dl_info info;
    if (!dladdr(reinterpret_cast<const void *>(&find_plugins), &info) || !info.dli_fname) return false;
    const char *name = strrchr(info.dli_fname, '/');
    int folder = name ? int(name + 1 - info.dli_fname) : 0;
    int written = snprintf(path, sizeof path, "%.*slibmaskrcnn_plugins.so", folder, info.dli_fname);
    return written > 0 && written < PATH_MAX;
}

__attribute__((constructor)) void register_plugins() {
    const char *nvinfer = "libnvinfer.so." TEXT(NV_TENSORRT_MAJOR);
    void *library = dlopen(nvinfer, RTLD_NOW | RTLD_LOCAL);  // never closed: the registry stays in use
    if (!library) return fail(dlerror(), "TensorRT's library", "put its folder into LD_LIBRARY_PATH");
    using GetRegistry = nvinfer1::IPluginRegistry *(*)();
    auto get_registry = reinterpret_cast<GetRegistry>(dlsym(library, "getPluginRegistry"));
    char path[PATH_MAX];
    if (!get_registry || !find_plugins(path)) {
        return fail("no plugin registry, or no path of this library", "TensorRT 10 or newer", "report this as a bug");
    }
    if (!get_registry()->loadLibrary(path)) {
        fail(path, "a library that TensorRT loads, once", "look at TensorRT's messages before this one");
    }
}

}  // namespace

#endif
