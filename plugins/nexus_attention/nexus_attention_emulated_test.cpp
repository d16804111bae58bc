// NexusAttention where only the emulated build can look: device functions, and the grids of its launches.
#include "../harness/harness.h"
#include "codes.cuh"

#include <set>

using namespace nvinfer1;
using namespace harness;

// Every code of both types, against the harness's own decoding, and back.
PLUGIN_TEST(nexusAttentionCodes)
{
    for (int code = 0; code < 256; ++code)
    {
        Tensor fp8({1}, DataType::kFP8);
        Tensor int8({1}, DataType::kINT8);
        auto const bits = static_cast<unsigned char>(code);
        fp8.bytes[0] = int8.bytes[0] = bits;
        unsigned const word = 0x01010101U * bits;
        for (int i = 0; i < 16; ++i)
        {
            CHECK(semkv::elementOf(semkv::Vector<semkv::Int8>{{word, word, word, word}}, i) == int8.get(0));
            bool const isNumber = (bits & 0x7F) != 0x7F;
            float const value = semkv::elementOf(semkv::Vector<semkv::Fp8>{{word, word, word, word}}, i);
            CHECK(!isNumber || value * semkv::kCodeFactor<semkv::Fp8> == fp8.get(0));
            CHECK(!isNumber || semkv::encode<semkv::Fp8>(fp8.get(0)).bits == bits);
        }
        CHECK(code == 0x80 || static_cast<unsigned char>(semkv::encode<semkv::Int8>(int8.get(0)).bits) == bits);
    }
    // Halfway cases go to the even code; what is too large, to the largest.
    CHECK(semkv::encode<semkv::Fp8>(1.0625F).bits == 0x38 && semkv::encode<semkv::Fp8>(1.1875F).bits == 0x3A);
    CHECK(semkv::encode<semkv::Fp8>(0.0009765625F).bits == 0 && semkv::encode<semkv::Fp8>(0.0029296875F).bits == 2);
    CHECK(semkv::encode<semkv::Fp8>(-1e9F).bits == 0xFE && semkv::encode<semkv::Int8>(-1e9F).bits == -127);
    CHECK(semkv::encode<semkv::Int8>(2.5F).bits == 2 && semkv::encode<semkv::Int8>(-3.5F).bits == -4);
}

// Thread blocks of the attention, the first launch of a call, for each tactic: more splits for a larger one.
PLUGIN_TEST(nexusAttentionTacticsChangeTheLaunch)
{
    // Fifteen blocks a split, on the seven multiprocessors of the emulation.
    Shape const row{5, 3, 1, 64};
    Shape const cache{5, 3, 2048, 64};
    std::vector<Tensor> inputs;
    for (Shape const& shape : {row, row, row, cache, cache})
    {
        inputs.push_back(Tensor(shape, DataType::kFLOAT).randomise(static_cast<uint32_t>(inputs.size())));
    }
    inputs.emplace_back(Shape{5, 3, 2048}, DataType::kFLOAT);
    inputs.emplace_back(Shape{5}, DataType::kINT64);
    for (int64_t b = 0; b < 5; ++b)
    {
        inputs.back().integer(b) = 300;
    }
    using Set = Driver::TacticSet;
    for (Set const when : {Set::kAttached, Set::kRestored, Set::kBeforeClone})
    {
        std::vector<unsigned> blocks;
        for (int32_t const tactic : {1, 2, 4})
        {
            auto const plugin = create("NexusAttention", {});
            Driver driver(*plugin, inputs);
            driver.checkTypesAndShapes({row, cache, cache});
            semkv::emulation::takeGrids();
            driver.run(true, tactic, when);
            dim3 const grid = semkv::emulation::takeGrids().front();
            blocks.push_back(grid.x * grid.y * grid.z);
        }
        CHECK(blocks[0] <= blocks[1] && blocks[1] <= blocks[2] && blocks[0] < blocks[2]);
    }
}
