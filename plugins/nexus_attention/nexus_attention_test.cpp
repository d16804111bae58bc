// NexusAttention through the plugin API. Values over a wide sweep: tests/plugins/test_kernels.py.
#include "../harness/harness.h"

#include <cmath>

using namespace nvinfer1;
using namespace harness;

namespace
{
struct Sizes
{
    int64_t batch, queryHeads, kvHeads, rows, capacity, headSize;
};

std::vector<Tensor> makeInputs(Sizes const& s, DataType type, int64_t length)
{
    std::vector<Tensor> inputs;
    inputs.push_back(Tensor({s.batch, s.queryHeads, s.rows, s.headSize}, type).randomise(1));
    inputs.push_back(Tensor({s.batch, s.kvHeads, s.rows, s.headSize}, type).randomise(2));
    inputs.push_back(Tensor({s.batch, s.kvHeads, s.rows, s.headSize}, type).randomise(3));
    inputs.push_back(Tensor({s.batch, s.kvHeads, s.capacity, s.headSize}, type).randomise(4));
    inputs.push_back(Tensor({s.batch, s.kvHeads, s.capacity, s.headSize}, type).randomise(5));
    inputs.push_back(Tensor({s.batch, s.kvHeads, s.capacity}, DataType::kFLOAT).randomise(6));
    inputs.emplace_back(Shape{s.batch}, DataType::kINT64);
    for (int64_t b = 0; b < s.batch; ++b)
    {
        inputs.back().integer(b) = length;
    }
    return inputs;
}

std::vector<Shape> outputShapes(Sizes const& s)
{
    Shape const cache{s.batch, s.kvHeads, s.capacity, s.headSize};
    return {{s.batch, s.queryHeads, s.rows, s.headSize}, cache, cache};
}

// One new row, causal: plain attention over length + 1 slots in double precision.
double expected(std::vector<Tensor> const& in, Sizes const& s, int64_t b, int64_t h, int64_t d, int64_t length)
{
    int64_t const kv = b * s.kvHeads + h / (s.queryHeads / s.kvHeads);
    double total = 0.0;
    double sum = 0.0;
    for (int64_t slot = 0; slot <= length; ++slot)
    {
        bool const old = slot < length;
        int64_t const row = old ? (kv * s.capacity + slot) * s.headSize : kv * s.headSize;
        double logit = 0.0;
        for (int64_t i = 0; i < s.headSize; ++i)
        {
            logit += static_cast<double>(in[0].get((b * s.queryHeads + h) * s.headSize + i))
                * static_cast<double>(in[old ? 3 : 1].get(row + i));
        }
        logit /= std::sqrt(static_cast<double>(s.headSize));
        double const weight = std::exp(logit + (old ? static_cast<double>(in[5].get(kv * s.capacity + slot)) : 0.0));
        total += weight;
        sum += weight * static_cast<double>(in[old ? 4 : 2].get(row + d));
    }
    return sum / total;
}

double tolerance(DataType type)
{
    return type == DataType::kFLOAT ? 1e-5 : type == DataType::kHALF ? 2e-3 : 1e-2;
}
} // namespace

PLUGIN_TEST(nexusAttentionThroughItsLife)
{
    Sizes const s{2, 6, 2, 1, 150, 64};
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16})
    {
        for (bool const alias : {true, false})
        {
            for (int32_t const tactic : {0, 1, 2, 4})
            {
                auto const plugin = create("NexusAttention", {});
                Driver driver(*plugin, makeInputs(s, type, 140));
                std::vector<Tensor> const before = driver.inputs;
                driver.checkTypesAndShapes(outputShapes(s));
                std::vector<Tensor> const out = driver.run(alias, tactic);
                for (int64_t i = 0; i < out[0].elements(); i += 37)
                {
                    int64_t const h = i / s.headSize % s.queryHeads;
                    int64_t const b = i / s.headSize / s.queryHeads;
                    double const want = expected(before, s, b, h, i % s.headSize, 140);
                    CHECK(std::abs(static_cast<double>(out[0].get(i)) - want) <= tolerance(type));
                }
                for (int64_t i = 0; i < out[1].elements(); ++i)
                {
                    int64_t const slot = i / s.headSize % s.capacity;
                    int64_t const fresh = i / s.headSize / s.capacity * s.headSize + i % s.headSize;
                    CHECK(out[1].get(i) == (slot == 140 ? before[1].get(fresh) : before[3].get(i)));
                    CHECK(out[2].get(i) == (slot == 140 ? before[2].get(fresh) : before[4].get(i)));
                }
            }
        }
    }
}

PLUGIN_TEST(nexusAttentionFormats)
{
    auto const plugin = create("NexusAttention", {});
    Driver driver(*plugin, makeInputs({1, 1, 1, 1, 64, 64}, DataType::kFLOAT, 0));
    CHECK(driver.countFormatCombinations() == 3);
}

PLUGIN_TEST(nexusAttentionTactics)
{
    auto const plugin = create("NexusAttention", {});
    auto* const build = static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    std::vector<int32_t> tactics(static_cast<size_t>(build->getNbTactics()), 0);
    CHECK(build->getValidTactics(tactics.data(), build->getNbTactics()) == 0);
    CHECK((tactics == std::vector<int32_t>{2, 1, 4}));
    auto* const runtime
        = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    CHECK(runtime->setTactic(3) != 0);
    CHECK(logged({"semkv::NexusAttention", "tactic", "got 3"}));
}

PLUGIN_TEST(nexusAttentionLengthBeyondCapacityIsNaN)
{
    for (int64_t const length : {64, -1})
    {
        auto const plugin = create("NexusAttention", {});
        Driver driver(*plugin, makeInputs({1, 2, 1, 1, 64, 64}, DataType::kHALF, length));
        driver.checkTypesAndShapes(outputShapes({1, 2, 1, 1, 64, 64}));
        std::vector<unsigned char> const keys = driver.inputs[3].bytes;
        std::vector<Tensor> const out = driver.run(true);
        for (int64_t i = 0; i < out[0].elements(); ++i)
        {
            CHECK(std::isnan(out[0].get(i)));
        }
        CHECK(out[1].bytes == keys);
    }
}

PLUGIN_TEST(nexusAttentionBadInput)
{
    auto const plugin = create("NexusAttention", {});
    Driver wrongType(*plugin, makeInputs({1, 2, 1, 1, 64, 64}, DataType::kHALF, 0));
    wrongType.inputs[3].type = DataType::kFLOAT;
    CHECK(wrongType.typesStatus() != 0);
    CHECK(logged({"semkv::NexusAttention", "input key_cache", "expected float16", "got float32"}));
    wrongType.inputs[0].type = DataType::kINT8;
    CHECK(wrongType.typesStatus() != 0);
    CHECK(logged({"input query", "expected float32, float16 or bfloat16", "got int8"}));

    Driver wrongLength(*plugin, makeInputs({1, 2, 1, 1, 64, 64}, DataType::kHALF, 0));
    wrongLength.inputs[6].type = DataType::kINT32;
    CHECK(wrongLength.typesStatus() != 0);
    CHECK(logged({"input length", "expected int64", "got int32"}));

    Driver wrongRank(*plugin, makeInputs({1, 2, 1, 1, 64, 64}, DataType::kHALF, 0));
    wrongRank.inputs[5].shape = {1, 64};
    CHECK(wrongRank.shapesStatus() != 0);
    CHECK(logged({"input slot_bias", "expected shape [B,Hkv,C]", "got [1,64]"}));
    CHECK(wrongRank.configureStatus() != 0);

    Driver wrongSize(*plugin, makeInputs({1, 2, 1, 1, 64, 64}, DataType::kHALF, 0));
    wrongSize.inputs[4].shape[2] = 63;
    CHECK(wrongSize.shapesStatus() != 0);
    CHECK(logged({"input value_cache dimension C", "expected 64", "got 63"}));

    Driver wrongHead(*plugin, makeInputs({1, 2, 1, 1, 64, 72}, DataType::kHALF, 0));
    CHECK(wrongHead.shapesStatus() != 0);
    CHECK(logged({"dimension D", "expected 64, 80, 96, 128 or 256", "got 72"}));

    Driver wrongGroup(*plugin, makeInputs({1, 3, 2, 1, 64, 64}, DataType::kHALF, 0));
    CHECK(wrongGroup.shapesStatus() != 0);
    CHECK(logged({"dimension Hq", "a multiple of Hkv = 2", "got 3"}));

    Driver tooLong(*plugin, makeInputs({1, 2, 1, 9, 8, 64}, DataType::kHALF, 0));
    CHECK(tooLong.configureStatus() != 0);
    CHECK(logged({"dimension S", "at most the capacity C = 8", "got 9"}));

    Driver tooManyTiles(*plugin, makeInputs({1, 2, 1, 1, 64, 64}, DataType::kHALF, 0));
    for (size_t i = 0; i < 6; ++i)
    {
        tooManyTiles.inputs[i].shape[2] = 300000;
    }
    CHECK(tooManyTiles.shapesStatus() != 0);
    CHECK(logged({"dimension S", "at most 262140", "got 300000"}));
}

// The builder asks once with the largest sizes of a profile, so no smaller call may need more.
PLUGIN_TEST(nexusAttentionWorkspaceGrows)
{
    auto const plugin = create("NexusAttention", {});
    auto* const build = static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto const bytes = [&](int64_t batch, int64_t rows) {
        std::vector<DynamicPluginTensorDesc> descs;
        for (Tensor const& tensor : makeInputs({1, 1, 1, 1, 1, 64}, DataType::kHALF, 0))
        {
            DynamicPluginTensorDesc desc{};
            desc.desc.type = tensor.type;
            desc.max = dims(tensor.shape);
            desc.max.d[0] = batch;
            descs.push_back(desc);
        }
        for (size_t i : {size_t{0}, size_t{1}, size_t{2}})
        {
            descs[i].max.d[2] = rows;
        }
        return build->getWorkspaceSize(descs.data(), static_cast<int32_t>(descs.size()), nullptr, 0);
    };
    for (int64_t rows = 1; rows < 20; ++rows)
    {
        for (int64_t batch = 1; batch < 3000; batch += 7)
        {
            CHECK(bytes(batch, rows) <= bytes(batch + 1, rows) && bytes(batch, rows) <= bytes(batch, rows + 1));
        }
    }
}
