// NexusAttention's attributes: the plugin must give, bit for bit, what the kernels give when they are called with them.
#include "../harness/harness.h"
#include "../harness/memory.h"
#include "nexus_attention.h"

using namespace nvinfer1;
using namespace harness;

namespace
{
constexpr int32_t kRows = 3;
constexpr int32_t kCapacity = 150;
constexpr int32_t kHeadSize = 64;
constexpr int64_t kLength = 140;

std::vector<Tensor> makeInputs(DataType type)
{
    std::vector<Tensor> inputs;
    for (Shape const& shape : std::vector<Shape>{{2, 4, kRows, kHeadSize}, {2, 2, kRows, kHeadSize},
             {2, 2, kRows, kHeadSize}, {2, 2, kCapacity, kHeadSize}, {2, 2, kCapacity, kHeadSize}})
    {
        inputs.push_back(Tensor(shape, type).randomise(static_cast<uint32_t>(inputs.size() + 1)));
    }
    inputs.push_back(Tensor({2, 2, kCapacity}, DataType::kFLOAT).randomise(6));
    inputs.emplace_back(Shape{2}, DataType::kINT64);
    inputs.back().integer(0) = inputs.back().integer(1) = kLength;
    return inputs;
}

// What the kernels make of the inputs without the plugin.
std::vector<unsigned char> launched(std::vector<Tensor> const& inputs, float scale, float softcap, int32_t causal,
    int32_t window)
{
    std::vector<Memory> memory;
    for (Tensor const& tensor : inputs)
    {
        memory.emplace_back(tensor.bytes);
    }
    Memory const output(inputs[0].bytes.size());
    semkv::NexusAttentionParams params{};
    params.query = memory[0].data();
    params.key = memory[1].data();
    params.value = memory[2].data();
    params.keyCache = memory[3].data();
    params.valueCache = memory[4].data();
    params.slotBias = static_cast<float const*>(memory[5].data());
    params.length = static_cast<int64_t const*>(memory[6].data());
    params.output = output.data();
    params.batch = 2;
    params.queryHeads = 4;
    params.kvHeads = 2;
    params.rows = kRows;
    params.capacity = kCapacity;
    params.headSize = kHeadSize;
    params.scale = scale;
    params.softcap = softcap;
    params.causal = causal;
    params.window = window;
    params.element = inputs[0].type == DataType::kFLOAT ? semkv::Element::kFloat32 : semkv::Element::kFloat16;
    Memory const workspace(semkv::nexusAttentionWorkspaceBytes(params));
    params.workspace = static_cast<float*>(workspace.data());
    Stream const stream;
    CHECK(semkv::nexusAttention(params, stream.get()) == cudaSuccess);
    stream.synchronise();
    return output.content();
}
} // namespace

PLUGIN_TEST(nexusAttentionAttributesReachTheKernel)
{
    struct Case
    {
        float scale;
        float softcap;
        int32_t causal;
        int32_t window;
    };
    Case const cases[]{{0.0F, 0.0F, 1, 0}, {0.1F, 0.0F, 1, 0}, {0.0F, 5.0F, 1, 0}, {0.0F, 0.0F, 0, 0},
        {0.0F, 0.0F, 1, 37}, {0.1F, 5.0F, 0, 37}};
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF})
    {
        std::vector<Tensor> const inputs = makeInputs(type);
        std::vector<std::vector<unsigned char>> seen;
        for (Case const& c : cases)
        {
            auto const plugin = create("NexusAttention",
                {{{"scale", c.scale}, {"softcap", c.softcap}}, {{"causal", c.causal}, {"window", c.window}}});
            Driver driver(*plugin, inputs);
            driver.checkTypesAndShapes({inputs[0].shape, inputs[3].shape, inputs[4].shape});
            std::vector<Tensor> const out = driver.run(true);
            CHECK(out[0].bytes == launched(inputs, c.scale, c.softcap, c.causal, c.window));
            for (std::vector<unsigned char> const& other : seen)
            {
                CHECK(out[0].bytes != other);
            }
            seen.push_back(out[0].bytes);
        }
    }
}
