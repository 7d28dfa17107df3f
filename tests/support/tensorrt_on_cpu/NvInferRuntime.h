// The part of TensorRT that docs/cpp/main.cpp uses, with an engine that detects two boxes in every image or returns
// outputs from files.
//
// A plan is a text: `plan`, then the maximum batch size and the minimum and maximum height and width of each profile. The
// engine writes its input image to the file FAKE_TENSORRT_IMAGES. FAKE_TENSORRT_OUTPUTS is a folder of outputs to return
// instead, in files named like the tensors: a line with the shape, then the values. The engine has `masks` and
// `keypoints` only if such files exist.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

namespace nvinfer1 {

struct Dims {
    int32_t nbDims = 0;
    int64_t d[8] = {};
};
struct Dims2 : Dims {
    Dims2(int64_t a, int64_t b) : Dims{2, {a, b}} {}
};
struct Dims4 : Dims {
    Dims4(int64_t a, int64_t b, int64_t c, int64_t e) : Dims{4, {a, b, c, e}} {}
};
enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kINT64 = 8 };
enum class OptProfileSelector : int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };

class ILogger {
public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3 };
    virtual void log(Severity severity, const char *message) noexcept = 0;
    virtual ~ILogger() = default;
};

struct Profile {
    int64_t batch, least_height, most_height, least_width, most_width;
};

constexpr int64_t kRows = 5;  // of the outputs

struct Output {
    Dims shape;
    std::string values;
};

inline std::optional<Output> given_output(const std::string &name) {
    const char *folder = std::getenv("FAKE_TENSORRT_OUTPUTS");
    if (!folder) return std::nullopt;
    std::ifstream file(folder + ("/" + name), std::ios::binary);
    std::string line;
    if (!std::getline(file, line)) return std::nullopt;
    Output output;
    std::istringstream sides(line);
    for (int64_t side; sides >> side;) output.shape.d[output.shape.nbDims++] = side;
    output.values.assign(std::istreambuf_iterator<char>(file), {});
    return output;
}

class IExecutionContext {
public:
    explicit IExecutionContext(std::vector<Profile> profiles) : profiles_(std::move(profiles)) {}

    bool setOptimizationProfileAsync(int32_t profile, cudaStream_t) noexcept {
        profile_ = profile;
        return true;
    }

    bool setInputShape(const char *name, const Dims &shape) noexcept {
        const Profile &p = profiles_[size_t(profile_)];
        bool fits = std::string(name) != "images" ||
                    (shape.d[0] <= p.batch && shape.d[2] >= p.least_height && shape.d[2] <= p.most_height &&
                     shape.d[3] >= p.least_width && shape.d[3] <= p.most_width);
        shapes_[name] = shape;
        return fits;
    }

    Dims getTensorShape(const char *name) const noexcept {
        auto found = shapes_.find(name);
        if (found != shapes_.end()) return found->second;
        if (auto given = given_output(name)) return given->shape;
        std::string output = name;
        if (output == "num_detections") return Dims{1, {1}};
        if (output == "boxes") return Dims{3, {1, kRows, 4}};
        return Dims{2, {1, kRows}};
    }

    bool setTensorAddress(const char *name, void *address) noexcept {
        addresses_[name] = address;
        return true;
    }

    bool enqueueV3(cudaStream_t) noexcept {
        Dims shape = shapes_.at("images");
        if (const char *path = std::getenv("FAKE_TENSORRT_IMAGES")) {
            std::ofstream file(path, std::ios::binary);
            file << shape.d[2] << " " << shape.d[3] << "\n";
            file.write(static_cast<const char *>(addresses_.at("images")), shape.d[1] * shape.d[2] * shape.d[3] * 4);
        }
        const int64_t *size = static_cast<const int64_t *>(addresses_.at("image_sizes"));
        float height = float(size[0]), width = float(size[1]);
        float boxes[2][4] = {{0, 0, width, height}, {width / 2, height / 4, width, height / 2}};
        float scores[2] = {0.9f, 0.4f};
        int64_t labels[2] = {3, 1};
        int32_t count = 2;
        put("num_detections", &count, sizeof count);
        put("boxes", boxes, sizeof boxes);
        put("scores", scores, sizeof scores);
        put("labels", labels, sizeof labels);
        for (const char *name : {"masks", "keypoints"}) put(name, nullptr, 0);
        return true;
    }

private:
    // The values that a test gives, or these.
    void put(const char *name, const void *values, size_t bytes) {
        auto given = given_output(name);
        if (given) std::memcpy(addresses_.at(name), given->values.data(), given->values.size());
        else if (values) std::memcpy(addresses_.at(name), values, bytes);
    }

    std::vector<Profile> profiles_;
    int32_t profile_ = 0;
    std::map<std::string, Dims> shapes_;
    std::map<std::string, void *> addresses_;
};

class ICudaEngine {
public:
    explicit ICudaEngine(std::vector<Profile> profiles) : profiles_(std::move(profiles)) {
        for (const char *name : {"masks", "keypoints"}) {
            if (given_output(name)) names_.push_back(name);
        }
    }

    int32_t getNbOptimizationProfiles() const noexcept { return int32_t(profiles_.size()); }

    Dims getProfileShape(const char *, int32_t profile, OptProfileSelector which) const noexcept {
        const Profile &p = profiles_[size_t(profile)];
        if (which == OptProfileSelector::kMIN) return Dims4{1, 3, p.least_height, p.least_width};
        return Dims4{p.batch, 3, p.most_height, p.most_width};
    }

    IExecutionContext *createExecutionContext() noexcept { return new IExecutionContext(profiles_); }
    int32_t getNbIOTensors() const noexcept { return int32_t(names_.size()); }
    const char *getIOTensorName(int32_t k) const noexcept { return names_[size_t(k)]; }

    DataType getTensorDataType(const char *name) const noexcept {
        std::string tensor = name;
        if (tensor == "num_detections") return DataType::kINT32;
        return tensor == "image_sizes" || tensor == "labels" ? DataType::kINT64 : DataType::kFLOAT;
    }

private:
    std::vector<const char *> names_ = {"images", "image_sizes", "num_detections", "boxes", "scores", "labels"};
    std::vector<Profile> profiles_;
};

class IRuntime {
public:
    void setEngineHostCodeAllowed(bool) noexcept {}

    ICudaEngine *deserializeCudaEngine(const void *plan, size_t bytes) noexcept {
        std::istringstream text(std::string(static_cast<const char *>(plan), bytes));
        std::string word;
        std::vector<Profile> profiles;
        if (!(text >> word) || word != "plan") return nullptr;
        Profile p{};
        while (text >> p.batch >> p.least_height >> p.most_height >> p.least_width >> p.most_width) profiles.push_back(p);
        return new ICudaEngine(profiles);
    }
};

class IPluginRegistry {
public:
    void *loadLibrary(const char *path) noexcept {
        std::fprintf(stderr, "loaded %s\n", path);
        return std::ifstream(path) ? this : nullptr;
    }
};

inline IRuntime *createInferRuntime(ILogger &) { return new IRuntime; }

}  // namespace nvinfer1

inline nvinfer1::IPluginRegistry *getPluginRegistry() {
    static nvinfer1::IPluginRegistry registry;
    return &registry;
}
