// Base classes of the plugins: everything of an IPluginV3 and its creator that does not depend on the op.

#ifndef MASKRCNN_TENSORRT_PLUGIN_H
#define MASKRCNN_TENSORRT_PLUGIN_H

#include <NvInferRuntime.h>

#include <new>

#include "../kernels.h"
#include "fields.h"
#include "message.h"

#if NV_TENSORRT_MAJOR < 10
#error "the plugins need the headers of TensorRT 10 or newer"
#endif

namespace maskrcnn {

constexpr const char *kNamespace = "maskrcnn";
constexpr const char *kVersion = "1";
constexpr int32_t kFailed = -1;  // TensorRT treats any value but 0 as failure

// Reports a kernel that was not launched or an earlier CUDA error; returns the code.
inline int32_t launched(const char *op, int code) noexcept {
    if (code) {
        const char *remedy = "if the code is CUDA's, look at the errors before this one; otherwise report it";
        report(op, "a launched kernel", remedy, "%s (code %d)", maskrcnn_error_string(code), code);
    }
    return code;
}

// Op derives from this class and defines kName and kFields; clone() copies it.
template <class Op, class Attributes_>
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
public:
    using Attributes = Attributes_;

    explicit Plugin(const Attributes &attributes) noexcept : attributes_(attributes) {
        describe(Op::kFields, attributes_, description_);
    }

    nvinfer1::IPluginCapability *getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore *>(this);
            case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild *>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime *>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3 *clone() noexcept override {
        return new (std::nothrow) Op(static_cast<const Op &>(*this));
    }

    const char *getPluginName() const noexcept override { return Op::kName; }
    const char *getPluginVersion() const noexcept override { return kVersion; }
    const char *getPluginNamespace() const noexcept override { return kNamespace; }

    // One tactic, whose time depends on shapes, formats and the attributes.
    const char *getTimingCacheID() noexcept override { return description_; }
    const char *getMetadataString() noexcept override { return description_; }

    // The plugins use no resources of the context.
    nvinfer1::IPluginV3 *attachToContext(nvinfer1::IPluginResourceContext *) noexcept override { return clone(); }

    const nvinfer1::PluginFieldCollection *getFieldsToSerialize() noexcept override {
        serialized_ = plugin_fields(Op::kFields, &attributes_);
        collection_.nbFields = int32_t(serialized_.size());
        collection_.fields = serialized_.data();
        return &collection_;
    }

protected:
    const Attributes attributes_;

private:
    char description_[256];
    std::array<nvinfer1::PluginField, Attributes::kCount> serialized_;
    nvinfer1::PluginFieldCollection collection_;
};

template <class Op>
class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    // For a node of a network or a serialized plugin, which has all fields.
    nvinfer1::IPluginV3 *createPlugin(const char *, const nvinfer1::PluginFieldCollection *fields,
                                      nvinfer1::TensorRTPhase) noexcept override {
        typename Op::Attributes attributes;
        if (!read_fields(Op::kName, fields, Op::kFields, attributes)) return nullptr;
        return new (std::nothrow) Op(attributes);
    }

    const nvinfer1::PluginFieldCollection *getFieldNames() noexcept override { return &collection_; }
    const char *getPluginName() const noexcept override { return Op::kName; }
    const char *getPluginVersion() const noexcept override { return kVersion; }
    const char *getPluginNamespace() const noexcept override { return kNamespace; }

private:
    const std::array<nvinfer1::PluginField, Op::Attributes::kCount> names_ =
        plugin_fields<typename Op::Attributes>(Op::kFields, nullptr);
    const nvinfer1::PluginFieldCollection collection_{int32_t(names_.size()), names_.data()};
};

// One creator per op, created on first use and never destroyed: the registry may outlive this library's static
// objects.
nvinfer1::IPluginCreatorInterface *multilevel_roi_align_creator() noexcept;
nvinfer1::IPluginCreatorInterface *batched_nms_creator() noexcept;

}  // namespace maskrcnn

#endif
