// SemanticBlockSelect through the plugin API. Values over a wide sweep: tests/plugins/test_kernels.py.
#include "../harness/harness.h"

using namespace nvinfer1;
using namespace harness;

namespace
{
constexpr int64_t kHeadSize = 64;
constexpr int64_t kBlocks = 6;
constexpr int64_t kLongest = 3;

// Blocks of three slots, five of them in use, the first one pinned. Two query rows per KV head: (1, 0, ...) and
// (-2, 0, ...). Block n's first channel lies between -n and n % 3: the rows' bounds are n % 3 and 2 n, so the sum prefers
// 4, 2 (6) to 3 and the maximum ranks 4, 3, 2, 1. The other KV head has block 5 - n there.
std::vector<Tensor> makeInputs(DataType type)
{
    std::vector<Tensor> inputs;
    inputs.emplace_back(Shape{1, 4, 1, kHeadSize}, type);
    inputs.emplace_back(Shape{1, 2, kBlocks, 2, kHeadSize}, type);
    inputs.emplace_back(Shape{1, kBlocks, kLongest}, DataType::kINT64);
    inputs.emplace_back(Shape{1}, DataType::kINT64);
    inputs.emplace_back(Shape{1, kBlocks}, DataType::kINT64);
    for (int64_t h = 0; h < 4; ++h)
    {
        inputs[0].set(h * kHeadSize, h % 2 == 0 ? 1.0F : -2.0F);
    }
    for (int64_t i = 0; i < 2 * kBlocks; ++i)
    {
        int64_t const n = i < kBlocks ? i : 2 * kBlocks - 1 - i;
        inputs[1].set(2 * i * kHeadSize, static_cast<float>(-n));
        inputs[1].set((2 * i + 1) * kHeadSize, static_cast<float>(n % 3));
    }
    for (int64_t i = 0; i < kBlocks * kLongest; ++i)
    {
        inputs[2].integer(i) = 10 + i;
    }
    inputs[3].integer(0) = 5;
    inputs[4].integer(0) = 1;
    return inputs;
}

void expect(Tensor& slots, std::vector<std::vector<int64_t>> const& heads)
{
    for (size_t h = 0; h < heads.size(); ++h)
    {
        for (size_t i = 0; i < heads[h].size(); ++i)
        {
            CHECK(slots.integer(static_cast<int64_t>(h * heads[h].size() + i)) == heads[h][i]);
        }
    }
}
} // namespace

PLUGIN_TEST(semanticBlockSelectThroughItsLife)
{
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16})
    {
        auto const select = [&](int32_t width, int32_t reduceMax) {
            auto const plugin = create("SemanticBlockSelect", {{}, {{"width", width}, {"reduce_max", reduceMax}}});
            Driver driver(*plugin, makeInputs(type));
            driver.checkTypesAndShapes({{1, 2, width}});
            return driver.run(true)[0];
        };
        // Sums: 0, 3, 6, 6, 9 in the first head (a tie of 2 and 3), 12, 9, 6, 6, 3 in the second.
        Tensor slots = select(8, 0);
        expect(slots, {{10, 11, 12, 16, 17, 22, 23, 24}, {10, 11, 12, 13, 14, 15, 16, 17}});
        // Maxima: 0, 2, 4, 6, 8 and 10, 8, 6, 4, 2.
        slots = select(8, 1);
        expect(slots, {{10, 11, 12, 19, 20, 22, 23, 24}, {10, 11, 12, 13, 14, 15, 16, 17}});
        slots = select(17, 0);
        std::vector<int64_t> const all{10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, -1, -1};
        expect(slots, {all, all});
    }
}

PLUGIN_TEST(semanticBlockSelectFormatsAndBadInput)
{
    auto const plugin = create("SemanticBlockSelect", {});
    Driver driver(*plugin, makeInputs(DataType::kHALF));
    driver.checkTypesAndShapes({{1, 2, 1024}});
    CHECK(driver.countFormatCombinations() == 3);
    driver.inputs[4].type = DataType::kBOOL;
    CHECK(driver.typesStatus() != 0);
    CHECK(logged({"semkv::SemanticBlockSelect", "input pinned", "expected int64", "got bool"}));
    driver.inputs[1].shape[3] = 3;
    CHECK(driver.shapesStatus() != 0);
    CHECK(logged({"input representatives dimension R", "expected 1 or 2", "got 3"}));
    driver.inputs[1].shape = {1, 3, kBlocks, 2, kHeadSize};
    CHECK(driver.shapesStatus() != 0);
    CHECK(logged({"input query dimension Hq", "expected a multiple of Hkv = 3", "got 4"}));
    driver.inputs[1].shape = {1, 2, kBlocks, 2, 80};
    CHECK(driver.shapesStatus() != 0);
    CHECK(logged({"input representatives dimension D", "expected 64", "got 80"}));
    CHECK(create("SemanticBlockSelect", {{}, {{"width", 0}}}) == nullptr);
    CHECK(logged({"semkv::SemanticBlockSelect", "attribute width", "expected 1 or more"}));
    CHECK(create("SemanticBlockSelect", {{}, {{"reduce_max", 2}}}) == nullptr);
    CHECK(logged({"attribute reduce_max", "expected 0 or 1", "got 2"}));
}
