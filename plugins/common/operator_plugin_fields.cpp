// OperatorPlugin's attributes: from the fields TensorRT hands in, and to the fields it serialises.
#include "operator_plugin.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>
#include <sstream>

using namespace nvinfer1;

namespace semkv
{
namespace
{
// The parser adds these two to every plugin node it makes from ONNX.
bool isPluginName(char const* field)
{
    return std::strcmp(field, "plugin_namespace") == 0 || std::strcmp(field, "plugin_version") == 0;
}
} // namespace

bool OperatorPlugin::readFields(PluginFieldCollection const* fields, TensorRTPhase phase)
{
    std::set<std::string> given;
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i)
    {
        if (isPluginName(fields->fields[i].name))
        {
            continue;
        }
        if (!takeField(fields->fields[i]))
        {
            return false;
        }
        given.insert(fields->fields[i].name);
    }
    for (AttributeContract const& attribute : mContract.attributes)
    {
        if (phase == TensorRTPhase::kRUNTIME && given.count(attribute.name) == 0)
        {
            return reject(std::string("missing field ") + attribute.name, "every field in a plan",
                "a plan of another version of the plugins; build the engine again");
        }
    }
    prepareFields();
    return attributesValid();
}

bool OperatorPlugin::takeField(PluginField const& field)
{
    auto const& attributes = mContract.attributes;
    auto const found = std::find_if(attributes.begin(), attributes.end(),
        [&](AttributeContract const& attribute) { return std::strcmp(attribute.name, field.name) == 0; });
    if (found == attributes.end())
    {
        std::string known;
        for (AttributeContract const& attribute : attributes)
        {
            known += (known.empty() ? "" : ", ") + std::string(attribute.name);
        }
        return reject("attribute", known.empty() ? "none" : "one of " + known, field.name);
    }
    std::string const what = std::string("attribute ") + field.name;
    if (field.data == nullptr || field.length != 1)
    {
        return reject(what, "one value", std::to_string(field.data == nullptr ? 0 : field.length));
    }
    auto& value = mValues[static_cast<size_t>(found - attributes.begin())];
    if (field.type == PluginFieldType::kFLOAT32 && found->type == PluginFieldType::kFLOAT32)
    {
        value = *static_cast<float const*>(field.data);
    }
    else if (field.type == PluginFieldType::kINT32 && found->type == PluginFieldType::kINT32)
    {
        value = *static_cast<int32_t const*>(field.data);
    }
    else if (field.type == PluginFieldType::kINT64 && found->type == PluginFieldType::kINT32)
    {
        int64_t const wide = *static_cast<int64_t const*>(field.data);
        if (wide < INT32_MIN || wide > INT32_MAX)
        {
            return reject(what, "a number of 32 bits", std::to_string(wide));
        }
        value = static_cast<double>(wide);
    }
    else
    {
        return reject(what, found->type == PluginFieldType::kFLOAT32 ? "float32" : "int32 or int64",
            "field type " + std::to_string(static_cast<int32_t>(field.type)));
    }
    return true;
}

void OperatorPlugin::prepareTensors()
{
    mInputs = mContract.inputs;
    mOutputs = mContract.outputs;
    for (OptionContract const& option : mContract.options)
    {
        auto const& attributes = mContract.attributes;
        auto const flag = std::find_if(attributes.begin(), attributes.end(),
            [&](AttributeContract const& attribute) { return std::strcmp(attribute.name, option.name) == 0; });
        if (mValues.at(static_cast<size_t>(flag - attributes.begin())) == 0.0)
        {
            continue;
        }
        for (std::vector<TensorContract>* const tensors : {&mInputs, &mOutputs})
        {
            for (TensorContract& tensor : *tensors)
            {
                bool const retyped = std::any_of(option.retyped.begin(), option.retyped.end(),
                    [&](char const* name) { return std::strcmp(name, tensor.name) == 0; });
                tensor.type = retyped ? option.type : tensor.type;
            }
        }
        auto const offset = static_cast<int32_t>(mInputs.size());
        mInputs.insert(mInputs.end(), option.inputs.begin(), option.inputs.end());
        for (TensorContract output : option.outputs)
        {
            output.aliasOf += output.aliasOf >= 0 ? offset : 0;
            mOutputs.push_back(output);
        }
    }
}

void OperatorPlugin::prepareFields()
{
    prepareTensors();
    size_t const count = mContract.attributes.size();
    mFloats.assign(count, 0.0F);
    mInts.assign(count, 0);
    mFields.clear();
    // Timings are worth nothing for other kernels, so their revision is part of the id.
    std::ostringstream id;
    id.precision(std::numeric_limits<float>::max_digits10);
    id << kNamespace << "::" << mContract.name << "/" << kVersion << " kernels=" << SEMKV_KERNEL_REVISION;
    for (size_t i = 0; i < count; ++i)
    {
        AttributeContract const& attribute = mContract.attributes[i];
        bool const isFloat = attribute.type == PluginFieldType::kFLOAT32;
        mFloats[i] = static_cast<float>(mValues[i]);
        mInts[i] = isFloat ? 0 : static_cast<int32_t>(mValues[i]);
        void const* const data = isFloat ? static_cast<void const*>(&mFloats[i]) : &mInts[i];
        mFields.emplace_back(attribute.name, data, attribute.type, 1);
        id << " " << attribute.name << "=" << mValues[i];
    }
    mTimingId = id.str();
    mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
}
} // namespace semkv
