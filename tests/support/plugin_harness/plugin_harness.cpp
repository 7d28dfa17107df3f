// Calls the methods of the plugins as TensorRT's builder and engine do. Its C interface is used from Python;
// plugin_library.py has the same structs.

#include <NvInferRuntime.h>
#include <stdio.h>

#include <list>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

// A dimension: a letter or a number.
class Dimension final : public IDimensionExpr, private apiv::VDimensionExpr {
public:
    explicit Dimension(std::string text) : text(std::move(text)) { mImpl = this; }
    bool isConstant() const override { return text.find_first_not_of("0123456789") == std::string::npos; }
    int64_t getConstantValue() const override { return isConstant() ? std::stoll(text) : INT64_MIN; }
    bool isSizeTensor() const override { return false; }
    const std::string text;
};

// Constants only; the plugins use no other expressions.
class Expressions final : public IExprBuilder, private apiv::VExprBuilder {
public:
    Expressions() { mImpl = this; }
    const IDimensionExpr *named(const char *text) {
        made_.emplace_back(text);
        return &made_.back();
    }
    const IDimensionExpr *constant(int64_t value) override { return named(std::to_string(value).c_str()); }
    const IDimensionExpr *operation(DimensionOperation, const IDimensionExpr &, const IDimensionExpr &) override {
        return nullptr;
    }
    const IDimensionExpr *declareSizeTensor(int32_t, const IDimensionExpr &, const IDimensionExpr &) override {
        return nullptr;
    }

private:
    std::list<Dimension> made_;
};

IPluginV3 *plugin_of(void *plugin) { return static_cast<IPluginV3 *>(plugin); }

template <class Capability>
Capability *capability(void *plugin, PluginCapabilityType type) {
    return static_cast<Capability *>(plugin_of(plugin)->getCapabilityInterface(type));
}

IPluginV3OneBuild *build_of(void *plugin) {
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

IPluginV3OneRuntime *runtime_of(void *plugin) {
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

IPluginCreatorV3One *creator_of(void *creator) {
    return static_cast<IPluginCreatorV3One *>(static_cast<IPluginCreatorInterface *>(creator));
}

}  // namespace

extern "C" {

struct harness_tensor {
    int32_t type, format, rank;
    int64_t dims[8];
    void *address;
};

struct harness_field {
    const char *name;
    const void *data;
    int32_t type, length;
};

}

namespace {

PluginTensorDesc described(const harness_tensor &tensor) {
    PluginTensorDesc result{};
    result.dims.nbDims = tensor.rank;
    for (int32_t i = 0; i < tensor.rank; i++) result.dims.d[i] = tensor.dims[i];
    result.type = DataType(tensor.type);
    result.format = TensorFormat(tensor.format);
    return result;
}

std::vector<DynamicPluginTensorDesc> at_most(const harness_tensor *tensors, int32_t count) {
    std::vector<DynamicPluginTensorDesc> result(static_cast<size_t>(count));
    for (size_t i = 0; i < result.size(); i++) {
        result[i].desc = described(tensors[i]);
        result[i].min = result[i].opt = result[i].max = result[i].desc.dims;
    }
    return result;
}

}  // namespace

extern "C" {

void *harness_create(void *creator, const harness_field *fields, int32_t count, int32_t at_runtime) {
    std::vector<PluginField> given;
    for (int32_t i = 0; i < count; i++) {
        given.emplace_back(fields[i].name, fields[i].data, PluginFieldType(fields[i].type), fields[i].length);
    }
    PluginFieldCollection collection{count, given.data()};
    TensorRTPhase phase = at_runtime ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD;
    return creator_of(creator)->createPlugin("of a test", &collection, phase);
}

void harness_destroy(void *plugin) { delete plugin_of(plugin); }

// Name, version and namespace of the creator, or of a plugin's core.
const char *harness_creator_name(void *creator, int32_t which) {
    IPluginCreatorV3One *ours = creator_of(creator);
    return which == 0 ? ours->getPluginName() : which == 1 ? ours->getPluginVersion() : ours->getPluginNamespace();
}

const char *harness_plugin_name(void *plugin, int32_t which) {
    auto *core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
    return which == 0 ? core->getPluginName() : which == 1 ? core->getPluginVersion() : core->getPluginNamespace();
}

const char *harness_timing_id(void *plugin) { return build_of(plugin)->getTimingCacheID(); }

void *harness_clone(void *plugin) { return plugin_of(plugin)->clone(); }
void *harness_attach(void *plugin) { return runtime_of(plugin)->attachToContext(nullptr); }

// Writes at most `most` of the fields that the plugin wants to be stored with an engine, and returns their number.
int32_t harness_serialized(void *plugin, harness_field *fields, int32_t most) {
    const PluginFieldCollection *stored = runtime_of(plugin)->getFieldsToSerialize();
    for (int32_t i = 0; i < stored->nbFields && i < most; i++) {
        const PluginField &field = stored->fields[i];
        fields[i] = {field.name, field.data, int32_t(field.type), field.length};
    }
    return stored->nbFields;
}

int32_t harness_num_outputs(void *plugin) { return build_of(plugin)->getNbOutputs(); }

int32_t harness_output_types(void *plugin, const int32_t *inputs, int32_t num_inputs, int32_t *outputs) {
    int32_t num_outputs = build_of(plugin)->getNbOutputs();
    std::vector<DataType> given, made(static_cast<size_t>(num_outputs));
    for (int32_t i = 0; i < num_inputs; i++) given.push_back(DataType(inputs[i]));
    int32_t code = build_of(plugin)->getOutputDataTypes(made.data(), num_outputs, given.data(), num_inputs);
    for (int32_t i = 0; i < num_outputs && code == 0; i++) outputs[i] = int32_t(made[size_t(i)]);
    return code;
}

// Shapes by the names of their dimensions, input after input; the result as "N R, N" in `text`.
int32_t harness_output_shapes(void *plugin, const int32_t *ranks, const char *const *names, int32_t num_inputs,
                              char *text, size_t size) {
    Expressions expressions;
    std::vector<DimsExprs> inputs(static_cast<size_t>(num_inputs)), outputs(size_t(build_of(plugin)->getNbOutputs()));
    for (int32_t i = 0; i < num_inputs; i++) {
        inputs[size_t(i)].nbDims = ranks[i];
        for (int32_t axis = 0; axis < ranks[i]; axis++) inputs[size_t(i)].d[axis] = expressions.named(*names++);
    }
    int32_t code = build_of(plugin)->getOutputShapes(inputs.data(), num_inputs, nullptr, 0, outputs.data(),
                                                     int32_t(outputs.size()), expressions);
    std::string shapes;
    for (size_t i = 0; i < outputs.size() && code == 0; i++) {
        if (i > 0) shapes += ",";
        for (int32_t axis = 0; axis < outputs[i].nbDims; axis++) {
            shapes += (i + size_t(axis) > 0 ? " " : "") + static_cast<const Dimension *>(outputs[i].d[axis])->text;
        }
    }
    snprintf(text, size, "%s", shapes.c_str());
    return code;
}

int32_t harness_supports(void *plugin, int32_t position, const harness_tensor *tensors, int32_t num_inputs,
                         int32_t num_outputs) {
    auto all = at_most(tensors, num_inputs + num_outputs);
    return build_of(plugin)->supportsFormatCombination(position, all.data(), num_inputs, num_outputs);
}

// What a builder does before it times a plugin: configures it and asks for its workspace.
int32_t harness_configure(void *plugin, const harness_tensor *tensors, int32_t num_inputs, int32_t num_outputs,
                          size_t *workspace) {
    auto all = at_most(tensors, num_inputs + num_outputs);
    const DynamicPluginTensorDesc *outputs = all.data() + num_inputs;
    int32_t code = build_of(plugin)->configurePlugin(all.data(), num_inputs, outputs, num_outputs);
    *workspace = build_of(plugin)->getWorkspaceSize(all.data(), num_inputs, outputs, num_outputs);
    return code;
}

// What an execution context does: tells the shapes where they changed, then runs.
int32_t harness_run(void *plugin, const harness_tensor *tensors, int32_t num_inputs, int32_t num_outputs,
                    int32_t new_shapes, void *workspace, void *stream) {
    std::vector<PluginTensorDesc> all;
    std::vector<void *> addresses;
    for (int32_t i = 0; i < num_inputs + num_outputs; i++) {
        all.push_back(described(tensors[i]));
        addresses.push_back(tensors[i].address);
    }
    IPluginV3OneRuntime *runtime = runtime_of(plugin);
    const PluginTensorDesc *outputs = all.data() + num_inputs;
    if (new_shapes) {
        int32_t code = runtime->onShapeChange(all.data(), num_inputs, outputs, num_outputs);
        if (code != 0) return code;
    }
    return runtime->enqueue(all.data(), outputs, addresses.data(), addresses.data() + num_inputs, workspace,
                            static_cast<cudaStream_t>(stream));
}
}
