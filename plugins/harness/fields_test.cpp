// Attributes: from fields, into fields, and what becomes of wrong ones.
#include "harness.h"

#include <algorithm>
#include <cstring>
#include <set>

using namespace nvinfer1;
using namespace harness;

namespace
{
// Every attribute of every plugin, with a value that is not its default.
struct Plugin
{
    char const* name;
    Fields fields;
    char const* described;
};

std::vector<Plugin> const& plugins()
{
    static std::vector<Plugin> const instance{
        {"NexusAttention",
            {{{"scale", 0.1F}, {"softcap", 5.0F}},
                {{"causal", 0}, {"window", 37}, {"indexed", 1}, {"int8", 1}, {"fp8", 0}, {"mass", 1}}},
            "scale=0.100000;causal=0.000000;softcap=5.000000;window=37.000000;indexed=1.000000;int8=1.000000;"
            "fp8=0.000000;mass=1.000000;"},
        {"SemanticCluster", {{}, {{"span", 16}}}, "span=16.000000;"},
        {"SemanticBlockMap", {{}, {{"vectors", 1}, {"max_block_length", 9}}},
            "vectors=1.000000;max_block_length=9.000000;"},
        {"SemanticBlockSelect", {{}, {{"width", 77}, {"reduce_max", 1}}}, "width=77.000000;reduce_max=1.000000;"},
        {"CompactCache", {}, ""},
    };
    return instance;
}

std::unique_ptr<IPluginV3> restore(std::string const& name, std::vector<PluginField> const& fields)
{
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return std::unique_ptr<IPluginV3>(creator(name).createPlugin("node", &collection, TensorRTPhase::kRUNTIME));
}

std::vector<PluginField> serialised(IPluginV3& plugin)
{
    auto* const runtime
        = static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    PluginFieldCollection const* const fields = runtime->getFieldsToSerialize();
    return std::vector<PluginField>(fields->fields, fields->fields + fields->nbFields);
}

std::string timingId(std::string const& name, Fields const& fields)
{
    auto const plugin = create(name, fields);
    CHECK(plugin != nullptr);
    auto* const build = static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    return build->getTimingCacheID();
}

std::unique_ptr<IPluginV3> createWith(char const* plugin, PluginField const& field)
{
    PluginFieldCollection const fields{1, &field};
    return std::unique_ptr<IPluginV3>(creator(plugin).createPlugin("node", &fields, TensorRTPhase::kBUILD));
}
} // namespace

PLUGIN_TEST(fieldsComeBackAsTheyWereGiven)
{
    CHECK(plugins().size() == creators().size());
    for (Plugin const& one : plugins())
    {
        auto const plugin = create(one.name, one.fields);
        CHECK(plugin != nullptr && describe(*plugin) == one.described);
        auto const restored = restore(one.name, serialised(*plugin));
        CHECK(restored != nullptr && describe(*restored) == one.described);
        CHECK(one.fields.floats.size() + one.fields.ints.size() == serialised(*plugin).size());
    }
}

PLUGIN_TEST(aPlanWithoutAFieldIsRefused)
{
    for (Plugin const& one : plugins())
    {
        auto const plugin = create(one.name, one.fields);
        std::vector<PluginField> const all = serialised(*plugin);
        for (size_t missing = 0; missing < all.size(); ++missing)
        {
            std::vector<PluginField> some = all;
            some.erase(some.begin() + static_cast<std::ptrdiff_t>(missing));
            CHECK(restore(one.name, some) == nullptr);
            CHECK(logged({std::string("semkv::") + one.name, std::string("missing field ") + all[missing].name}));
        }
    }
}

// Timings are shared between nodes of equal id: all that changes the work must be in it, and nothing else.
PLUGIN_TEST(timingIdsTellAttributesApart)
{
    std::set<std::string> seen;
    for (Plugin const& one : plugins())
    {
        CHECK(timingId(one.name, {}) == timingId(one.name, {}));
        CHECK(timingId(one.name, one.fields) == timingId(one.name, one.fields));
        CHECK(seen.insert(timingId(one.name, {})).second);
        for (auto const& field : one.fields.floats)
        {
            CHECK(seen.insert(timingId(one.name, {{field}, {}})).second);
            CHECK(seen.insert(timingId(one.name, {{{field.first, std::nextafter(field.second, 9.0F)}}, {}})).second);
        }
        for (auto const& field : one.fields.ints)
        {
            int32_t const value = field.first == "fp8" ? 1 : field.second;
            CHECK(seen.insert(timingId(one.name, {{}, {{field.first, value}}})).second);
        }
    }
}

PLUGIN_TEST(unknownFieldIsRefused)
{
    CHECK(create("NexusAttention", {{}, {{"windows", 3}}}) == nullptr);
    CHECK(logged({"semkv::NexusAttention", "one of scale, causal, softcap, window", "got windows"}));
    CHECK(create("CompactCache", {{}, {{"span", 3}}}) == nullptr);
    CHECK(logged({"semkv::CompactCache", "expected none", "got span"}));
}

PLUGIN_TEST(fieldOfTheWrongTypeIsRefused)
{
    CHECK(create("NexusAttention", {{{"window", 3.0F}}, {}}) == nullptr);
    CHECK(logged({"semkv::NexusAttention", "attribute window", "expected int32 or int64"}));
    CHECK(create("NexusAttention", {{}, {{"scale", 1}}}) == nullptr);
    CHECK(logged({"attribute scale", "expected float32"}));
}

PLUGIN_TEST(int64FieldsAreTaken)
{
    int64_t span = 32;
    PluginField const field{"span", &span, PluginFieldType::kINT64, 1};
    auto const plugin = createWith("SemanticCluster", field);
    CHECK(plugin != nullptr && describe(*plugin) == "span=32.000000;");
    for (int64_t const outside : {(int64_t{1} << 32) + 40, int64_t{INT32_MAX} + 1, int64_t{INT32_MIN} - 1})
    {
        span = outside;
        CHECK(createWith("SemanticCluster", field) == nullptr);
        CHECK(logged({"semkv::SemanticCluster: attribute span: expected a number of 32 bits, got "
            + std::to_string(outside)}));
    }
}

PLUGIN_TEST(fieldsOfSeveralValuesAreRefused)
{
    int32_t const spans[3]{16, 16, 16};
    for (int32_t const length : {0, 3})
    {
        CHECK(createWith("SemanticCluster", {"span", spans, PluginFieldType::kINT32, length}) == nullptr);
        CHECK(logged({"semkv::SemanticCluster: attribute span: expected one value, got " + std::to_string(length)}));
    }
    CHECK(createWith("SemanticCluster", {"span", nullptr, PluginFieldType::kINT32, 1}) == nullptr);
    CHECK(logged({"attribute span: expected one value, got 0"}));
}

PLUGIN_TEST(attributeOutOfRangeIsRefused)
{
    CHECK(create("NexusAttention", {{}, {{"causal", 2}}}) == nullptr);
    CHECK(logged({"attribute causal", "expected 0 or 1", "got 2"}));
    CHECK(create("NexusAttention", {{}, {{"window", -1}}}) == nullptr);
    CHECK(logged({"attribute window", "expected 0 or more"}));
    CHECK(create("NexusAttention", {{{"softcap", -2.0F}}, {}}) == nullptr);
    CHECK(logged({"attribute softcap"}));
    CHECK(create("SemanticCluster", {{}, {{"span", 65}}}) == nullptr);
    CHECK(logged({"semkv::SemanticCluster", "attribute span", "expected 1 to 64"}));
}
