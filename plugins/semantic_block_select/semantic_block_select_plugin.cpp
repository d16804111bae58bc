#include "semantic_block_select_plugin.h"

#include "semantic_block_select.h"

using namespace nvinfer1;

namespace semkv
{
namespace
{
SemanticBlockSelectParams sizesOf(Sizes const& sizes, Element element)
{
    SemanticBlockSelectParams params{};
    params.batch = static_cast<int32_t>(sizes.at("B"));
    params.queryHeads = static_cast<int32_t>(sizes.at("Hq"));
    params.kvHeads = static_cast<int32_t>(sizes.at("Hkv"));
    params.rows = static_cast<int32_t>(sizes.at("S"));
    params.headSize = static_cast<int32_t>(sizes.at("D"));
    params.blocks = static_cast<int32_t>(sizes.at("N"));
    params.vectors = static_cast<int32_t>(sizes.at("R"));
    params.maxBlockLength = static_cast<int32_t>(sizes.at("L"));
    params.element = element;
    return params;
}
} // namespace

OperatorContract const& SemanticBlockSelectPlugin::contract()
{
    static OperatorContract const instance{
        "SemanticBlockSelect",
        {
            {"query", "B,Hq,S,D", TensorType::kCache},
            {"representatives", "B,Hkv,N,R,D", TensorType::kCache},
            {"block_slots", "B,N,L", TensorType::kInt64},
            {"block_count", "B", TensorType::kInt64},
            {"pinned", "B,N", TensorType::kInt64},
        },
        {
            {"slot_index", "B,Hkv,width", TensorType::kInt64},
        },
        {
            {"width", PluginFieldType::kINT32, 1024.0},
            {"reduce_max", PluginFieldType::kINT32, 0.0},
        },
    };
    return instance;
}

bool SemanticBlockSelectPlugin::attributesValid() const
{
    if (attribute(0) < 1.0)
    {
        return reject("attribute width", "1 or more", std::to_string(attribute(0)));
    }
    return attribute(1) == 0.0 || attribute(1) == 1.0
        || reject("attribute reduce_max", "0 or 1", std::to_string(attribute(1)));
}

bool SemanticBlockSelectPlugin::sizesSupported(Sizes const& sizes) const
{
    int64_t const queryHeads = sizes.at("Hq");
    int64_t const kvHeads = sizes.at("Hkv");
    int64_t const vectors = sizes.at("R");
    if (!gridSupported(sizes, {"B", "Hkv"}) || !headSizeSupported(sizes, "query"))
    {
        return false;
    }
    if (sizes.at("D") > kSemanticBlockSelectMaxHeadSize)
    {
        return reject("input query dimension D", "at most " + std::to_string(kSemanticBlockSelectMaxHeadSize),
            std::to_string(sizes.at("D")));
    }
    if (queryHeads >= 0 && kvHeads >= 0 && (kvHeads == 0 || queryHeads % kvHeads != 0))
    {
        return reject("input query dimension Hq", "a multiple of Hkv = " + std::to_string(kvHeads),
            std::to_string(queryHeads));
    }
    if (vectors >= 0 && vectors != 1 && vectors != 2)
    {
        return reject("input representatives dimension R", "1 or 2", std::to_string(vectors));
    }
    if (sizes.at("S") == 0)
    {
        return reject("input query dimension S", "1 or more", "0");
    }
    for (char const* const name : {"N", "L"})
    {
        if (sizes.at(name) == 0)
        {
            return reject(std::string("input block_slots dimension ") + name, "1 or more", "0");
        }
    }
    int64_t const blocks = sizes.at("N");
    int64_t const longest = sizes.at("L");
    if (blocks > kSemanticBlockSelectMaxBlocks)
    {
        return reject("input block_slots dimension N", "at most " + std::to_string(kSemanticBlockSelectMaxBlocks),
            std::to_string(blocks));
    }
    return blocks < 0 || longest < 0 || blocks * longest <= INT32_MAX
        || reject("input block_slots dimensions N and L", "N * L of at most " + std::to_string(INT32_MAX),
            std::to_string(blocks) + " * " + std::to_string(longest));
}

size_t SemanticBlockSelectPlugin::workspaceBytes(Sizes const& sizes, Element element) const
{
    return semanticBlockSelectWorkspaceBytes(sizesOf(sizes, element));
}

cudaError_t SemanticBlockSelectPlugin::run(Call const& call) const
{
    SemanticBlockSelectParams params = sizesOf(call.sizes, call.element);
    params.query = call.inputs[0];
    params.representatives = call.inputs[1];
    params.blockSlots = static_cast<int64_t const*>(call.inputs[2]);
    params.blockCount = static_cast<int64_t const*>(call.inputs[3]);
    params.pinned = static_cast<int64_t const*>(call.inputs[4]);
    params.slotIndex = static_cast<int64_t*>(call.outputs[0]);
    params.workspace = call.workspace;
    params.width = static_cast<int32_t>(attribute(0));
    params.reduceMax = static_cast<int32_t>(attribute(1));
    return semanticBlockSelect(params, call.stream);
}
} // namespace semkv
