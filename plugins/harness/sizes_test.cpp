// Sizes that no kernel takes, and the wrong number of tensors: each is refused with a line that says so.
#include "harness.h"

using namespace nvinfer1;
using namespace harness;

namespace
{
constexpr int64_t kHuge = (int64_t{1} << 31) + 64;

struct Case
{
    char const* plugin;
    std::vector<Shape> shapes;
    std::vector<std::string> logged;
};

// Shapes only: nothing is allocated.
DynamicPluginTensorDesc describeInput(Shape const& shape, DataType type)
{
    DynamicPluginTensorDesc desc{};
    desc.desc.dims = desc.min = desc.opt = desc.max = dims(shape);
    desc.desc.type = type;
    return desc;
}

IPluginV3OneBuildV2& buildOf(IPluginV3& plugin)
{
    return *static_cast<IPluginV3OneBuildV2*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
}

int32_t configure(IPluginV3& plugin, std::vector<Shape> const& shapes)
{
    std::vector<DynamicPluginTensorDesc> in;
    for (Shape const& shape : shapes)
    {
        in.push_back(describeInput(shape, DataType::kHALF));
    }
    return buildOf(plugin).configurePlugin(in.data(), static_cast<int32_t>(in.size()), nullptr, 0);
}

std::vector<Shape> attention(int64_t batch, int64_t heads, int64_t capacity)
{
    Shape const row{batch, heads, 1, 64};
    Shape const cache{batch, heads, capacity, 64};
    return {row, row, row, cache, cache, {batch, heads, capacity}, {batch}};
}

std::vector<Shape> compact(int64_t batch, int64_t heads, int64_t capacity)
{
    Shape const cache{batch, heads, capacity, 64};
    return {cache, cache, {batch, heads, capacity}, {batch, 1, capacity}};
}

std::vector<Shape> cluster(int64_t batch, int64_t heads)
{
    Shape const cache{batch, heads, 64, 64};
    return {cache, cache, {batch, heads, 64}, {batch}, {batch, 1, 1, 64}, {1}, {batch}};
}

std::vector<Shape> blockMap(int64_t batch, int64_t heads, int64_t blocks)
{
    return {{batch, heads, 64, 64}, {batch, blocks}, {batch, blocks}};
}

std::vector<Shape> blockSelect(int64_t batch, int64_t heads, int64_t blocks, int64_t longest)
{
    return {{batch, heads, 1, 64}, {batch, heads, blocks, 2, 64}, {batch, blocks, longest}, {batch}, {batch, blocks}};
}
} // namespace

PLUGIN_TEST(sizesThatNoKernelTakesAreRefused)
{
    Case const cases[]{
        {"NexusAttention", attention(65536, 1, 64), {"dimension B: expected at most 65535, got 65536"}},
        {"NexusAttention", attention(1, 65536, 64), {"dimension Hkv: expected at most 65535, got 65536"}},
        {"NexusAttention", attention(1, 1, kHuge), {"input key_cache dimension C: expected at most 1073741824"}},
        {"CompactCache", compact(65536, 1, 64), {"dimension B: expected at most 65535"}},
        {"CompactCache", compact(1, 65536, 64), {"dimension H: expected at most 65535"}},
        {"CompactCache", compact(1, 1, kHuge), {"input key_cache dimension C: expected at most 1073741824"}},
        {"SemanticCluster", cluster(65536, 1), {"dimension B: expected at most 65535"}},
        {"SemanticCluster", cluster(1, 65536), {"dimension H: expected at most 65535"}},
        {"SemanticBlockMap", blockMap(65536, 1, 4), {"dimension B: expected at most 65535"}},
        {"SemanticBlockMap", blockMap(1, 65536, 4), {"dimension Hkv: expected at most 65535"}},
        {"SemanticBlockMap", blockMap(1, 1, kHuge), {"input block_start dimension N: expected at most 1073741824"}},
        {"SemanticBlockSelect", blockSelect(65536, 1, 4, 8), {"dimension B: expected at most 65535"}},
        {"SemanticBlockSelect", blockSelect(1, 65536, 4, 8), {"dimension Hkv: expected at most 65535"}},
        {"SemanticBlockSelect", blockSelect(1, 1, (1 << 22) + 1, 8), {"dimension N: expected at most 4194304"}},
        {"SemanticBlockSelect", blockSelect(1, 1, 1 << 22, 512), {"dimensions N and L: expected N * L of at most 2147483647"}},
    };
    for (Case const& one : cases)
    {
        takeLog();
        auto const plugin = create(one.plugin, {});
        CHECK(configure(*plugin, one.shapes) != 0);
        CHECK(logged({std::string("semkv::") + one.plugin, one.logged[0]}));
    }
    for (Case const& one : {Case{"NexusAttention", attention(65535, 1, 64), {}},
             Case{"CompactCache", compact(1, 65535, int64_t{1} << 30), {}}, Case{"SemanticCluster", cluster(65535, 3), {}},
             Case{"SemanticBlockMap", blockMap(65535, 65535, 4), {}},
             Case{"SemanticBlockSelect", blockSelect(65535, 65535, 1 << 22, 511), {}}})
    {
        auto const plugin = create(one.plugin, {});
        CHECK(configure(*plugin, one.shapes) == 0);
    }
}

// One input too many or too few, wherever TensorRT hands them in.
PLUGIN_TEST(theWrongNumberOfTensorsIsRefused)
{
    auto const plain = create("NexusAttention", {});
    auto const indexed = create("NexusAttention", {{}, {{"indexed", 1}}});
    auto const compactor = create("CompactCache", {});
    struct Count
    {
        IPluginV3& plugin;
        int32_t right;
        char const* expected;
    };
    for (Count const& one : {Count{*plain, 7, "expected 7 and 3 without options, got "},
             Count{*indexed, 8, "expected 8 and 3 with indexed, got "}, Count{*compactor, 4, "expected 4 and 4, got "}})
    {
        for (int32_t const count : {one.right - 1, one.right + 1})
        {
            std::vector<DynamicPluginTensorDesc> in;
            std::vector<PluginTensorDesc> given;
            for (int32_t i = 0; i < count; ++i)
            {
                in.push_back(describeInput({1, 2, 64, 64}, DataType::kHALF));
                given.push_back(in.back().desc);
            }
            IPluginV3OneBuildV2& build = buildOf(one.plugin);
            std::string const expected = one.expected + std::to_string(count) + " and ";
            CHECK(build.configurePlugin(in.data(), count, nullptr, 0) != 0);
            CHECK(logged({"number of inputs and outputs", expected}));
            CHECK(build.getWorkspaceSize(in.data(), count, nullptr, 0) == 0);
            CHECK(logged({"number of inputs and outputs", expected}));
            auto* const runtime = static_cast<IPluginV3OneRuntime*>(
                one.plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
            CHECK(runtime->onShapeChange(given.data(), count, nullptr, 0) != 0);
            CHECK(logged({"number of inputs and outputs", expected}));
            std::vector<Tensor> tensors(static_cast<size_t>(count), Tensor({1, 2, 64, 64}, DataType::kHALF));
            Driver driver(one.plugin, tensors);
            CHECK(driver.shapesStatus() != 0);
            CHECK(logged({"number of inputs and outputs", expected}));
        }
    }
}
