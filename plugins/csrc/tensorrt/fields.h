// Attributes of an op: conversion between TensorRT plugin fields and a struct.

#ifndef MASKRCNN_TENSORRT_FIELDS_H
#define MASKRCNN_TENSORRT_FIELDS_H

#include <NvInferRuntime.h>
#include <stdio.h>
#include <string.h>

#include <array>

#include "message.h"

namespace maskrcnn {

// One attribute: the struct member that stores it, an integer or a float, and its range. An optional attribute that is
// missing keeps the struct's default.
template <class Attributes>
struct Field {
    const char *name;
    int32_t Attributes::*integer;
    float Attributes::*number;
    double least, most;
    bool required;

    constexpr Field(const char *name, int32_t Attributes::*member, double least, double most, bool required = false)
        : name(name), integer(member), number(nullptr), least(least), most(most), required(required) {}
    constexpr Field(const char *name, float Attributes::*member, double least, double most, bool required = false)
        : name(name), integer(nullptr), number(member), least(least), most(most), required(required) {}

    // Type that the ONNX parser passes.
    nvinfer1::PluginFieldType type() const {
        return integer ? nvinfer1::PluginFieldType::kINT32 : nvinfer1::PluginFieldType::kFLOAT32;
    }
    const void *address_in(const Attributes &attributes) const {
        if (integer) return &(attributes.*integer);
        return &(attributes.*number);
    }
    double value_in(const Attributes &attributes) const {
        return integer ? double(attributes.*integer) : double(attributes.*number);
    }
};

constexpr bool kRequired = true;

template <class Attributes, size_t count>
using Fields = std::array<Field<Attributes>, count>;

// Reads a field, which must be one integer or float of 32 or 64 bits.
bool read_value(const char *op, const nvinfer1::PluginField &given, bool is_integer, double &value) noexcept;

// Finds a field by name, or null; a duplicate is an error.
bool find_field(const char *op, const nvinfer1::PluginFieldCollection &given, const char *name,
                const nvinfer1::PluginField *&found) noexcept;

template <class Attributes>
bool read_field(const char *op, const nvinfer1::PluginFieldCollection &given, const Field<Attributes> &field,
                Attributes &attributes) noexcept {
    const nvinfer1::PluginField *found;
    if (!find_field(op, given, field.name, found)) return false;
    if (!found) {
        if (field.required) {
            report(op, "one, as every exported file has it", "export the model again, or pass the field",
                   "no attribute %s", field.name);
        }
        return !field.required;
    }
    double value;
    if (!read_value(op, *found, field.integer != nullptr, value)) return false;
    if (!(value >= field.least && value <= field.most)) {  // also rejects NaN
        char range[64];
        snprintf(range, sizeof range, "%.9g to %.9g", field.least, field.most);
        report(op, range, "export the model again, or pass another value", "%s = %.9g", field.name, value);
        return false;
    }
    if (field.integer) {
        attributes.*field.integer = int32_t(value);
    } else {
        attributes.*field.number = float(value);
    }
    return true;
}

// Reads all attributes of an op. Unknown fields are an error, because they may be misspelt.
template <class Attributes, size_t count>
bool read_fields(const char *op, const nvinfer1::PluginFieldCollection *given, const Fields<Attributes, count> &fields,
                 Attributes &attributes) noexcept {
    const nvinfer1::PluginFieldCollection none;
    if (!given) given = &none;
    for (int32_t i = 0; i < given->nbFields; i++) {
        bool known = false;
        const char *name = given->fields[i].name ? given->fields[i].name : "";
        for (const auto &field : fields) known = known || strcmp(field.name, name) == 0;
        if (!known) {
            report(op, "the attributes that plugins/contract.py lists", "leave it out", "an attribute %s", name);
            return false;
        }
    }
    for (const auto &field : fields) {
        if (!read_field(op, *given, field, attributes)) return false;
    }
    return true;
}

// Plugin fields that point to the attributes; without attributes only names and types.
template <class Attributes, size_t count>
std::array<nvinfer1::PluginField, count> plugin_fields(const Fields<Attributes, count> &fields,
                                                       const Attributes *attributes) noexcept {
    std::array<nvinfer1::PluginField, count> result;
    for (size_t i = 0; i < count; i++) {
        const void *data = attributes ? fields[i].address_in(*attributes) : nullptr;
        result[i] = nvinfer1::PluginField(fields[i].name, data, fields[i].type(), 1);
    }
    return result;
}

// `name=value` of every attribute, comma separated.
template <class Attributes, size_t count, size_t size>
void describe(const Fields<Attributes, count> &fields, const Attributes &attributes, char (&text)[size]) noexcept {
    size_t used = 0;
    text[0] = 0;
    for (const auto &field : fields) {
        int written = snprintf(text + used, size - used, "%s%s=%.9g", used ? "," : "", field.name,
                               field.value_in(attributes));
        if (written < 0 || size_t(written) >= size - used) return;
        used += size_t(written);
    }
}

}  // namespace maskrcnn

#endif
