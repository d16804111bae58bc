// The little of ONNX Runtime's C API that operators need, with errors as exceptions.
#pragma once

#include "../parallel.h"

#include "onnxruntime_c_api.h"

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace semkv::native
{
// The oldest version that has all that is used (KernelContext_ParallelFor): ONNX Runtime 1.17 and later.
constexpr uint32_t kOrtVersion = 17;

// The execution provider whose memory operators work in; each library says its own.
extern char const* const kProvider;

// Set once, by RegisterCustomOps.
OrtApi const& ort();
void setOrt(OrtApi const& api);

// Throws what a status says, if it is one.
void check(OrtStatus* status);

// What a user did wrong: what, where, expected, got.
[[noreturn]] void reject(
    std::string const& where, std::string const& what, std::string const& expected, std::string const& got);

std::string text(std::vector<int64_t> const& shape);

struct Tensor
{
    void* data;
    std::vector<int64_t> shape;

    template <class T>
    T* as() const
    {
        return static_cast<T*>(data);
    }
};

// A kernel's run.
class Run
{
public:
    explicit Run(OrtKernelContext* context)
        : mContext(context)
    {
    }

    // Input data are not to be written.
    Tensor input(size_t index) const;
    Tensor output(size_t index, std::vector<int64_t> shape) const;

    // An output that begins as a copy of an input, or lies in its buffer and is it.
    Tensor continued(size_t index, Tensor const& from, size_t elementBytes) const;

    Parallel parallel() const;

    OrtKernelContext* context() const { return mContext; }

private:
    OrtKernelContext* mContext;
};

// Attribute of a node, or the default where it has none.
int64_t attribute(OrtKernelInfo const* info, char const* name, int64_t otherwise);
float attribute(OrtKernelInfo const* info, char const* name, float otherwise);

// Sizes by dimension name from "B,Hq,S,D" and an actual shape; throws where one name stands for two sizes.
class Sizes
{
public:
    explicit Sizes(std::string where)
        : mWhere(std::move(where))
    {
    }

    void add(char const* input, char const* names, std::vector<int64_t> const& shape);
    int64_t operator[](std::string const& name) const;

private:
    std::string mWhere;
    std::vector<std::pair<std::string, int64_t>> mFound;
};

// Runs code that throws, and says so in ONNX Runtime's way.
template <class Code>
OrtStatus* guarded(Code const& code)
{
    try
    {
        code();
        return nullptr;
    }
    catch (std::exception const& error)
    {
        return ort().CreateStatus(ORT_INVALID_ARGUMENT, error.what());
    }
}

// An operator for some element types.
struct Operator : OrtCustomOp
{
    std::string name;
    std::vector<ONNXTensorElementDataType> inputs;
    std::vector<ONNXTensorElementDataType> outputs;
    int64_t variant; // what a kernel wants to know of the types

    Operator(std::string name, std::vector<ONNXTensorElementDataType> inputs,
        std::vector<ONNXTensorElementDataType> outputs, int64_t variant);
};

// An Operator whose kernels are of this class, which is made from a variant and the node's OrtKernelInfo, and has
// void run(Run const&) const.
template <class Kernel>
std::unique_ptr<Operator> makeOperator(std::string name, std::vector<ONNXTensorElementDataType> inputs,
    std::vector<ONNXTensorElementDataType> outputs, int64_t variant)
{
    auto op = std::make_unique<Operator>(std::move(name), std::move(inputs), std::move(outputs), variant);
    op->CreateKernelV2 = [](OrtCustomOp const* self, OrtApi const*, OrtKernelInfo const* info, void** kernel) {
        return guarded([&] { *kernel = new Kernel(static_cast<Operator const*>(self)->variant, info); });
    };
    op->KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
        return guarded([&] { static_cast<Kernel const*>(kernel)->run(Run(context)); });
    };
    op->KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}
} // namespace semkv::native
