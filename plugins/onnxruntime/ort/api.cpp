#include "api.h"

#include <cstring>
#include <limits>
#include <sstream>

namespace semkv::native
{
namespace
{
OrtApi const* gApi = nullptr;

struct ReleaseInfo
{
    void operator()(OrtTensorTypeAndShapeInfo* info) const { ort().ReleaseTensorTypeAndShapeInfo(info); }
};

std::vector<int64_t> shapeOf(OrtValue const* value)
{
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    check(ort().GetTensorTypeAndShape(value, &raw));
    std::unique_ptr<OrtTensorTypeAndShapeInfo, ReleaseInfo> const info(raw);
    size_t count = 0;
    check(ort().GetDimensionsCount(info.get(), &count));
    std::vector<int64_t> shape(count);
    check(ort().GetDimensions(info.get(), shape.data(), count));
    return shape;
}
} // namespace

OrtApi const& ort()
{
    return *gApi;
}

void setOrt(OrtApi const& api)
{
    gApi = &api;
}

void check(OrtStatus* status)
{
    if (status != nullptr)
    {
        std::string const message = ort().GetErrorMessage(status);
        ort().ReleaseStatus(status);
        throw std::runtime_error(message);
    }
}

void reject(std::string const& where, std::string const& what, std::string const& expected, std::string const& got)
{
    throw std::invalid_argument(where + ": " + what + ": expected " + expected + ", got " + got);
}

std::string text(std::vector<int64_t> const& shape)
{
    std::string out = "[";
    for (size_t i = 0; i < shape.size(); ++i)
    {
        out += (i > 0 ? "," : "") + std::to_string(shape[i]);
    }
    return out + "]";
}

Tensor Run::input(size_t index) const
{
    OrtValue const* value = nullptr;
    check(ort().KernelContext_GetInput(mContext, index, &value));
    void* data = nullptr;
    check(ort().GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    return {data, shapeOf(value)};
}

Tensor Run::output(size_t index, std::vector<int64_t> shape) const
{
    OrtValue* value = nullptr;
    check(ort().KernelContext_GetOutput(mContext, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    if (value != nullptr) // null: nobody reads it
    {
        check(ort().GetTensorMutableData(value, &data));
    }
    return {data, std::move(shape)};
}

Tensor Run::continued(size_t index, Tensor const& from, size_t elementBytes) const
{
    Tensor to = output(index, from.shape);
    if (to.data != from.data && to.data != nullptr)
    {
        size_t count = elementBytes;
        for (int64_t size : from.shape)
        {
            count *= static_cast<size_t>(size);
        }
        std::memcpy(to.data, from.data, count);
    }
    return to;
}

Parallel Run::parallel() const
{
    return {[](void const* host, size_t count, void (*work)(void*, size_t), void* data) {
                check(ort().KernelContext_ParallelFor(static_cast<OrtKernelContext const*>(host), work, count, 0, data));
            },
        mContext};
}

int64_t attribute(OrtKernelInfo const* info, char const* name, int64_t otherwise)
{
    int64_t value = 0;
    OrtStatus* status = ort().KernelInfoGetAttribute_int64(info, name, &value);
    if (status == nullptr)
    {
        return value;
    }
    ort().ReleaseStatus(status);
    return otherwise;
}

float attribute(OrtKernelInfo const* info, char const* name, float otherwise)
{
    float value = 0;
    OrtStatus* status = ort().KernelInfoGetAttribute_float(info, name, &value);
    if (status == nullptr)
    {
        return value;
    }
    ort().ReleaseStatus(status);
    return otherwise;
}

void Sizes::add(char const* input, char const* names, std::vector<int64_t> const& shape)
{
    std::istringstream stream(names);
    size_t axis = 0;
    for (std::string name; std::getline(stream, name, ','); ++axis)
    {
        if (axis == shape.size())
        {
            break;
        }
        bool known = false;
        for (auto const& [other, size] : mFound)
        {
            known = known || other == name;
            if (other == name && size != shape[axis])
            {
                reject(mWhere, std::string("size ") + name + " of " + input, std::to_string(size), text(shape));
            }
        }
        if (!known)
        {
            mFound.emplace_back(name, shape[axis]);
        }
    }
    std::string rest;
    if (axis != shape.size() || std::getline(stream, rest, ','))
    {
        reject(mWhere, std::string("shape of ") + input, std::string("[") + names + "]", text(shape));
    }
}

int64_t Sizes::operator[](std::string const& name) const
{
    for (auto const& [other, size] : mFound)
    {
        if (other == name)
        {
            return size;
        }
    }
    throw std::logic_error("no size " + name);
}

Operator::Operator(std::string name, std::vector<ONNXTensorElementDataType> inputs,
    std::vector<ONNXTensorElementDataType> outputs, int64_t variant)
    : OrtCustomOp{}
    , name(std::move(name))
    , inputs(std::move(inputs))
    , outputs(std::move(outputs))
    , variant(variant)
{
    version = kOrtVersion;
    GetName = [](OrtCustomOp const* op) { return static_cast<Operator const*>(op)->name.c_str(); };
    GetExecutionProviderType = [](OrtCustomOp const*) -> char const* { return kProvider; };
    GetInputTypeCount = [](OrtCustomOp const* op) { return static_cast<Operator const*>(op)->inputs.size(); };
    GetInputType = [](OrtCustomOp const* op, size_t i) { return static_cast<Operator const*>(op)->inputs[i]; };
    GetOutputTypeCount = [](OrtCustomOp const* op) { return static_cast<Operator const*>(op)->outputs.size(); };
    GetOutputType = [](OrtCustomOp const* op, size_t i) { return static_cast<Operator const*>(op)->outputs[i]; };
    GetInputCharacteristic = [](OrtCustomOp const*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetOutputCharacteristic = [](OrtCustomOp const*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](OrtCustomOp const*, size_t) { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = [](OrtCustomOp const*) { return 1; };
    GetVariadicInputHomogeneity = [](OrtCustomOp const*) { return 1; };
    GetVariadicOutputMinArity = [](OrtCustomOp const*) { return 1; };
    GetVariadicOutputHomogeneity = [](OrtCustomOp const*) { return 1; };
    GetStartVersion = [](OrtCustomOp const*) { return 1; };
    GetEndVersion = [](OrtCustomOp const*) { return std::numeric_limits<int>::max(); };
}
} // namespace semkv::native
