// BatchedNms of plugins/contract.py as a TensorRT plugin.

#include "../kernels.h"
#include "../tensorrt/plugin.h"

namespace maskrcnn {
namespace {

using nvinfer1::DataType;

struct NmsAttributes {
    static constexpr size_t kCount = 2;
    float iou_threshold = 0;
    int32_t max_output = 0;
};

class BatchedNms final : public Plugin<BatchedNms, NmsAttributes> {
public:
    static constexpr const char *kName = "BatchedNms";
    static constexpr Fields<NmsAttributes, NmsAttributes::kCount> kFields{{
        {"iou_threshold", &NmsAttributes::iou_threshold, 0, 1, kRequired},
        {"max_output", &NmsAttributes::max_output, 1, 2147483647, kRequired},
    }};
    using Plugin::Plugin;

    // Build

    int32_t getNbOutputs() const noexcept override { return 2; }

    int32_t getOutputDataTypes(DataType *outputs, int32_t, const DataType *, int32_t) const noexcept override {
        outputs[0] = outputs[1] = DataType::kINT32;
        return 0;
    }

    int32_t getOutputShapes(const nvinfer1::DimsExprs *inputs, int32_t num_inputs, const nvinfer1::DimsExprs *, int32_t,
                            nvinfer1::DimsExprs *outputs, int32_t, nvinfer1::IExprBuilder &build) noexcept override {
        if (num_inputs != 3 || inputs[0].nbDims != 3 || inputs[1].nbDims != 2 || inputs[2].nbDims != 1) {
            report(kName, "boxes [N, K, 4], groups [N, K] and counts [N]", "export the model again",
                   "%d inputs, or inputs of other ranks (%d for the first)", num_inputs,
                   num_inputs > 0 ? inputs[0].nbDims : 0);
            return kFailed;
        }
        const nvinfer1::IDimensionExpr *batch = inputs[0].d[0];
        outputs[0] = {2, {batch, build.constant(attributes_.max_output)}};
        outputs[1] = {1, {batch}};
        return 0;
    }

    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc *tensors, int32_t,
                                   int32_t) noexcept override {
        const nvinfer1::PluginTensorDesc &here = tensors[position].desc;
        DataType wanted = position == 0 ? DataType::kFLOAT : DataType::kINT32;
        return here.type == wanted && here.format == nvinfer1::TensorFormat::kLINEAR;
    }

    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc *, int32_t,
                            const nvinfer1::DynamicPluginTensorDesc *, int32_t) noexcept override {
        return 0;
    }

    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t,
                            const nvinfer1::DynamicPluginTensorDesc *, int32_t) const noexcept override {
        const nvinfer1::Dims &most = inputs[0].max;
        return maskrcnn_batched_nms_workspace(int32_t(most.d[0]), int32_t(most.d[1]));
    }

    // Execution

    int32_t onShapeChange(const nvinfer1::PluginTensorDesc *, int32_t, const nvinfer1::PluginTensorDesc *,
                          int32_t) noexcept override {
        return 0;
    }

    int32_t enqueue(const nvinfer1::PluginTensorDesc *input, const nvinfer1::PluginTensorDesc *,
                    const void *const *inputs, void *const *outputs, void *workspace,
                    cudaStream_t stream) noexcept override {
        const nvinfer1::Dims &boxes = input[0].dims;
        int code = maskrcnn_batched_nms(static_cast<const float *>(inputs[0]), static_cast<const int32_t *>(inputs[1]),
                                        static_cast<const int32_t *>(inputs[2]), int32_t(boxes.d[0]),
                                        int32_t(boxes.d[1]), attributes_.iou_threshold, attributes_.max_output,
                                        workspace, static_cast<int32_t *>(outputs[0]),
                                        static_cast<int32_t *>(outputs[1]), stream);
        return launched(kName, code);
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface *batched_nms_creator() noexcept {
    static auto *creator = new (std::nothrow) Creator<BatchedNms>;
    return creator;
}

}  // namespace maskrcnn
