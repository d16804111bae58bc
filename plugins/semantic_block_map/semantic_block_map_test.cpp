// SemanticBlockMap through the plugin API. Values over a wide sweep: tests/plugins/test_kernels.py.
#include "../harness/harness.h"

#include <algorithm>
#include <cmath>

using namespace nvinfer1;
using namespace harness;

namespace
{
constexpr int64_t kHeads = 2;
constexpr int64_t kCapacity = 30;
constexpr int64_t kHeadSize = 80;
constexpr int64_t kBlocks = 4;
constexpr int64_t kLongest = 9;
constexpr int64_t kStart[kBlocks]{3, 12, -4, 21};
constexpr int64_t kLength[kBlocks]{9, 1, 0, 9};

std::vector<Tensor> makeInputs(DataType type)
{
    std::vector<Tensor> inputs;
    inputs.push_back(Tensor({1, kHeads, kCapacity, kHeadSize}, type).randomise(1));
    inputs.emplace_back(Shape{1, kBlocks}, DataType::kINT64);
    inputs.emplace_back(Shape{1, kBlocks}, DataType::kINT64);
    for (int64_t n = 0; n < kBlocks; ++n)
    {
        inputs[1].integer(n) = kStart[n];
        inputs[2].integer(n) = kLength[n];
    }
    return inputs;
}
} // namespace

PLUGIN_TEST(semanticBlockMapThroughItsLife)
{
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16})
    {
        for (int32_t const vectors : {1, 2})
        {
            auto const plugin = create("SemanticBlockMap", {{}, {{"vectors", vectors}, {"max_block_length", 9}}});
            Driver driver(*plugin, makeInputs(type));
            driver.checkTypesAndShapes({{1, kHeads, kBlocks, vectors, kHeadSize}, {1, kBlocks, kLongest}});
            std::vector<Tensor> out = driver.run(true);
            for (int64_t i = 0; i < kHeads * kBlocks * kHeadSize; ++i)
            {
                int64_t const d = i % kHeadSize;
                int64_t const block = i / kHeadSize % kBlocks;
                int64_t const head = i / kHeadSize / kBlocks;
                float low = kLength[block] > 0 ? 2.0F : 0.0F;
                float high = -low;
                float sum = 0.0F;
                for (int64_t slot = kStart[block]; slot < kStart[block] + kLength[block]; ++slot)
                {
                    float const v = driver.inputs[0].get((head * kCapacity + slot) * kHeadSize + d);
                    low = std::min(low, v);
                    high = std::max(high, v);
                    sum += v;
                }
                int64_t const at = (head * kBlocks + block) * vectors * kHeadSize + d;
                float const mean = sum / static_cast<float>(std::max<int64_t>(kLength[block], 1));
                CHECK(vectors == 2 ? out[0].get(at) == low && out[0].get(at + kHeadSize) == high
                                   : std::abs(out[0].get(at) - mean) < 5e-3F);
            }
            for (int64_t i = 0; i < kBlocks * kLongest; ++i)
            {
                int64_t const block = i / kLongest;
                int64_t const place = i % kLongest;
                CHECK(out[1].integer(i) == (place < kLength[block] ? kStart[block] + place : -1));
            }
        }
    }
}

PLUGIN_TEST(semanticBlockMapFormatsAndBadInput)
{
    auto const plugin = create("SemanticBlockMap", {});
    Driver driver(*plugin, makeInputs(DataType::kHALF));
    driver.checkTypesAndShapes({{1, kHeads, kBlocks, 2, kHeadSize}, {1, kBlocks, 40}});
    CHECK(driver.countFormatCombinations() == 3);
    driver.inputs[1].type = DataType::kINT32;
    CHECK(driver.typesStatus() != 0);
    CHECK(logged({"semkv::SemanticBlockMap", "input block_start", "expected int64", "got int32"}));
    driver.inputs[2].shape = {1, 5};
    CHECK(driver.shapesStatus() != 0);
    CHECK(logged({"input block_length dimension N", "expected 4", "got 5"}));
    driver.inputs[0].shape = {1, kHeads, kCapacity, 84};
    driver.inputs[2].shape = {1, 4};
    CHECK(driver.shapesStatus() != 0);
    CHECK(logged({"input key_cache dimension D", "expected a multiple of 8", "got 84"}));
    CHECK(create("SemanticBlockMap", {{}, {{"vectors", 3}}}) == nullptr);
    CHECK(logged({"semkv::SemanticBlockMap", "attribute vectors", "expected 1 or 2", "got 3"}));
    CHECK(create("SemanticBlockMap", {{}, {{"max_block_length", 0}}}) == nullptr);
    CHECK(logged({"attribute max_block_length", "expected 1 or more"}));
}
