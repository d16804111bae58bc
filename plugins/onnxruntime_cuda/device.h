// What operators need of a run on a CUDA device: its stream, memory of it, sizes and types as kernels take them.
#pragma once

#include "../common/element.h"
#include "../onnxruntime/ort/api.h"

#include <cuda_runtime_api.h>

#include <initializer_list>

namespace semkv::ort_cuda
{
using native::Sizes;
using native::Tensor;

// Memory of the device for one call's kernels. It goes back when the object ends, which may be before they have run:
// ONNX Runtime's arena gives it to nobody on another stream before then.
class Scratch
{
public:
    Scratch(native::Run const& run, size_t bytes);
    ~Scratch();
    Scratch(Scratch const&) = delete;
    Scratch& operator=(Scratch const&) = delete;

    // 256-byte aligned; null where no bytes were asked for.
    void* data() const { return mData; }

private:
    OrtAllocator* mAllocator{nullptr};
    void* mMemory{nullptr};
    void* mData{nullptr};
};

// The stream that the provider runs this kernel on.
cudaStream_t streamOf(native::Run const& run);

// An output that nobody may leave out. Throws where the node has no name for it.
Tensor output(native::Run const& run, char const* where, size_t index, std::vector<int64_t> shape);

// An output that begins as a copy of an input, made on the stream, or lies in its buffer and is it.
Tensor continued(native::Run const& run, char const* where, size_t index, Tensor const& from, size_t elementBytes);

// Throws what a launcher returned, unless that is success.
void launched(char const* where, cudaError_t error);

// A size as kernels take it. Throws above `most`.
int32_t size(Sizes const& sizes, char const* where, char const* name, int64_t most = INT32_MAX);

// Rows that kernels read 16 bytes at a time. Throws for other head sizes.
void checkHeadSize(Sizes const& sizes, char const* where, Element element);

// Throws unless dimension G, of this input, is 1 or H.
void checkGroups(Sizes const& sizes, char const* where, char const* input);

// Most blocks of a launch along the axes for batch rows and heads.
constexpr int64_t kMostInGrid = 65535;

ONNXTensorElementDataType onnxType(Element element);

// The element types that every kernel has.
constexpr Element kElements[] = {Element::kFloat32, Element::kFloat16, Element::kBFloat16};
} // namespace semkv::ort_cuda
