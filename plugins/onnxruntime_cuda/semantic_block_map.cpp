#include "operators.h"

#include "../semantic_block_map/semantic_block_map.h"
#include "device.h"

namespace semkv::ort_cuda
{
namespace
{
using native::reject;

char const* const kWhere = "semkv SemanticBlockMap";

class SemanticBlockMapKernel
{
public:
    SemanticBlockMapKernel(int64_t variant, OrtKernelInfo const* info)
        : mElement(static_cast<Element>(variant))
        , mVectors(native::attribute(info, "vectors", int64_t{2}))
        , mLongest(native::attribute(info, "max_block_length", int64_t{40}))
    {
        if (mVectors != 1 && mVectors != 2)
        {
            reject(kWhere, "vectors", "1 or 2", std::to_string(mVectors));
        }
        if (mLongest < 1 || mLongest > INT32_MAX)
        {
            reject(kWhere, "max_block_length", "1 to " + std::to_string(INT32_MAX), std::to_string(mLongest));
        }
    }

    void run(native::Run const& run) const
    {
        Tensor const key = run.input(0), start = run.input(1), length = run.input(2);
        Sizes sizes(kWhere);
        sizes.add("key_cache", "B,Hkv,C,D", key.shape);
        sizes.add("block_start", "B,N", start.shape);
        sizes.add("block_length", "B,N", length.shape);
        checkHeadSize(sizes, kWhere, mElement);
        int64_t const batch = sizes["B"], kvHeads = sizes["Hkv"], blocks = sizes["N"];
        SemanticBlockMapParams params{};
        params.batch = size(sizes, kWhere, "B", kMostInGrid);
        params.kvHeads = size(sizes, kWhere, "Hkv", kMostInGrid);
        params.capacity = size(sizes, kWhere, "C");
        params.headSize = size(sizes, kWhere, "D");
        params.blocks = size(sizes, kWhere, "N");
        params.vectors = static_cast<int32_t>(mVectors);
        params.maxBlockLength = static_cast<int32_t>(mLongest);
        params.element = mElement;
        params.keyCache = key.data;
        params.blockStart = start.as<int64_t>();
        params.blockLength = length.as<int64_t>();
        params.representatives = output(run, kWhere, 0, {batch, kvHeads, blocks, mVectors, sizes["D"]}).data;
        params.blockSlots = output(run, kWhere, 1, {batch, blocks, mLongest}).as<int64_t>();
        launched(kWhere, semanticBlockMap(params, streamOf(run)));
    }

private:
    Element mElement;
    int64_t mVectors, mLongest;
};
} // namespace

Operators semanticBlockMapOperators()
{
    constexpr auto kLong = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    Operators operators;
    for (Element const element : kElements)
    {
        auto const type = onnxType(element);
        operators.push_back(native::makeOperator<SemanticBlockMapKernel>(
            "SemanticBlockMap", {type, kLong, kLong}, {type, kLong}, static_cast<int64_t>(element)));
    }
    return operators;
}
} // namespace semkv::ort_cuda
