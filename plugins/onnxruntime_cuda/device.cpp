#include "device.h"

namespace semkv::ort_cuda
{
using native::check;
using native::ort;
using native::reject;

namespace
{
constexpr size_t kAlignment = 256;
} // namespace

Scratch::Scratch(native::Run const& run, size_t bytes)
{
    if (bytes == 0)
    {
        return;
    }
    // The first input lies in the memory that is wanted, whichever device that is of.
    OrtValue const* value = nullptr;
    check(ort().KernelContext_GetInput(run.context(), 0, &value));
    OrtMemoryInfo const* memory = nullptr;
    check(ort().GetTensorMemoryInfo(value, &memory));
    check(ort().KernelContext_GetAllocator(run.context(), memory, &mAllocator));
    OrtStatus* const status
        = ort().KernelContext_GetScratchBuffer(run.context(), memory, bytes + kAlignment - 1, &mMemory);
    if (status != nullptr)
    {
        ort().ReleaseAllocator(mAllocator);
        check(status);
    }
    uintptr_t const address = reinterpret_cast<uintptr_t>(mMemory);
    mData = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

Scratch::~Scratch()
{
    if (mAllocator == nullptr)
    {
        return;
    }
    if (OrtStatus* const status = ort().AllocatorFree(mAllocator, mMemory))
    {
        ort().ReleaseStatus(status);
    }
    ort().ReleaseAllocator(mAllocator);
}

cudaStream_t streamOf(native::Run const& run)
{
    void* stream = nullptr;
    check(ort().KernelContext_GetGPUComputeStream(run.context(), &stream));
    return static_cast<cudaStream_t>(stream);
}

Tensor output(native::Run const& run, char const* where, size_t index, std::vector<int64_t> shape)
{
    Tensor made = run.output(index, std::move(shape));
    bool empty = false;
    for (int64_t const length : made.shape)
    {
        empty = empty || length == 0;
    }
    if (made.data == nullptr && !empty)
    {
        reject(where, "output " + std::to_string(index), "a name: kernels write it", "none");
    }
    return made;
}

Tensor continued(native::Run const& run, char const* where, size_t index, Tensor const& from, size_t elementBytes)
{
    Tensor to = output(run, where, index, from.shape);
    size_t bytes = elementBytes;
    for (int64_t const length : from.shape)
    {
        bytes *= static_cast<size_t>(length);
    }
    if (to.data != from.data && bytes > 0)
    {
        launched(where, cudaMemcpyAsync(to.data, from.data, bytes, cudaMemcpyDeviceToDevice, streamOf(run)));
    }
    return to;
}

void launched(char const* where, cudaError_t error)
{
    if (error != cudaSuccess)
    {
        throw std::runtime_error(std::string(where) + ": CUDA does not run the kernel: " + cudaGetErrorString(error));
    }
}

int32_t size(Sizes const& sizes, char const* where, char const* name, int64_t most)
{
    int64_t const found = sizes[name];
    if (found > most)
    {
        reject(where, std::string("size ") + name, "at most " + std::to_string(most), std::to_string(found));
    }
    return static_cast<int32_t>(found);
}

void checkHeadSize(Sizes const& sizes, char const* where, Element element)
{
    int64_t const multiple = 16 / elementBytes(element);
    if (sizes["D"] <= 0 || sizes["D"] % multiple != 0)
    {
        reject(where, "head size", "a multiple of " + std::to_string(multiple), std::to_string(sizes["D"]));
    }
}

void checkGroups(Sizes const& sizes, char const* where, char const* input)
{
    int64_t const groups = sizes["G"], heads = sizes["H"];
    if (groups != 1 && groups != heads)
    {
        reject(where, std::string("groups of ") + input, "1 or " + std::to_string(heads), std::to_string(groups));
    }
}

ONNXTensorElementDataType onnxType(Element element)
{
    switch (element)
    {
    case Element::kFloat32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case Element::kFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case Element::kBFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    }
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}
} // namespace semkv::ort_cuda
