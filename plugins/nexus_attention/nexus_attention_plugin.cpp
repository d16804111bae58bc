#include "nexus_attention_plugin.h"

#include "nexus_attention.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <array>

using namespace nvinfer1;

namespace semkv
{
namespace
{
constexpr std::array<int32_t, 3> kSplitTactics{2, 1, 4};

enum Attribute : size_t
{
    kScale,
    kCausal,
    kSoftcap,
    kWindow,
    kIndexed,
    kInt8,
    kFp8,
    kMass,
};

enum Input : size_t
{
    kQuery,
    kKey,
    kValue,
    kKeyCache,
    kValueCache,
    kSlotBias,
    kLength,
};

bool known(int64_t size)
{
    return size >= 0;
}

OptionContract quantized(char const* name, TensorType type)
{
    return {
        name,
        {{"key_scale", "B,Hkv,C", TensorType::kFloat32}, {"value_scale", "B,Hkv,C", TensorType::kFloat32}},
        {{"key_scale_out", "B,Hkv,C", TensorType::kFloat32, 0}, {"value_scale_out", "B,Hkv,C", TensorType::kFloat32, 1}},
        type,
        {"key_cache", "key_cache_out", "value_cache", "value_cache_out"},
    };
}
} // namespace

OperatorContract const& NexusAttentionPlugin::contract()
{
    static OperatorContract const instance{
        "NexusAttention",
        {
            {"query", "B,Hq,S,D", TensorType::kCache},
            {"key", "B,Hkv,S,D", TensorType::kCache},
            {"value", "B,Hkv,S,D", TensorType::kCache},
            {"key_cache", "B,Hkv,C,D", TensorType::kCache},
            {"value_cache", "B,Hkv,C,D", TensorType::kCache},
            {"slot_bias", "B,Hkv,C", TensorType::kFloat32},
            {"length", "B", TensorType::kInt64},
        },
        {
            {"output", "B,Hq,S,D", TensorType::kCache},
            {"key_cache_out", "B,Hkv,C,D", TensorType::kCache, kKeyCache},
            {"value_cache_out", "B,Hkv,C,D", TensorType::kCache, kValueCache},
        },
        {
            {"scale", PluginFieldType::kFLOAT32, 0.0},
            {"causal", PluginFieldType::kINT32, 1.0},
            {"softcap", PluginFieldType::kFLOAT32, 0.0},
            {"window", PluginFieldType::kINT32, 0.0},
            {"indexed", PluginFieldType::kINT32, 0.0},
            {"int8", PluginFieldType::kINT32, 0.0},
            {"fp8", PluginFieldType::kINT32, 0.0},
            {"mass", PluginFieldType::kINT32, 0.0},
        },
        {
            {"indexed", {{"slot_index", "B,Hkv,W", TensorType::kInt64}}, {}},
            quantized("int8", TensorType::kInt8),
            quantized("fp8", TensorType::kFp8),
            {"mass", {}, {{"attention_mass", "B,Hkv,C", TensorType::kFloat32}}},
        },
    };
    return instance;
}

NexusAttentionPlugin::NexusAttentionPlugin()
    : OperatorPlugin(contract())
{
}

IPluginV3* NexusAttentionPlugin::clone() noexcept
{
    try
    {
        return new NexusAttentionPlugin(*this);
    }
    catch (std::exception const&)
    {
        return nullptr;
    }
}

int32_t NexusAttentionPlugin::getNbTactics() noexcept
{
    return static_cast<int32_t>(kSplitTactics.size());
}

int32_t NexusAttentionPlugin::getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept
{
    std::copy_n(kSplitTactics.begin(), std::min<size_t>(static_cast<size_t>(nbTactics), kSplitTactics.size()), tactics);
    return 0;
}

int32_t NexusAttentionPlugin::setTactic(int32_t tactic) noexcept
{
    // 0 is what TensorRT sets for plugins without tactics, and before any was chosen.
    if (tactic != 0 && std::find(kSplitTactics.begin(), kSplitTactics.end(), tactic) == kSplitTactics.end())
    {
        reject("tactic", "1, 2 or 4", std::to_string(tactic));
        return -1;
    }
    mSplitHalves = tactic;
    return 0;
}

bool NexusAttentionPlugin::attributesValid() const
{
    for (Attribute const flag : {kCausal, kIndexed, kInt8, kFp8, kMass})
    {
        if (attribute(flag) != 0.0 && attribute(flag) != 1.0)
        {
            return reject(std::string("attribute ") + contract().attributes[flag].name, "0 or 1",
                std::to_string(attribute(flag)));
        }
    }
    if (attribute(kInt8) != 0.0 && attribute(kFp8) != 0.0)
    {
        return reject("attributes int8 and fp8", "one of them at most", "both");
    }
    if (!(attribute(kSoftcap) >= 0.0))
    {
        return reject("attribute softcap", "0 or more", std::to_string(attribute(kSoftcap)));
    }
    if (!(attribute(kWindow) >= 0.0))
    {
        return reject("attribute window", "0 or more", std::to_string(attribute(kWindow)));
    }
    return attribute(kScale) == attribute(kScale) || reject("attribute scale", "a number", "NaN");
}

bool NexusAttentionPlugin::sizesSupported(Sizes const& sizes) const
{
    int64_t const headSize = sizes.at("D");
    int64_t const queryHeads = sizes.at("Hq");
    int64_t const kvHeads = sizes.at("Hkv");
    int64_t const rows = sizes.at("S");
    int64_t const capacity = sizes.at("C");
    if (!gridSupported(sizes, {"B", "Hkv"}))
    {
        return false;
    }
    if (attribute(kIndexed) != 0.0 && sizes.at("W") == 0)
    {
        return reject("input slot_index dimension W", "1 or more", "0");
    }
    if (known(headSize) && !nexusAttentionHeadSizeSupported(static_cast<int32_t>(headSize)))
    {
        return reject("input query dimension D", "64, 80, 96, 128 or 256", std::to_string(headSize));
    }
    if (known(queryHeads) && known(kvHeads) && (kvHeads == 0 || queryHeads == 0 || queryHeads % kvHeads != 0))
    {
        return reject("input query dimension Hq", "a multiple of Hkv = " + std::to_string(kvHeads),
            std::to_string(queryHeads));
    }
    if (known(rows) && known(capacity) && rows > capacity)
    {
        return reject("input query dimension S", "at most the capacity C = " + std::to_string(capacity),
            std::to_string(rows));
    }
    if (known(rows) && known(queryHeads) && known(kvHeads))
    {
        int64_t const most
            = nexusAttentionMaxRows(static_cast<int32_t>(queryHeads), static_cast<int32_t>(kvHeads), cacheElement());
        return rows <= most
            || reject("input query dimension S", "at most " + std::to_string(most), std::to_string(rows));
    }
    return true;
}

CacheElement NexusAttentionPlugin::cacheElement() const
{
    return attribute(kInt8) != 0.0 ? CacheElement::kInt8
        : attribute(kFp8) != 0.0   ? CacheElement::kFp8
                                   : CacheElement::kSame;
}

NexusAttentionParams NexusAttentionPlugin::sizesAndAttributes(Sizes const& sizes) const
{
    NexusAttentionParams params{};
    params.batch = static_cast<int32_t>(sizes.at("B"));
    params.queryHeads = static_cast<int32_t>(sizes.at("Hq"));
    params.kvHeads = static_cast<int32_t>(sizes.at("Hkv"));
    params.rows = static_cast<int32_t>(sizes.at("S"));
    params.capacity = static_cast<int32_t>(sizes.at("C"));
    params.headSize = static_cast<int32_t>(sizes.at("D"));
    params.indexWidth = attribute(kIndexed) != 0.0 ? static_cast<int32_t>(sizes.at("W")) : 0;
    params.scale = static_cast<float>(attribute(kScale));
    params.softcap = static_cast<float>(attribute(kSoftcap));
    params.causal = static_cast<int32_t>(attribute(kCausal));
    params.window = static_cast<int32_t>(attribute(kWindow));
    params.splitHalves = mSplitHalves;
    params.cache = cacheElement();
    return params;
}

size_t NexusAttentionPlugin::workspaceBytes(Sizes const& sizes, Element) const
{
    NexusAttentionParams params = sizesAndAttributes(sizes);
    // Only whether they are null counts.
    int64_t index = 0;
    float mass = 0.0F;
    params.slotIndex = attribute(kIndexed) != 0.0 ? &index : nullptr;
    params.mass = attribute(kMass) != 0.0 ? &mass : nullptr;
    return nexusAttentionWorkspaceBytes(params);
}

cudaError_t NexusAttentionPlugin::run(Call const& call) const
{
    NexusAttentionParams params = sizesAndAttributes(call.sizes);
    params.query = call.inputs[kQuery];
    params.key = call.inputs[kKey];
    params.value = call.inputs[kValue];
    params.keyCache = call.outputs[1];
    params.valueCache = call.outputs[2];
    params.slotBias = static_cast<float const*>(call.inputs[kSlotBias]);
    params.length = static_cast<int64_t const*>(call.inputs[kLength]);
    params.output = call.outputs[0];
    params.workspace = static_cast<float*>(call.workspace);
    params.element = call.element;
    if (attribute(kIndexed) != 0.0)
    {
        params.slotIndex = static_cast<int64_t const*>(call.inputs[kLength + 1]);
    }
    if (params.cache != CacheElement::kSame)
    {
        params.keyScale = static_cast<float*>(call.outputs[3]);
        params.valueScale = static_cast<float*>(call.outputs[4]);
    }
    if (attribute(kMass) != 0.0)
    {
        params.mass = static_cast<float*>(call.outputs[outputs().size() - 1]);
    }
    size_t const slots = static_cast<size_t>(params.batch) * static_cast<size_t>(params.kvHeads)
        * static_cast<size_t>(params.capacity);
    size_t const rowBytes = static_cast<size_t>(params.headSize)
        * (params.cache == CacheElement::kSame ? static_cast<size_t>(elementBytes(call.element)) : 1);
    // Without PreviewFeature::kALIASED_PLUGIN_IO_10_03 the caches are separate buffers: right, but a copy a step.
    for (size_t i = 0; i < outputs().size(); ++i)
    {
        int32_t const source = outputs()[i].aliasOf;
        if (source < 0 || call.inputs[source] == call.outputs[i])
        {
            continue;
        }
        size_t const bytes = slots * (outputs()[i].type == TensorType::kFloat32 ? sizeof(float) : rowBytes);
        cudaError_t const error
            = cudaMemcpyAsync(call.outputs[i], call.inputs[source], bytes, cudaMemcpyDeviceToDevice, call.stream);
        if (error != cudaSuccess)
        {
            return error;
        }
    }
    return nexusAttention(params, call.stream);
}
} // namespace semkv
