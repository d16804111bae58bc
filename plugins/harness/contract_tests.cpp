// What holds for every plugin.
#include "harness.h"

#include "../compact_cache/compact_cache_plugin.h"
#include "../nexus_attention/nexus_attention_plugin.h"
#include "../semantic_block_map/semantic_block_map_plugin.h"
#include "../semantic_block_select/semantic_block_select_plugin.h"
#include "../semantic_cluster/semantic_cluster_plugin.h"

#include <cstring>

using namespace nvinfer1;
using namespace harness;

namespace
{
char const* typeText(semkv::TensorType type)
{
    switch (type)
    {
    case semkv::TensorType::kCache: return "T";
    case semkv::TensorType::kFloat32: return "float32";
    case semkv::TensorType::kInt64: return "int64";
    case semkv::TensorType::kInt8: return "int8";
    case semkv::TensorType::kFp8: return "float8e4m3fn";
    }
    return "";
}

void print(semkv::OperatorContract const& contract)
{
    for (semkv::TensorContract const& tensor : contract.inputs)
    {
        std::printf("contract %s input %s %s %s\n", contract.name, tensor.name, tensor.shape, typeText(tensor.type));
    }
    for (semkv::TensorContract const& tensor : contract.outputs)
    {
        std::printf("contract %s output %s %s %s\n", contract.name, tensor.name, tensor.shape, typeText(tensor.type));
    }
    for (semkv::OptionContract const& option : contract.options)
    {
        std::string const what = std::string("contract ") + contract.name + " option " + option.name;
        for (semkv::TensorContract const& tensor : option.inputs)
        {
            std::printf("%s input %s %s %s\n", what.c_str(), tensor.name, tensor.shape, typeText(tensor.type));
        }
        for (semkv::TensorContract const& tensor : option.outputs)
        {
            std::printf("%s output %s %s %s\n", what.c_str(), tensor.name, tensor.shape, typeText(tensor.type));
        }
        for (char const* const name : option.retyped)
        {
            std::printf("%s makes %s %s\n", what.c_str(), name, typeText(option.type));
        }
    }
    for (semkv::AttributeContract const& attribute : contract.attributes)
    {
        bool isOption = false;
        for (semkv::OptionContract const& option : contract.options)
        {
            isOption = isOption || std::strcmp(option.name, attribute.name) == 0;
        }
        if (isOption)
        {
            continue;
        }
        std::printf("contract %s attribute %s %s %g\n", contract.name, attribute.name,
            attribute.type == PluginFieldType::kFLOAT32 ? "float" : "int", attribute.initial);
    }
}
} // namespace

// The Python test compares these lines with semkv_deploy.ops.
PLUGIN_TEST(contracts)
{
    print(semkv::NexusAttentionPlugin::contract());
    print(semkv::SemanticClusterPlugin::contract());
    print(semkv::CompactCachePlugin::contract());
    print(semkv::SemanticBlockMapPlugin::contract());
    print(semkv::SemanticBlockSelectPlugin::contract());
}

PLUGIN_TEST(creatorsNameThemselves)
{
    CHECK(creators().size() == 5);
    for (IPluginCreatorV3One* const one : creators())
    {
        CHECK(std::strcmp(one->getPluginNamespace(), "semkv") == 0);
        CHECK(std::strcmp(one->getPluginVersion(), "1") == 0);
        CHECK(one->getFieldNames() != nullptr);
        auto const plugin = create(one->getPluginName(), {});
        CHECK(plugin != nullptr);
        auto const* const core
            = static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
        CHECK(std::strcmp(core->getPluginName(), one->getPluginName()) == 0);
        auto* const build
            = static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
        CHECK(build->getTimingCacheID() != nullptr);
        CHECK(build->getAliasedInput(-1) == -1 && build->getAliasedInput(99) == -1);
    }
}
