#include "semantic_cluster_plugin.h"

#include "semantic_cluster.h"

using namespace nvinfer1;

namespace semkv
{
namespace
{
SemanticClusterParams sizesOf(Sizes const& sizes, Element element)
{
    SemanticClusterParams params{};
    params.batch = static_cast<int32_t>(sizes.at("B"));
    params.heads = static_cast<int32_t>(sizes.at("H"));
    params.capacity = static_cast<int32_t>(sizes.at("C"));
    params.headSize = static_cast<int32_t>(sizes.at("D"));
    params.groups = static_cast<int32_t>(sizes.at("G"));
    params.levels = static_cast<int32_t>(sizes.at("L"));
    params.element = element;
    return params;
}
} // namespace

OperatorContract const& SemanticClusterPlugin::contract()
{
    static OperatorContract const instance{
        "SemanticCluster",
        {
            {"key_cache", "B,H,C,D", TensorType::kCache},
            {"value_cache", "B,H,C,D", TensorType::kCache},
            {"slot_bias", "B,H,C", TensorType::kFloat32},
            {"length", "B", TensorType::kInt64},
            {"chunk_id", "B,G,L,C", TensorType::kInt64},
            {"thresholds", "L", TensorType::kFloat32},
            {"target", "B", TensorType::kInt64},
        },
        {
            {"key_cache_out", "B,H,C,D", TensorType::kCache, 0},
            {"value_cache_out", "B,H,C,D", TensorType::kCache, 1},
            {"slot_bias_out", "B,H,C", TensorType::kFloat32, 2},
            {"length_out", "B", TensorType::kInt64},
            {"source_slot", "B,G,C", TensorType::kInt64},
            {"level", "B", TensorType::kInt64},
        },
        {
            {"span", PluginFieldType::kINT32, 64.0},
        },
    };
    return instance;
}

bool SemanticClusterPlugin::attributesValid() const
{
    double const span = attribute(0);
    return (span >= 1.0 && span <= kSemanticClusterMaxSpan)
        || reject("attribute span", "1 to " + std::to_string(kSemanticClusterMaxSpan), std::to_string(span));
}

bool SemanticClusterPlugin::sizesSupported(Sizes const& sizes) const
{
    int64_t const capacity = sizes.at("C");
    int64_t const span = static_cast<int64_t>(attribute(0));
    if (capacity > kSemanticClusterMaxCapacity || (capacity >= 0 && capacity % span != 0))
    {
        return reject("input key_cache dimension C",
            "a multiple of span = " + std::to_string(span) + ", at most " + std::to_string(kSemanticClusterMaxCapacity),
            std::to_string(capacity));
    }
    return gridSupported(sizes, {"B", "H"}) && headSizeSupported(sizes, "key_cache")
        && groupsSupported(sizes, "chunk_id")
        && (sizes.at("L") != 0 || reject("input thresholds dimension L", "1 or more", "0"));
}

size_t SemanticClusterPlugin::workspaceBytes(Sizes const& sizes, Element element) const
{
    return semanticClusterWorkspaceBytes(sizesOf(sizes, element));
}

cudaError_t SemanticClusterPlugin::run(Call const& call) const
{
    SemanticClusterParams params = sizesOf(call.sizes, call.element);
    params.span = static_cast<int32_t>(attribute(0));
    params.keyCache = call.inputs[0];
    params.valueCache = call.inputs[1];
    params.slotBias = static_cast<float const*>(call.inputs[2]);
    params.length = static_cast<int64_t const*>(call.inputs[3]);
    params.chunkId = static_cast<int64_t const*>(call.inputs[4]);
    params.thresholds = static_cast<float const*>(call.inputs[5]);
    params.target = static_cast<int64_t const*>(call.inputs[6]);
    params.keyCacheOut = call.outputs[0];
    params.valueCacheOut = call.outputs[1];
    params.slotBiasOut = static_cast<float*>(call.outputs[2]);
    params.lengthOut = static_cast<int64_t*>(call.outputs[3]);
    params.sourceSlot = static_cast<int64_t*>(call.outputs[4]);
    params.level = static_cast<int64_t*>(call.outputs[5]);
    params.workspace = call.workspace;
    return semanticCluster(params, call.stream);
}
} // namespace semkv
