#include "semantic_block_map_plugin.h"

#include "semantic_block_map.h"

using namespace nvinfer1;

namespace semkv
{
OperatorContract const& SemanticBlockMapPlugin::contract()
{
    static OperatorContract const instance{
        "SemanticBlockMap",
        {
            {"key_cache", "B,Hkv,C,D", TensorType::kCache},
            {"block_start", "B,N", TensorType::kInt64},
            {"block_length", "B,N", TensorType::kInt64},
        },
        {
            {"representatives", "B,Hkv,N,vectors,D", TensorType::kCache},
            {"block_slots", "B,N,max_block_length", TensorType::kInt64},
        },
        {
            {"vectors", PluginFieldType::kINT32, 2.0},
            {"max_block_length", PluginFieldType::kINT32, 40.0},
        },
    };
    return instance;
}

bool SemanticBlockMapPlugin::attributesValid() const
{
    if (attribute(0) != 1.0 && attribute(0) != 2.0)
    {
        return reject("attribute vectors", "1 or 2", std::to_string(attribute(0)));
    }
    return attribute(1) >= 1.0 || reject("attribute max_block_length", "1 or more", std::to_string(attribute(1)));
}

bool SemanticBlockMapPlugin::sizesSupported(Sizes const& sizes) const
{
    return gridSupported(sizes, {"B", "Hkv"}) && headSizeSupported(sizes, "key_cache");
}

cudaError_t SemanticBlockMapPlugin::run(Call const& call) const
{
    SemanticBlockMapParams params{};
    params.keyCache = call.inputs[0];
    params.blockStart = static_cast<int64_t const*>(call.inputs[1]);
    params.blockLength = static_cast<int64_t const*>(call.inputs[2]);
    params.representatives = call.outputs[0];
    params.blockSlots = static_cast<int64_t*>(call.outputs[1]);
    params.batch = static_cast<int32_t>(call.sizes.at("B"));
    params.kvHeads = static_cast<int32_t>(call.sizes.at("Hkv"));
    params.capacity = static_cast<int32_t>(call.sizes.at("C"));
    params.headSize = static_cast<int32_t>(call.sizes.at("D"));
    params.blocks = static_cast<int32_t>(call.sizes.at("N"));
    params.vectors = static_cast<int32_t>(attribute(0));
    params.maxBlockLength = static_cast<int32_t>(attribute(1));
    params.element = call.element;
    return semanticBlockMap(params, call.stream);
}
} // namespace semkv
