// Runs a TensorRT engine of `maskrcnn build-engine` on one image and prints the detections by descending score:
//
//   detect model.fp16.engine photo.ppm [--plugins libmaskrcnn_plugins.so] [--min-size PX] [--max-size PX]
//          [--score 0.5] [--masks masks.pgm] [--version-compatible]
//
//   label 3 score 0.9000 box 12.50 8.00 150.00 120.00 [keypoints 20.00 31.25 7.1000 ...]
//
// A keypoint is x, y and score; models without a keypoint head print none. `--masks` writes an image of the same size
// whose pixels are line numbers from 1, 0 for background; where masks overlap, the first line keeps the pixel.
// The resize parameters come from model.fp16.engine.json, or from --min-size and --max-size.
// The engine's tensors are those of docs/contracts.md. An engine with ahead-of-time plugins needs no library.

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>

#include "image.h"
#include "masks.h"
#include "options.h"

namespace {

using nvinfer1::OptProfileSelector;

constexpr int kDivisor = 32;  // heights and widths are padded to a multiple of it

class Logger : public nvinfer1::ILogger {
    void log(Severity severity, const char *message) noexcept override {
        if (severity <= Severity::kWARNING) std::fprintf(stderr, "TensorRT: %s\n", message);
    }
};

void check(cudaError_t status, const char *what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <typename T>
T *wanted(T *object, const std::string &what) {
    if (!object) throw std::runtime_error(what);
    return object;
}

std::vector<char> bytes_of(const std::string &path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) throw std::runtime_error(path + " cannot be opened");
    std::vector<char> bytes(static_cast<size_t>(file.tellg()));
    file.seekg(0).read(bytes.data(), std::streamsize(bytes.size()));
    return bytes;
}

// A buffer on the GPU and its host copy.
class Tensor {
public:
    Tensor(size_t bytes, const nvinfer1::Dims &dims) : host(bytes), shape(dims) {
        check(cudaMalloc(&device_, std::max<size_t>(bytes, 1)), "memory");
    }
    ~Tensor() { cudaFree(device_); }
    Tensor(const Tensor &) = delete;
    Tensor &operator=(const Tensor &) = delete;

    void *device() const { return device_; }
    void upload(cudaStream_t stream) { copy(device_, host.data(), cudaMemcpyHostToDevice, stream); }
    void download(cudaStream_t stream) { copy(host.data(), device_, cudaMemcpyDeviceToHost, stream); }

    template <typename T>
    const T *as() const {
        return reinterpret_cast<const T *>(host.data());
    }

    std::vector<char> host;
    const nvinfer1::Dims shape;

private:
    void copy(void *to, const void *from, cudaMemcpyKind kind, cudaStream_t stream) {
        check(cudaMemcpyAsync(to, from, host.size(), kind, stream), "copying");
    }

    void *device_ = nullptr;
};

using Tensors = std::map<std::string, std::unique_ptr<Tensor>>;

// Returns the profile that accepts one image of this size, and enlarges `padded` to its minimum.
int choose_profile(const nvinfer1::ICudaEngine &engine, maskrcnn::Size &padded) {
    for (int profile = 0; profile < engine.getNbOptimizationProfiles(); ++profile) {
        auto least = engine.getProfileShape("images", profile, OptProfileSelector::kMIN);
        auto most = engine.getProfileShape("images", profile, OptProfileSelector::kMAX);
        if (least.nbDims != 4 || most.nbDims != 4) throw std::runtime_error("an engine without an input `images`");
        if (least.d[0] <= 1 && padded.height <= most.d[2] && padded.width <= most.d[3]) {
            padded.height = std::max(padded.height, int(least.d[2]));
            padded.width = std::max(padded.width, int(least.d[3]));
            return profile;
        }
    }
    throw std::runtime_error("no profile of the engine takes one image of " + std::to_string(padded.height) + "x" +
                             std::to_string(padded.width) + "; build it with another --batch or --size");
}

size_t bytes_of(nvinfer1::DataType type, const nvinfer1::Dims &shape) {
    static const std::map<nvinfer1::DataType, size_t> sizes = {
        {nvinfer1::DataType::kFLOAT, 4}, {nvinfer1::DataType::kINT32, 4}, {nvinfer1::DataType::kINT64, 8}};
    auto found = sizes.find(type);
    if (found == sizes.end()) throw std::runtime_error("a tensor of a type that the detector does not have");
    size_t bytes = found->second;
    for (int axis = 0; axis < shape.nbDims; ++axis) bytes *= size_t(std::max<int64_t>(shape.d[axis], 0));
    return bytes;
}

// Factors from pixels of the network's input to pixels of the image.
struct Scale {
    float across, down;
};

std::vector<maskrcnn::Box> boxes_above(float least_score, const Tensors &tensors, Scale scale) {
    int count = *tensors.at("num_detections")->as<int32_t>();
    const float *box = tensors.at("boxes")->as<float>(), *scores = tensors.at("scores")->as<float>();
    std::vector<maskrcnn::Box> boxes;
    for (int k = 0; k < count && scores[k] >= least_score; ++k, box += 4) {
        boxes.push_back({box[0] * scale.across, box[1] * scale.down, box[2] * scale.across, box[3] * scale.down});
    }
    return boxes;
}

void print_keypoints(const Tensor &keypoints, size_t k, Scale scale) {
    int64_t points = keypoints.shape.d[2];
    const float *point = keypoints.as<float>() + int64_t(k) * points * 3;
    std::printf(" keypoints");
    for (int64_t j = 0; j < points; ++j, point += 3) {
        std::printf(" %.2f %.2f %.4f", point[0] * scale.across, point[1] * scale.down, point[2]);
    }
}

void print(const std::vector<maskrcnn::Box> &boxes, const Tensors &tensors, Scale scale) {
    const float *scores = tensors.at("scores")->as<float>();
    const int64_t *labels = tensors.at("labels")->as<int64_t>();
    for (size_t k = 0; k < boxes.size(); ++k) {
        const maskrcnn::Box &box = boxes[k];
        std::printf("label %lld score %.4f box %.2f %.2f %.2f %.2f", static_cast<long long>(labels[k]), scores[k],
                    box.left, box.top, box.right, box.bottom);
        if (tensors.count("keypoints")) print_keypoints(*tensors.at("keypoints"), k, scale);
        std::printf("\n");
    }
}

void write_masks(const std::string &path, const std::vector<maskrcnn::Box> &boxes, const Tensor &masks,
                 maskrcnn::Size size) {
    if (boxes.size() > 65535) throw std::runtime_error("more masks than a PGM file has numbers for");
    int side = int(masks.shape.d[2]);
    maskrcnn::NumberedPixels image{size, std::vector<uint16_t>(size_t(size.height) * size.width)};
    for (size_t k = 0; k < boxes.size(); ++k) {
        const float *mask = masks.as<float>() + k * size_t(side) * side;
        maskrcnn::paste_mask(mask, side, boxes[k], uint16_t(k + 1), image);
    }
    maskrcnn::write_pgm(path, image, int(boxes.size()));
}

void detect(const maskrcnn::Options &options) {
    auto image = maskrcnn::read_ppm(options.image);
    auto resized = maskrcnn::resized_size(image.size, options.min_size, options.max_size);
    auto padded = maskrcnn::padded_size(resized, kDivisor);
    auto plan = bytes_of(options.engine);

    check(cudaFree(nullptr), "no GPU");  // initialises CUDA: TensorRT may crash without a driver
    Logger logger;
    std::unique_ptr<nvinfer1::IRuntime> runtime(
        wanted(nvinfer1::createInferRuntime(logger), "TensorRT cannot be started"));
    runtime->setEngineHostCodeAllowed(options.is_version_compatible);
    if (!options.plugins.empty()) {
        wanted(getPluginRegistry()->loadLibrary(options.plugins.c_str()),
               options.plugins + " is not a plugin library for this TensorRT");
    }
    std::unique_ptr<nvinfer1::ICudaEngine> engine(
        wanted(runtime->deserializeCudaEngine(plan.data(), plan.size()),
               options.engine + " is not an engine for this machine: see TensorRT's messages, and rebuild it here"));
    std::unique_ptr<nvinfer1::IExecutionContext> context(
        wanted(engine->createExecutionContext(), "no memory for an execution context"));

    cudaStream_t stream = nullptr;
    check(cudaStreamCreate(&stream), "a stream");
    int profile = choose_profile(*engine, padded);
    if (!context->setOptimizationProfileAsync(profile, stream) ||
        !context->setInputShape("images", nvinfer1::Dims4{1, 3, padded.height, padded.width}) ||
        !context->setInputShape("image_sizes", nvinfer1::Dims2{1, 2})) {
        throw std::runtime_error("the engine does not take these shapes");
    }

    Tensors tensors;
    for (int k = 0; k < engine->getNbIOTensors(); ++k) {
        const char *name = engine->getIOTensorName(k);
        auto shape = context->getTensorShape(name);
        tensors[name] = std::make_unique<Tensor>(bytes_of(engine->getTensorDataType(name), shape), shape);
        context->setTensorAddress(name, tensors[name]->device());
    }
    for (const char *name : {"images", "image_sizes", "num_detections", "boxes", "scores", "labels"}) {
        if (!tensors.count(name)) throw std::runtime_error(std::string("an engine without a tensor ") + name);
    }
    if (!options.masks.empty() && !tensors.count("masks")) {
        throw std::runtime_error("an engine without a tensor masks: --masks needs a model with a mask head");
    }

    auto pixels = maskrcnn::network_input(image, resized, padded);
    int64_t sizes[2] = {resized.height, resized.width};
    std::memcpy(tensors["images"]->host.data(), pixels.data(), pixels.size() * sizeof(float));
    std::memcpy(tensors["image_sizes"]->host.data(), sizes, sizeof sizes);
    for (const char *name : {"images", "image_sizes"}) tensors[name]->upload(stream);
    if (!context->enqueueV3(stream)) throw std::runtime_error("TensorRT did not run the engine");
    for (const char *name : {"num_detections", "boxes", "scores", "labels", "masks", "keypoints"}) {
        if (tensors.count(name)) tensors[name]->download(stream);
    }
    check(cudaStreamSynchronize(stream), "running the engine");
    cudaStreamDestroy(stream);

    Scale scale = {float(image.size.width) / float(resized.width), float(image.size.height) / float(resized.height)};
    auto boxes = boxes_above(options.score, tensors, scale);
    print(boxes, tensors, scale);
    if (!options.masks.empty()) write_masks(options.masks, boxes, *tensors["masks"], image.size);
}

}  // namespace

int main(int count, char **words) {
    try {
        detect(maskrcnn::options_of(count, words));
    } catch (const std::exception &error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
    return 0;
}
