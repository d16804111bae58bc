#include "operators.h"

#include "../compact_cache/compact_cache.h"
#include "device.h"

namespace semkv::ort_cuda
{
namespace
{
char const* const kWhere = "semkv CompactCache";

class CompactCacheKernel
{
public:
    CompactCacheKernel(int64_t variant, OrtKernelInfo const*)
        : mElement(static_cast<Element>(variant))
    {
    }

    void run(native::Run const& run) const
    {
        Tensor const keys = run.input(0), values = run.input(1), bias = run.input(2), index = run.input(3);
        Sizes sizes(kWhere);
        sizes.add("key_cache", "B,H,C,D", keys.shape);
        sizes.add("value_cache", "B,H,C,D", values.shape);
        sizes.add("slot_bias", "B,H,C", bias.shape);
        sizes.add("keep_index", "B,G,C", index.shape);
        checkGroups(sizes, kWhere, "keep_index");
        checkHeadSize(sizes, kWhere, mElement);
        CompactCacheParams params{};
        params.batch = size(sizes, kWhere, "B", kMostInGrid);
        params.heads = size(sizes, kWhere, "H", kMostInGrid);
        params.capacity = size(sizes, kWhere, "C");
        params.headSize = size(sizes, kWhere, "D");
        params.groups = size(sizes, kWhere, "G");
        params.element = mElement;
        params.keyCache = keys.data;
        params.valueCache = values.data;
        params.slotBias = bias.as<float>();
        params.keepIndex = index.as<int64_t>();
        params.keyCacheOut = output(run, kWhere, 0, keys.shape).data;
        params.valueCacheOut = output(run, kWhere, 1, values.shape).data;
        params.slotBiasOut = output(run, kWhere, 2, bias.shape).as<float>();
        params.lengthOut = output(run, kWhere, 3, {sizes["B"]}).as<int64_t>();
        Scratch const scratch(run, compactCacheWorkspaceBytes(params));
        params.workspace = scratch.data();
        launched(kWhere, compactCache(params, streamOf(run)));
    }

private:
    Element mElement;
};
} // namespace

Operators compactCacheOperators()
{
    constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    constexpr auto kLong = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    Operators operators;
    for (Element const element : kElements)
    {
        auto const type = onnxType(element);
        operators.push_back(native::makeOperator<CompactCacheKernel>("CompactCache", {type, type, kFloat, kLong},
            {type, type, kFloat, kLong}, static_cast<int64_t>(element)));
    }
    return operators;
}
} // namespace semkv::ort_cuda
