#include "fields.h"

namespace maskrcnn {

using nvinfer1::PluginFieldType;

bool read_value(const char *op, const nvinfer1::PluginField &given, bool is_integer, double &value) noexcept {
    const char *wanted = is_integer ? "one integer of 32 or 64 bits" : "one number of 32 or 64 bits";
    const char *remedy = "export the model again, or pass the field as a NumPy array of one element";
    if (given.length != 1 || !given.data) {
        report(op, wanted, remedy, "attribute %s with %d values", given.name, given.data ? given.length : 0);
        return false;
    }
    // Fields from Python arrays may be unaligned.
    int32_t int32;
    int64_t int64;
    float float32;
    if (is_integer && given.type == PluginFieldType::kINT32) {
        memcpy(&int32, given.data, sizeof int32);
        value = double(int32);
    } else if (is_integer && given.type == PluginFieldType::kINT64) {
        memcpy(&int64, given.data, sizeof int64);
        value = double(int64);
    } else if (!is_integer && given.type == PluginFieldType::kFLOAT32) {
        memcpy(&float32, given.data, sizeof float32);
        value = double(float32);
    } else if (!is_integer && given.type == PluginFieldType::kFLOAT64) {
        memcpy(&value, given.data, sizeof value);
    } else {
        report(op, wanted, remedy, "attribute %s of plugin field type %d", given.name, int(given.type));
        return false;
    }
    return true;
}

bool find_field(const char *op, const nvinfer1::PluginFieldCollection &given, const char *name,
                const nvinfer1::PluginField *&found) noexcept {
    found = nullptr;
    for (int32_t i = 0; i < given.nbFields; i++) {
        if (!given.fields[i].name || strcmp(given.fields[i].name, name) != 0) continue;
        if (found) {
            report(op, "it once", "leave one out", "attribute %s twice", name);
            return false;
        }
        found = &given.fields[i];
    }
    return true;
}

}  // namespace maskrcnn
