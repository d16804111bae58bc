// SemanticCluster through the plugin API. Values over a wide sweep: tests/plugins/test_kernels.py.
#include "../harness/harness.h"

#include <cmath>

using namespace nvinfer1;
using namespace harness;

namespace
{
constexpr int64_t kCapacity = 64;
constexpr int64_t kHeadSize = 64;
constexpr int64_t kLength = 12;

// Slots 3i, 3i+1, 3i+2 point the same way; slot 3i weighs two. One chunk, one level.
std::vector<Tensor> makeInputs(DataType type, int64_t target)
{
    std::vector<Tensor> inputs;
    inputs.emplace_back(Shape{1, 1, kCapacity, kHeadSize}, type);
    for (int64_t slot = 0; slot < kLength; ++slot)
    {
        inputs[0].set(slot * kHeadSize + slot / 3, static_cast<float>(1 + slot % 3));
    }
    inputs.push_back(Tensor({1, 1, kCapacity, kHeadSize}, type).randomise(2));
    inputs.emplace_back(Shape{1, 1, kCapacity}, DataType::kFLOAT);
    for (int64_t slot = 0; slot < kLength; slot += 3)
    {
        inputs[2].set(slot, std::log(2.0F));
    }
    inputs.emplace_back(Shape{1}, DataType::kINT64);
    inputs[3].integer(0) = kLength;
    inputs.emplace_back(Shape{1, 1, 1, kCapacity}, DataType::kINT64);
    inputs.emplace_back(Shape{1}, DataType::kFLOAT);
    inputs[5].set(0, 0.5F);
    inputs.emplace_back(Shape{1}, DataType::kINT64);
    inputs[6].integer(0) = target;
    return inputs;
}

std::vector<Shape> outputShapes()
{
    Shape const cache{1, 1, kCapacity, kHeadSize};
    return {cache, cache, {1, 1, kCapacity}, {1}, {1, 1, kCapacity}, {1}};
}
} // namespace

PLUGIN_TEST(semanticClusterThroughItsLife)
{
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16})
    {
        for (bool const alias : {true, false})
        {
            auto const plugin = create("SemanticCluster", {{}, {{"span", 64}}});
            Driver driver(*plugin, makeInputs(type, 5));
            Tensor const values = driver.inputs[1];
            driver.checkTypesAndShapes(outputShapes());
            std::vector<Tensor> out = driver.run(alias);
            CHECK(out[3].integer(0) == 4 && out[5].integer(0) == 0);
            for (int64_t slot = 0; slot < kCapacity; ++slot)
            {
                CHECK(out[4].integer(slot) == (slot < 4 ? 3 * slot : -1));
                float const bias = slot < 4 ? std::log(4.0F) : 0.0F;
                CHECK(std::abs(out[2].get(slot) - bias) < 1e-5F);
                for (int64_t d = 0; d < kHeadSize; ++d)
                {
                    // (2 * 1 + 2 + 3) / 4 along the cluster's own direction.
                    CHECK(out[0].get(slot * kHeadSize + d) == (slot < 4 && d == slot ? 1.75F : 0.0F));
                    float const mean = slot < 4 ? (2.0F * values.get(3 * slot * kHeadSize + d)
                                                      + values.get((3 * slot + 1) * kHeadSize + d)
                                                      + values.get((3 * slot + 2) * kHeadSize + d))
                            / 4.0F
                                                : 0.0F;
                    CHECK(std::abs(out[1].get(slot * kHeadSize + d) - mean) < 1e-2F);
                }
            }
        }
    }
}

// Keys that all point one way, in one chunk: a core for every span of them.
PLUGIN_TEST(semanticClusterSpan)
{
    for (int32_t const span : {1, 16, 32, 64})
    {
        auto const plugin = create("SemanticCluster", {{}, {{"span", span}}});
        Driver driver(*plugin, makeInputs(DataType::kHALF, 0));
        for (int64_t slot = 0; slot < kCapacity; ++slot)
        {
            driver.inputs[0].set(slot * kHeadSize + slot / 3, 0.0F);
            driver.inputs[0].set(slot * kHeadSize, 1.0F);
        }
        driver.inputs[3].integer(0) = kCapacity;
        driver.checkTypesAndShapes(outputShapes());
        std::vector<Tensor> out = driver.run(true);
        CHECK(out[3].integer(0) == kCapacity / span && out[4].integer(kCapacity / span - 1) == kCapacity - span);
    }
}

PLUGIN_TEST(semanticClusterWithinTargetChangesNothing)
{
    for (bool const alias : {true, false})
    {
        auto const plugin = create("SemanticCluster", {});
        Driver driver(*plugin, makeInputs(DataType::kHALF, kLength));
        std::vector<Tensor> const before = driver.inputs;
        driver.checkTypesAndShapes(outputShapes());
        std::vector<Tensor> out = driver.run(alias);
        CHECK(out[0].bytes == before[0].bytes && out[1].bytes == before[1].bytes && out[2].bytes == before[2].bytes);
        CHECK(out[3].integer(0) == kLength && out[5].integer(0) == -1);
        CHECK(out[4].integer(kLength - 1) == kLength - 1 && out[4].integer(kLength) == -1);
    }
}

PLUGIN_TEST(semanticClusterFormatsAndBadInput)
{
    auto const plugin = create("SemanticCluster", {});
    Driver driver(*plugin, makeInputs(DataType::kHALF, 5));
    CHECK(driver.countFormatCombinations() == 3);
    driver.inputs[5].type = DataType::kHALF;
    CHECK(driver.typesStatus() != 0);
    CHECK(logged({"semkv::SemanticCluster", "input thresholds", "expected float32", "got float16"}));
    driver.inputs[5].shape = {2};
    CHECK(driver.shapesStatus() != 0);
    CHECK(logged({"input thresholds dimension L", "expected 1", "got 2"}));
    Driver odd(*plugin, makeInputs(DataType::kHALF, 5));
    for (Tensor& tensor : odd.inputs)
    {
        for (int64_t& size : tensor.shape)
        {
            size = size == kCapacity && &tensor != &odd.inputs[0] ? 65 : size;
        }
    }
    odd.inputs[0].shape[2] = 65;
    odd.inputs[1].shape[3] = kHeadSize;
    CHECK(odd.shapesStatus() != 0);
    CHECK(logged({"input key_cache dimension C", "a multiple of span = 64", "got 65"}));
}
