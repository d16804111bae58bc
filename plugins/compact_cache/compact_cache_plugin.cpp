#include "compact_cache_plugin.h"

#include "compact_cache.h"

using namespace nvinfer1;

namespace semkv
{
namespace
{
CompactCacheParams sizesOf(Sizes const& sizes, Element element)
{
    CompactCacheParams params{};
    params.batch = static_cast<int32_t>(sizes.at("B"));
    params.heads = static_cast<int32_t>(sizes.at("H"));
    params.capacity = static_cast<int32_t>(sizes.at("C"));
    params.headSize = static_cast<int32_t>(sizes.at("D"));
    params.groups = static_cast<int32_t>(sizes.at("G"));
    params.element = element;
    return params;
}
} // namespace

OperatorContract const& CompactCachePlugin::contract()
{
    static OperatorContract const instance{
        "CompactCache",
        {
            {"key_cache", "B,H,C,D", TensorType::kCache},
            {"value_cache", "B,H,C,D", TensorType::kCache},
            {"slot_bias", "B,H,C", TensorType::kFloat32},
            {"keep_index", "B,G,C", TensorType::kInt64},
        },
        {
            {"key_cache_out", "B,H,C,D", TensorType::kCache, 0},
            {"value_cache_out", "B,H,C,D", TensorType::kCache, 1},
            {"slot_bias_out", "B,H,C", TensorType::kFloat32, 2},
            {"length_out", "B", TensorType::kInt64},
        },
        {},
    };
    return instance;
}

bool CompactCachePlugin::sizesSupported(Sizes const& sizes) const
{
    return gridSupported(sizes, {"B", "H"}) && headSizeSupported(sizes, "key_cache") && groupsSupported(sizes, "keep_index");
}

size_t CompactCachePlugin::workspaceBytes(Sizes const& sizes, Element element) const
{
    return compactCacheWorkspaceBytes(sizesOf(sizes, element));
}

cudaError_t CompactCachePlugin::run(Call const& call) const
{
    CompactCacheParams params = sizesOf(call.sizes, call.element);
    params.keyCache = call.inputs[0];
    params.valueCache = call.inputs[1];
    params.slotBias = static_cast<float const*>(call.inputs[2]);
    params.keepIndex = static_cast<int64_t const*>(call.inputs[3]);
    params.keyCacheOut = call.outputs[0];
    params.valueCacheOut = call.outputs[1];
    params.slotBiasOut = static_cast<float*>(call.outputs[2]);
    params.lengthOut = static_cast<int64_t*>(call.outputs[3]);
    params.workspace = call.workspace;
    return compactCache(params, call.stream);
}
} // namespace semkv
