// CompactCache through the plugin API. Values over a wide sweep: tests/plugins/test_kernels.py.
#include "../harness/harness.h"

#include <algorithm>

using namespace nvinfer1;
using namespace harness;

namespace
{
constexpr int64_t kCapacity = 40;
constexpr int64_t kHeadSize = 64;

std::vector<Tensor> makeInputs(DataType type, std::vector<int64_t> const& kept)
{
    std::vector<Tensor> inputs;
    inputs.push_back(Tensor({1, 2, kCapacity, kHeadSize}, type).randomise(1));
    inputs.push_back(Tensor({1, 2, kCapacity, kHeadSize}, type).randomise(2));
    inputs.push_back(Tensor({1, 2, kCapacity}, DataType::kFLOAT).randomise(3));
    inputs.emplace_back(Shape{1, 1, kCapacity}, DataType::kINT64);
    for (int64_t i = 0; i < kCapacity; ++i)
    {
        inputs.back().integer(i) = i < static_cast<int64_t>(kept.size()) ? kept[static_cast<size_t>(i)] : -1;
    }
    return inputs;
}

std::vector<Shape> outputShapes()
{
    return {{1, 2, kCapacity, kHeadSize}, {1, 2, kCapacity, kHeadSize}, {1, 2, kCapacity}, {1}};
}
} // namespace

PLUGIN_TEST(compactCacheThroughItsLife)
{
    std::vector<int64_t> const orders[]{{1, 5, 6, 30, 39}, {30, 2, 2, 0, 39, 7}, {}, {-1, 3, -1, 9}};
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16})
    {
        for (bool const alias : {true, false})
        {
            for (std::vector<int64_t> const& kept : orders)
            {
                auto const plugin = create("CompactCache", {});
                Driver driver(*plugin, makeInputs(type, kept));
                std::vector<Tensor> const before = driver.inputs;
                driver.checkTypesAndShapes(outputShapes());
                std::vector<Tensor> out = driver.run(alias);
                std::vector<int64_t> dense = kept;
                dense.erase(std::remove(dense.begin(), dense.end(), -1), dense.end());
                auto const count = static_cast<int64_t>(dense.size());
                CHECK(out[3].integer(0) == count);
                for (int64_t i = 0; i < out[0].elements(); ++i)
                {
                    int64_t const slot = i / kHeadSize % kCapacity;
                    int64_t const head = i / kHeadSize / kCapacity;
                    int64_t const from = slot < count
                        ? (head * kCapacity + dense[static_cast<size_t>(slot)]) * kHeadSize + i % kHeadSize
                        : -1;
                    CHECK(out[0].get(i) == (from >= 0 ? before[0].get(from) : 0.0F));
                    CHECK(out[1].get(i) == (from >= 0 ? before[1].get(from) : 0.0F));
                    CHECK(i % kHeadSize != 0
                        || out[2].get(i / kHeadSize) == (from >= 0 ? before[2].get(from / kHeadSize) : 0.0F));
                }
            }
        }
    }
}

PLUGIN_TEST(compactCacheIndexOutOfRangeKeepsTheCache)
{
    for (bool const alias : {true, false})
    {
        auto const plugin = create("CompactCache", {});
        Driver driver(*plugin, makeInputs(DataType::kHALF, {3, kCapacity}));
        std::vector<Tensor> const before = driver.inputs;
        driver.checkTypesAndShapes(outputShapes());
        std::vector<Tensor> out = driver.run(alias);
        CHECK(out[3].integer(0) == -1);
        CHECK(out[0].bytes == before[0].bytes && out[1].bytes == before[1].bytes && out[2].bytes == before[2].bytes);
    }
}

PLUGIN_TEST(compactCacheFormatsAndBadInput)
{
    auto const plugin = create("CompactCache", {});
    Driver driver(*plugin, makeInputs(DataType::kHALF, {}));
    CHECK(driver.countFormatCombinations() == 3);
    driver.inputs[3].type = DataType::kINT32;
    CHECK(driver.typesStatus() != 0);
    CHECK(logged({"semkv::CompactCache", "input keep_index", "expected int64", "got int32"}));
    driver.inputs[3].shape = {1, 3, kCapacity};
    CHECK(driver.shapesStatus() != 0);
    CHECK(logged({"input keep_index dimension G", "expected 1 or H = 2", "got 3"}));
    driver.inputs[3].shape = {1, kCapacity};
    CHECK(driver.shapesStatus() != 0);
    CHECK(logged({"input keep_index", "expected shape [B,G,C]", "got [1,40]"}));
}
