// The emulation itself: that it finds what it is there to find, and that its half types round as the hardware does.
#include "../common/mma.cuh"
#include "../harness/harness.h"

#include <sys/wait.h>
#include <unistd.h>

#include <set>
#include <string>
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

// A warp's buffer in shared memory, without one of its own for each warp: right if warps ran one after the other.
void sharedBufferKernel(int* out)
{
    SEMKV_SHARED_BYTES(bytes);
    int* const buffer = reinterpret_cast<int*>(bytes);
    int const lane = static_cast<int>(threadIdx.x) % 32;
    buffer[lane] = static_cast<int>(threadIdx.x);
    __syncwarp();
    out[threadIdx.x] = buffer[(lane + 1) % 32];
}

void divergentWarpKernel(int* out)
{
    int value = 1;
    if (threadIdx.x % 2 == 0)
    {
        value = __shfl_xor_sync(semkv::kFullWarp, value, 1);
    }
    else
    {
        value = __shfl_xor_sync(semkv::kFullWarp, value, 2);
    }
    out[threadIdx.x] = value;
}

void divergentBlockKernel(int* out)
{
    out[threadIdx.x] = 0;
    if (threadIdx.x < 32)
    {
        __syncthreads();
    }
    else
    {
        __syncthreads();
    }
}

// What the emulation says when it ends the process that runs `body`.
template <typename Body>
std::string dyingWords(Body const& body)
{
    int ends[2];
    CHECK(pipe(ends) == 0);
    pid_t const child = fork();
    CHECK(child >= 0);
    if (child == 0)
    {
        dup2(ends[1], STDERR_FILENO);
        body();
        _exit(0);
    }
    close(ends[1]);
    std::string words(4096, '\0');
    ssize_t const got = read(ends[0], words.data(), words.size());
    words.resize(got > 0 ? static_cast<size_t>(got) : 0);
    close(ends[0]);
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(!WIFEXITED(status) || WEXITSTATUS(status) != 0 || words.empty());
    return words;
}

// Matrices of small integers, so that every sum is exact; asymmetric, so that no transposition goes unseen.
float left(int row, int k)
{
    return static_cast<float>((row * 7 + k * 3) % 11 - 5);
}
float right(int k, int column)
{
    return static_cast<float>((k * 5 + column * 2 + k * column) % 13 - 6);
}
float start(int row, int column)
{
    return static_cast<float>(row * 100 + column);
}

// Fragments are written element by element from the PTX ISA's section on mma.m16n8k16 with 16-bit elements.
template <typename T>
void mmaKernel(float* out)
{
    int const groupId = static_cast<int>(threadIdx.x % 32) >> 2;
    int const threadIdInGroup = static_cast<int>(threadIdx.x % 32) % 4;
    T a[8];
    for (int i = 0; i < 8; ++i)
    {
        int const row = (0 <= i && i < 2) || (4 <= i && i < 6) ? groupId : groupId + 8;
        int const column = i < 4 ? threadIdInGroup * 2 + (i & 0x1) : threadIdInGroup * 2 + (i & 0x1) + 8;
        a[i] = semkv::fromFloat<T>(left(row, column));
    }
    T b[4];
    for (int i = 0; i < 4; ++i)
    {
        int const row = i < 2 ? threadIdInGroup * 2 + (i & 0x1) : threadIdInGroup * 2 + (i & 0x1) + 8;
        b[i] = semkv::fromFloat<T>(right(row, groupId));
    }
    unsigned aRegisters[4];
    unsigned bRegisters[2];
    std::memcpy(aRegisters, a, sizeof(a));
    std::memcpy(bRegisters, b, sizeof(b));
    float c[4];
    int rows[4];
    int columns[4];
    for (int i = 0; i < 4; ++i)
    {
        rows[i] = i < 2 ? groupId : groupId + 8;
        columns[i] = threadIdInGroup * 2 + (i & 0x1);
        c[i] = start(rows[i], columns[i]);
    }
    semkv::mma16816<T>(c, aRegisters, bRegisters[0], bRegisters[1]);
    semkv::mma16816<T>(c, aRegisters, bRegisters[0], bRegisters[1]);
    for (int i = 0; i < 4; ++i)
    {
        out[threadIdx.x / 32 * 128 + static_cast<unsigned>(rows[i] * 8 + columns[i])] = c[i];
    }
}

template <typename T>
void checkMma(uint64_t seed)
{
    std::vector<float> out(256, -1.0F);
    semkv::emulation::setSchedule(seed);
    SEMKV_LAUNCH(dim3(1), dim3(kThreads), 0, nullptr, (mmaKernel<T>), out.data());
    semkv::emulation::setSchedule(0);
    for (int i = 0; i < 256; ++i)
    {
        int const row = i % 128 / 8;
        float want = start(row, i % 8);
        for (int k = 0; k < 16; ++k)
        {
            want += 2.0F * left(row, k) * right(k, i % 8);
        }
        CHECK(out[static_cast<size_t>(i)] == want);
    }
}
} // namespace

PLUGIN_TEST(emulationInterleavesWarps)
{
    std::vector<int> out(kThreads, -1);
    SEMKV_LAUNCH(dim3(1), dim3(kThreads), 32 * sizeof(int), nullptr, (sharedBufferKernel), out.data());
    int wrong = 0;
    for (int t = 0; t < kThreads; ++t)
    {
        wrong += out[static_cast<size_t>(t)] != t / 32 * 32 + (t + 1) % 32 ? 1 : 0;
    }
    CHECK(wrong > 0);
}

PLUGIN_TEST(emulationEndsAtWhatTheHardwareForbids)
{
    std::vector<int> out(kThreads, -1);
    auto const run = [&](void (*kernel)(int*), size_t shared) {
        return dyingWords(
            [&] { SEMKV_LAUNCH(dim3(1), dim3(kThreads), shared, nullptr, (kernel), out.data()); });
    };
    CHECK(run(divergentWarpKernel, 0).find("lanes of a warp meet at ") != std::string::npos);
    CHECK(run(divergentBlockKernel, 0).find("threads of a block meet at ") != std::string::npos);
    CHECK(run(reduceKernel, 48 * 1024).empty());
    CHECK(run(reduceKernel, 48 * 1024 + 1).find("48 KiB of dynamic shared memory") != std::string::npos);
}

PLUGIN_TEST(emulationMma)
{
    for (uint64_t seed = 0; seed < 4; ++seed)
    {
        checkMma<__half>(seed);
        checkMma<__nv_bfloat16>(seed);
    }
}

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
