// NexusAttention's options through the plugin API. Values over a wide sweep: tests/plugins/test_kernels.py.
#include "../harness/harness.h"

#include <algorithm>
#include <cmath>

using namespace nvinfer1;
using namespace harness;

namespace
{
constexpr int64_t kBatch = 2;
constexpr int64_t kQueryHeads = 6;
constexpr int64_t kKvHeads = 2;
constexpr int64_t kGroup = kQueryHeads / kKvHeads;
constexpr int64_t kCapacity = 150;
constexpr int64_t kHeadSize = 64;
constexpr int64_t kWidth = 40;
constexpr int64_t kLength = 140;

struct Options
{
    bool indexed;
    DataType cache; // the query's type, int8 or fp8
    bool mass;

    bool quantized() const
    {
        return cache == DataType::kINT8 || cache == DataType::kFP8;
    }
    Fields fields() const
    {
        Fields fields;
        fields.ints = {{"indexed", indexed}, {"int8", cache == DataType::kINT8}, {"fp8", cache == DataType::kFP8},
            {"mass", mass}};
        return fields;
    }
};

std::vector<Tensor> makeInputs(DataType type, Options const& options)
{
    Shape const slots{kBatch, kKvHeads, kCapacity};
    std::vector<Tensor> inputs;
    inputs.push_back(Tensor({kBatch, kQueryHeads, 1, kHeadSize}, type).randomise(1));
    inputs.push_back(Tensor({kBatch, kKvHeads, 1, kHeadSize}, type).randomise(2));
    inputs.push_back(Tensor({kBatch, kKvHeads, 1, kHeadSize}, type).randomise(3));
    inputs.push_back(Tensor({kBatch, kKvHeads, kCapacity, kHeadSize}, options.cache).randomise(4));
    inputs.push_back(Tensor({kBatch, kKvHeads, kCapacity, kHeadSize}, options.cache).randomise(5));
    inputs.push_back(Tensor(slots, DataType::kFLOAT).randomise(6));
    inputs.emplace_back(Shape{kBatch}, DataType::kINT64);
    for (int64_t b = 0; b < kBatch; ++b)
    {
        inputs.back().integer(b) = kLength;
    }
    if (options.indexed)
    {
        inputs.emplace_back(Shape{kBatch, kKvHeads, kWidth}, DataType::kINT64);
        for (int64_t i = 0; i < inputs.back().elements(); ++i)
        {
            // Distinct within a KV head, in no order, one in five naming none.
            inputs.back().integer(i) = i % 5 == 4 ? -1 : i % kWidth * 37 % kLength;
        }
    }
    for (uint32_t seed = 7; options.quantized() && seed < 9; ++seed)
    {
        inputs.push_back(Tensor(slots, DataType::kFLOAT).randomise(seed));
        for (int64_t i = 0; i < inputs.back().elements(); ++i)
        {
            inputs.back().set(i, 0.01F + 0.01F * std::abs(inputs.back().get(i)));
        }
    }
    return inputs;
}

std::vector<Shape> outputShapes(Options const& options)
{
    Shape const cache{kBatch, kKvHeads, kCapacity, kHeadSize};
    Shape const slots{kBatch, kKvHeads, kCapacity};
    std::vector<Shape> shapes{{kBatch, kQueryHeads, 1, kHeadSize}, cache, cache};
    shapes.insert(shapes.end(), options.quantized() ? 2 : 0, slots);
    shapes.insert(shapes.end(), options.mass ? 1 : 0, slots);
    return shapes;
}

// What a cached element stands for after the run.
double element(std::vector<Tensor> const& out, Options const& options, size_t cache, int64_t slot, int64_t d)
{
    double const value = static_cast<double>(out[cache].get(slot * kHeadSize + d));
    return options.quantized() ? value * static_cast<double>(out[cache + 2].get(slot)) : value;
}

// Slots attended to, in all of the caches' slots.
std::vector<int64_t> slotsOf(std::vector<Tensor>& in, Options const& options, int64_t kv)
{
    std::vector<int64_t> slots{kv * kCapacity + kLength};
    for (int64_t i = 0; i < (options.indexed ? kWidth : kLength); ++i)
    {
        int64_t const slot = options.indexed ? in[7].integer(kv * kWidth + i) : i;
        if (slot >= 0)
        {
            slots.push_back(kv * kCapacity + slot);
        }
    }
    return slots;
}

// The weights of one query head, by slot, in double precision over the caches as they are after the run.
std::vector<double> weightsOf(
    std::vector<Tensor>& in, std::vector<Tensor> const& out, Options const& options, int64_t row, double& total)
{
    std::vector<double> weights;
    total = 0.0;
    for (int64_t const slot : slotsOf(in, options, row / kGroup))
    {
        double logit = 0.0;
        for (int64_t d = 0; d < kHeadSize; ++d)
        {
            logit += static_cast<double>(in[0].get(row * kHeadSize + d)) * element(out, options, 1, slot, d);
        }
        double const bias = slot % kCapacity < kLength ? static_cast<double>(in[5].get(slot)) : 0.0;
        weights.push_back(std::exp(logit / std::sqrt(static_cast<double>(kHeadSize)) + bias));
        total += weights.back();
    }
    return weights;
}

void checkOutputs(std::vector<Tensor> before, std::vector<Tensor> const& out, Options const& options)
{
    double const tolerance = before[0].type == DataType::kFLOAT ? 1e-5 : before[0].type == DataType::kHALF ? 2e-3 : 1e-2;
    std::vector<double> mass(static_cast<size_t>(kBatch * kKvHeads * kCapacity), 0.0);
    for (int64_t row = 0; row < kBatch * kQueryHeads; ++row)
    {
        double total = 0.0;
        std::vector<double> const weights = weightsOf(before, out, options, row, total);
        std::vector<int64_t> const slots = slotsOf(before, options, row / kGroup);
        for (int64_t d = 0; d < kHeadSize; d += 7)
        {
            double sum = 0.0;
            for (size_t i = 0; i < slots.size(); ++i)
            {
                sum += weights[i] / total * element(out, options, 2, slots[i], d);
            }
            CHECK(std::abs(static_cast<double>(out[0].get(row * kHeadSize + d)) - sum) <= tolerance);
        }
        for (size_t i = 0; i < slots.size(); ++i)
        {
            mass[static_cast<size_t>(slots[i])] += weights[i] / total;
        }
    }
    for (int64_t slot = 0; options.mass && slot < kBatch * kKvHeads * kCapacity; ++slot)
    {
        double const got = static_cast<double>(out.back().get(slot));
        CHECK(std::abs(got - mass[static_cast<size_t>(slot)]) <= 2e-5);
    }
}

// Old rows and scales as they were; the new row within half a step of what was given.
void checkCaches(std::vector<Tensor> const& before, std::vector<Tensor> const& out, Options const& options)
{
    for (size_t x : {size_t{1}, size_t{2}})
    {
        for (int64_t i = 0; i < out[x].elements(); ++i)
        {
            int64_t const slot = i / kHeadSize;
            if (slot % kCapacity != kLength)
            {
                CHECK(out[x].get(i) == before[x + 2].get(i));
                continue;
            }
            float const given = before[x].get(slot / kCapacity * kHeadSize + i % kHeadSize);
            double const stored = element(out, options, x, slot, i % kHeadSize);
            double const scale = options.quantized() ? static_cast<double>(out[x + 2].get(slot)) : 0.0;
            double const step = options.cache == DataType::kINT8 ? scale : std::abs(static_cast<double>(given)) / 8.0;
            double const allowed = options.quantized() ? std::max(step, scale / 512.0) * 0.5001 : 0.0;
            CHECK(std::abs(stored - static_cast<double>(given)) <= allowed);
        }
        for (int64_t slot = 0; options.quantized() && slot < out[x + 2].elements(); ++slot)
        {
            float const old = before[before.size() + x - 3].get(slot);
            CHECK(slot % kCapacity == kLength || out[x + 2].get(slot) == old);
        }
    }
}
} // namespace

PLUGIN_TEST(nexusAttentionOptionsThroughTheirLife)
{
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16})
    {
        for (DataType const cache : {type, DataType::kINT8, DataType::kFP8})
        {
            for (int const bits : {0, 1, 2, 3})
            {
                Options const options{(bits & 1) != 0, cache, (bits & 2) != 0};
                auto const plugin = create("NexusAttention", options.fields());
                Driver driver(*plugin, makeInputs(type, options));
                std::vector<Tensor> const before = driver.inputs;
                driver.checkTypesAndShapes(outputShapes(options));
                std::vector<Tensor> const out = driver.run(bits % 2 == 0, bits == 3 ? 4 : 0);
                checkOutputs(before, out, options);
                checkCaches(before, out, options);
            }
        }
    }
}

PLUGIN_TEST(nexusAttentionOptionsFormats)
{
    for (DataType const cache : {DataType::kFLOAT, DataType::kINT8, DataType::kFP8})
    {
        Options const options{true, cache, true};
        auto const plugin = create("NexusAttention", options.fields());
        Driver driver(*plugin, makeInputs(DataType::kFLOAT, options));
        CHECK(driver.countFormatCombinations() == 3);
    }
}

PLUGIN_TEST(nexusAttentionOptionsAlias)
{
    Options const options{true, DataType::kINT8, true};
    auto const plugin = create("NexusAttention", options.fields());
    auto* const build = static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    std::vector<int32_t> aliases;
    for (int32_t i = 0; i < build->getNbOutputs(); ++i)
    {
        aliases.push_back(build->getAliasedInput(i));
    }
    // Scales after slot_index; the mass is no input's.
    CHECK((aliases == std::vector<int32_t>{-1, 3, 4, 8, 9, -1}));
}

PLUGIN_TEST(nexusAttentionOptionsBadInput)
{
    CHECK(create("NexusAttention", {{}, {{"int8", 1}, {"fp8", 1}}}) == nullptr);
    CHECK(logged({"semkv::NexusAttention", "attributes int8 and fp8", "one of them at most", "got both"}));
    CHECK(create("NexusAttention", {{}, {{"mass", 2}}}) == nullptr);
    CHECK(logged({"semkv::NexusAttention", "attribute mass", "expected 0 or 1", "got 2"}));

    Options const options{true, DataType::kINT8, false};
    auto const plugin = create("NexusAttention", options.fields());
    Driver missing(*plugin, makeInputs(DataType::kHALF, {false, DataType::kINT8, false}));
    CHECK(missing.typesStatus() != 0);
    CHECK(logged({"semkv::NexusAttention", "number of inputs and outputs", "expected 10 and 5 with indexed, int8", "got 9 and 5"}));

    Driver wrongCache(*plugin, makeInputs(DataType::kHALF, {true, DataType::kINT8, false}));
    wrongCache.inputs[4].type = DataType::kHALF;
    CHECK(wrongCache.typesStatus() != 0);
    CHECK(logged({"input value_cache", "expected int8", "got float16"}));

    Driver wrongIndex(*plugin, makeInputs(DataType::kHALF, options));
    wrongIndex.inputs[7].type = DataType::kINT32;
    CHECK(wrongIndex.typesStatus() != 0);
    CHECK(logged({"input slot_index", "expected int64", "got int32"}));

    Driver wrongScale(*plugin, makeInputs(DataType::kHALF, options));
    wrongScale.inputs[9].shape[2] = kCapacity - 1;
    CHECK(wrongScale.shapesStatus() != 0);
    CHECK(logged({"input value_scale dimension C", "expected 150", "got 149"}));

    Driver noWidth(*plugin, makeInputs(DataType::kHALF, options));
    noWidth.inputs[7].shape[2] = 0;
    CHECK(noWidth.shapesStatus() != 0);
    CHECK(logged({"input slot_index dimension W", "expected 1 or more", "got 0"}));
}

// The mass needs room for every query row and entry, so that its workspace grows with capacity or width, too.
PLUGIN_TEST(nexusAttentionMassWorkspace)
{
    for (bool const indexed : {false, true})
    {
        Options const options{indexed, DataType::kHALF, true};
        auto const plugin = create("NexusAttention", options.fields());
        auto* const build
            = static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
        auto const bytes = [&](int64_t capacity, int64_t width) {
            std::vector<DynamicPluginTensorDesc> descs;
            for (Tensor const& tensor : makeInputs(DataType::kHALF, options))
            {
                DynamicPluginTensorDesc desc{};
                desc.desc.type = tensor.type;
                desc.max = dims(tensor.shape);
                std::replace(desc.max.d, desc.max.d + desc.max.nbDims, kCapacity, capacity);
                std::replace(desc.max.d, desc.max.d + desc.max.nbDims, kWidth, width);
                descs.push_back(desc);
            }
            return build->getWorkspaceSize(descs.data(), static_cast<int32_t>(descs.size()), nullptr, 0);
        };
        size_t const perEntry = sizeof(float) * kBatch * kQueryHeads;
        CHECK(bytes(1000, 40) - bytes(500, 40) == (indexed ? 0 : 500 * perEntry));
        CHECK(bytes(500, 90) - bytes(500, 40) == (indexed ? 50 * perEntry : 0));
    }
}
