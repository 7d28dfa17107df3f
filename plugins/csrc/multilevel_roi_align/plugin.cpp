// MultilevelRoiAlign of plugins/contract.py as a TensorRT plugin.

#include "../kernels.h"
#include "../tensorrt/plugin.h"

namespace maskrcnn {
namespace {

using nvinfer1::DataType;
using nvinfer1::TensorFormat;

struct RoiAlignAttributes {
    static constexpr size_t kCount = 7;
    int32_t output_size = 0, sampling_ratio = 0, aligned = 0;
    int32_t min_level = 2, canonical_level = 4;
    float canonical_size = 224.f, level_epsilon = 1e-6f;
};

bool is_feature_type(DataType type) {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

// Channels-last formats: padded to a multiple of 8 channels for the half types, unpadded for FP32.
bool is_channels_last(DataType type, TensorFormat format) {
    return format == (type == DataType::kFLOAT ? TensorFormat::kHWC : TensorFormat::kHWC8);
}

maskrcnn_dtype dtype_of(DataType type) {
    return type == DataType::kHALF   ? MASKRCNN_FLOAT16
           : type == DataType::kBF16 ? MASKRCNN_BFLOAT16
                                     : MASKRCNN_FLOAT32;
}

class MultilevelRoiAlign final : public Plugin<MultilevelRoiAlign, RoiAlignAttributes> {
public:
    static constexpr const char *kName = "MultilevelRoiAlign";
    static constexpr Fields<RoiAlignAttributes, RoiAlignAttributes::kCount> kFields{{
        {"output_size", &RoiAlignAttributes::output_size, 1, 32767, kRequired},
        {"sampling_ratio", &RoiAlignAttributes::sampling_ratio, 0, 32767, kRequired},
        {"aligned", &RoiAlignAttributes::aligned, 0, 1, kRequired},
        {"min_level", &RoiAlignAttributes::min_level, 0, 30},
        {"canonical_level", &RoiAlignAttributes::canonical_level, -100, 100},
        {"canonical_size", &RoiAlignAttributes::canonical_size, 1e-6, 1e9},
        {"level_epsilon", &RoiAlignAttributes::level_epsilon, 0, 1},
    }};
    using Plugin::Plugin;

    // Build

    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t getOutputDataTypes(DataType *outputs, int32_t, const DataType *inputs,
                               int32_t num_inputs) const noexcept override {
        if (!has_levels(num_inputs)) return kFailed;
        for (int32_t l = 0; l < num_inputs - 1; l++) {
            if (is_feature_type(inputs[l]) && inputs[l] == inputs[0]) continue;
            report(kName, "FP32, FP16 or BF16, the same for all levels", "cast the feature maps before the node",
                   "data type %d for level %d and %d for level 0", int(inputs[l]), l, int(inputs[0]));
            return kFailed;
        }
        outputs[0] = inputs[0];
        return 0;
    }

    int32_t getOutputShapes(const nvinfer1::DimsExprs *inputs, int32_t num_inputs, const nvinfer1::DimsExprs *, int32_t,
                            nvinfer1::DimsExprs *outputs, int32_t, nvinfer1::IExprBuilder &build) noexcept override {
        if (!has_levels(num_inputs)) return kFailed;
        const nvinfer1::DimsExprs &rois = inputs[num_inputs - 1];
        bool fits = rois.nbDims == 3;
        for (int32_t l = 0; l < num_inputs - 1; l++) fits = fits && inputs[l].nbDims == 4;
        if (!fits) {
            report(kName, "feature maps [N, C, H, W], then rois [N, R, 4]", "export the model again",
                   "inputs of other ranks (%d for the first, %d for the last)", inputs[0].nbDims, rois.nbDims);
            return kFailed;
        }
        const nvinfer1::IDimensionExpr *size = build.constant(attributes_.output_size);
        outputs[0] = {5, {rois.d[0], rois.d[1], inputs[0].d[1], size, size}};
        return 0;
    }

    // Feature maps share a type and a format; coordinates are always FP32, and the result is linear.
    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc *tensors,
                                   int32_t num_inputs, int32_t) noexcept override {
        const nvinfer1::PluginTensorDesc &first = tensors[0].desc, &here = tensors[position].desc;
        bool is_linear = here.format == TensorFormat::kLINEAR;
        if (position == 0) return is_feature_type(here.type) && (is_linear || is_channels_last(here.type, here.format));
        if (position < num_inputs - 1) return here.type == first.type && here.format == first.format;
        if (position == num_inputs - 1) return here.type == DataType::kFLOAT && is_linear;
        return here.type == first.type && is_linear;
    }

    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc *, int32_t num_inputs,
                            const nvinfer1::DynamicPluginTensorDesc *, int32_t) noexcept override {
        return take_levels(num_inputs);
    }

    // Execution

    int32_t onShapeChange(const nvinfer1::PluginTensorDesc *, int32_t num_inputs, const nvinfer1::PluginTensorDesc *,
                          int32_t) noexcept override {
        return take_levels(num_inputs);
    }

    int32_t enqueue(const nvinfer1::PluginTensorDesc *input, const nvinfer1::PluginTensorDesc *output,
                    const void *const *inputs, void *const *outputs, void *, cudaStream_t stream) noexcept override {
        if (!has_levels(num_levels_ + 1)) return kFailed;
        maskrcnn_roi_align_params params = constants();
        for (int32_t l = 0; l < num_levels_; l++) {
            params.features[l] = inputs[l];
            params.heights[l] = int32_t(input[l].dims.d[2]);
            params.widths[l] = int32_t(input[l].dims.d[3]);
        }
        const nvinfer1::Dims &rois = input[num_levels_].dims;
        params.batch = int32_t(rois.d[0]);
        params.num_rois = int32_t(rois.d[1]);
        params.channels = int32_t(input[0].dims.d[1]);
        bool is_padded = input[0].format == TensorFormat::kHWC8;
        params.channel_pitch = is_padded ? (params.channels + 7) / 8 * 8 : params.channels;
        params.layout = input[0].format == TensorFormat::kLINEAR ? MASKRCNN_NCHW : MASKRCNN_NHWC;
        params.dtype = dtype_of(input[0].type);
        params.output_dtype = dtype_of(output[0].type);
        const float *boxes = static_cast<const float *>(inputs[num_levels_]);
        int code = maskrcnn_multilevel_roi_align(&params, boxes, outputs[0], stream);
        return launched(kName, code);
    }

private:
    int32_t num_levels_ = 0;

    static bool has_levels(int32_t num_inputs) noexcept {
        if (num_inputs >= 2 && num_inputs - 1 <= MASKRCNN_MAX_LEVELS) return true;
        char range[64];
        snprintf(range, sizeof range, "1 to %d feature maps, then the boxes", MASKRCNN_MAX_LEVELS);
        report(kName, range, "export the model again", "%d inputs", num_inputs);
        return false;
    }

    int32_t take_levels(int32_t num_inputs) noexcept {
        if (!has_levels(num_inputs)) return kFailed;
        num_levels_ = num_inputs - 1;
        return 0;
    }

    maskrcnn_roi_align_params constants() const noexcept {
        maskrcnn_roi_align_params params{};
        params.num_levels = num_levels_;
        params.output_size = attributes_.output_size;
        params.sampling_ratio = attributes_.sampling_ratio;
        params.aligned = attributes_.aligned;
        params.min_level = attributes_.min_level;
        params.canonical_level = attributes_.canonical_level;
        params.canonical_size = attributes_.canonical_size;
        params.level_epsilon = attributes_.level_epsilon;
        return params;
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface *multilevel_roi_align_creator() noexcept {
    static auto *creator = new (std::nothrow) Creator<MultilevelRoiAlign>;
    return creator;
}

}  // namespace maskrcnn
