// The emulation itself: that it finds what it is there to find, and that its half types round as the hardware does.
#include "../common/device.cuh"
#include "../harness/harness.h"

#include <set>
#include <vector>

namespace
{
constexpr int kThreads = 64;

// Every thread reads its neighbour's value from the other warp; `synchronise` says whether it waits for it first.
void exchangeKernel(int* out, bool synchronise)
{
    SEMKV_SHARED_BYTES(bytes);
    int* const shared = reinterpret_cast<int*>(bytes);
    int const thread = static_cast<int>(threadIdx.x);
    shared[thread] = thread;
    if (synchronise)
    {
        __syncthreads();
    }
    out[thread] = shared[(thread + 32) % kThreads];
}

std::vector<int> exchange(bool synchronise, uint64_t seed)
{
    std::vector<int> out(kThreads, -1);
    semkv::emulation::setSchedule(seed);
    SEMKV_LAUNCH(dim3(1), dim3(kThreads), kThreads * sizeof(int), nullptr, (exchangeKernel), out.data(), synchronise);
    semkv::emulation::setSchedule(0);
    return out;
}

void reduceKernel(int* out)
{
    int value = static_cast<int>(threadIdx.x) % 32;
    for (int offset = 16; offset > 0; offset /= 2)
    {
        value += __shfl_xor_sync(semkv::kFullWarp, value, offset);
    }
    int const any = __syncthreads_or(threadIdx.x == 5 ? 1 : 0);
    int const none = __syncthreads_or(0);
    out[threadIdx.x] = value + 1000 * any + 10000 * none;
}
} // namespace

PLUGIN_TEST(emulationShowsAMissingBarrier)
{
    std::set<std::vector<int>> seen;
    for (uint64_t seed = 0; seed < 8; ++seed)
    {
        seen.insert(exchange(false, seed));
        std::vector<int> const right = exchange(true, seed);
        for (int t = 0; t < kThreads; ++t)
        {
            CHECK(right[static_cast<size_t>(t)] == (t + 32) % kThreads);
        }
    }
    CHECK(seen.size() > 1);
}

PLUGIN_TEST(emulationCollectives)
{
    std::vector<int> out(kThreads, -1);
    SEMKV_LAUNCH(dim3(1), dim3(kThreads), 0, nullptr, (reduceKernel), out.data());
    for (int const value : out)
    {
        CHECK(value == 31 * 32 / 2 + 1000);
    }
}

PLUGIN_TEST(halfTypesRound)
{
    for (uint32_t bits = 0; bits < 0x10000U; ++bits)
    {
        __half const half{static_cast<uint16_t>(bits)};
        __nv_bfloat16 const brain{static_cast<uint16_t>(bits)};
        float const wide = __half2float(half);
        CHECK(wide != wide || __float2half_rn(wide).bits == bits);
        float const wideBrain = __bfloat162float(brain);
        CHECK(wideBrain != wideBrain || __float2bfloat16_rn(wideBrain).bits == bits);
        // Halfway to the next value: to the even one.
        if (bits < 0x7BFFU)
        {
            float const next = __half2float(__half{static_cast<uint16_t>(bits + 1)});
            CHECK(__float2half_rn((wide + next) / 2).bits == bits + (bits & 1U));
        }
    }
    CHECK(__float2half_rn(65520.0F).bits == 0x7C00U && __float2half_rn(65519.0F).bits == 0x7BFFU);
}
