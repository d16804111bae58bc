#include "compact_cache.h"

#include "../common/row_move.cuh"

namespace semkv
{
namespace compact
{
constexpr int kThreads = 256;
constexpr int kPlanThreads = 512;
constexpr int kPlanEntries = 8; // consecutive entries of a thread: one prefix sum for 4096

struct Scratch
{
    int32_t* source;    // [B,G,C]
    int32_t* count;     // [B,G]
    int32_t* ascending; // [B,G]
    float* bias;        // [B,H,C]
    void* staging;      // [B,H,C,D]
};

inline size_t carve(CompactCacheParams const& params, Scratch& scratch)
{
    size_t const groups = static_cast<size_t>(params.batch) * static_cast<size_t>(params.groups);
    size_t const slots
        = static_cast<size_t>(params.batch) * static_cast<size_t>(params.heads) * static_cast<size_t>(params.capacity);
    Carver carver(params.workspace);
    scratch.source = carver.take<int32_t>(groups * static_cast<size_t>(params.capacity));
    scratch.count = carver.take<int32_t>(groups);
    scratch.ascending = carver.take<int32_t>(groups);
    scratch.bias = carver.take<float>(slots);
    scratch.staging = carver.take<unsigned char>(
        slots * static_cast<size_t>(params.headSize) * static_cast<size_t>(elementBytes(params.element)));
    return carver.used();
}

// Squeezes the holes out of keep_index. Grid: groups, batch.
__global__ void __launch_bounds__(kPlanThreads) planKernel(CompactCacheParams const params, Scratch const scratch)
{
    SEMKV_SHARED_BYTES(bytes);
    int* const shared = reinterpret_cast<int*>(bytes);
    int64_t const group = static_cast<int64_t>(blockIdx.y) * params.groups + blockIdx.x;
    int64_t const* const keep = params.keepIndex + group * params.capacity;
    int32_t* const source = scratch.source + group * params.capacity;
    int count = 0;
    int outside = 0;
    for (int base = 0; base < params.capacity; base += kPlanThreads * kPlanEntries)
    {
        int64_t slots[kPlanEntries];
        int own = 0;
        SEMKV_UNROLL
        for (int k = 0; k < kPlanEntries; ++k)
        {
            int const i = base + static_cast<int>(threadIdx.x) * kPlanEntries + k;
            slots[k] = i < params.capacity ? keep[i] : -1;
            outside |= slots[k] >= params.capacity ? 1 : 0;
            own += slots[k] >= 0 ? 1 : 0;
        }
        int total = 0;
        int place = count + blockScan<kPlanThreads>(own, shared, total);
        SEMKV_UNROLL
        for (int k = 0; k < kPlanEntries; ++k)
        {
            if (slots[k] >= 0)
            {
                source[place] = static_cast<int32_t>(slots[k]);
                ++place;
            }
        }
        count += total;
    }
    outside = __syncthreads_or(outside);
    int disorder = 0;
    for (int i = 1 + static_cast<int>(threadIdx.x); outside == 0 && i < count; i += kPlanThreads)
    {
        disorder |= source[i] <= source[i - 1] ? 1 : 0;
    }
    disorder = __syncthreads_or(disorder);
    if (threadIdx.x == 0)
    {
        scratch.count[group] = outside != 0 ? kKeepAll : count;
        scratch.ascending[group] = disorder == 0 ? 1 : 0;
    }
}

// One group out of range stops the whole batch row. Grid: batch.
__global__ void lengthKernel(CompactCacheParams const params, Scratch const scratch)
{
    int32_t* const count = scratch.count + static_cast<int64_t>(blockIdx.x) * params.groups;
    int longest = 0;
    bool outside = false;
    for (int g = 0; g < params.groups; ++g)
    {
        longest = max(longest, count[g]);
        outside = outside || count[g] == kKeepAll;
    }
    for (int g = 0; outside && g < params.groups; ++g)
    {
        count[g] = kKeepAll;
    }
    params.lengthOut[blockIdx.x] = outside ? -1 : longest;
}

// Grid: slots, heads, batch.
__global__ void __launch_bounds__(kThreads) biasKernel(CompactCacheParams const params, Scratch const scratch)
{
    int const slot = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (slot >= params.capacity)
    {
        return;
    }
    int64_t const batch = blockIdx.z;
    int64_t const head = (batch * params.heads + blockIdx.y) * params.capacity;
    int64_t const group = batch * params.groups + (params.groups == 1 ? 0 : blockIdx.y);
    int const count = scratch.count[group];
    float bias = slot < params.lengthOut[batch] ? minusInfinity() : 0.0F;
    if (count == kKeepAll)
    {
        bias = params.slotBias[head + slot];
    }
    else if (slot < count)
    {
        bias = params.slotBias[head + scratch.source[group * params.capacity + slot]];
    }
    scratch.bias[head + slot] = bias;
}
} // namespace compact

size_t compactCacheWorkspaceBytes(CompactCacheParams const& params)
{
    CompactCacheParams sizes = params;
    sizes.workspace = nullptr;
    compact::Scratch scratch{};
    return compact::carve(sizes, scratch);
}

cudaError_t compactCache(CompactCacheParams const& params, cudaStream_t stream)
{
    if (params.batch < 0 || params.batch > 65535 || params.heads <= 0 || params.heads > 65535 || params.capacity < 0
        || params.headSize <= 0 || params.headSize * elementBytes(params.element) % 16 != 0
        || (params.groups != 1 && params.groups != params.heads))
    {
        return cudaErrorInvalidValue;
    }
    if (params.batch == 0 || params.capacity == 0)
    {
        return cudaSuccess;
    }
    compact::Scratch scratch{};
    compact::carve(params, scratch);
    unsigned const batch = static_cast<unsigned>(params.batch);
    SEMKV_LAUNCH(dim3(static_cast<unsigned>(params.groups), batch), dim3(compact::kPlanThreads),
        sizeof(int) * (compact::kPlanThreads / 32 + 1), stream, (compact::planKernel), params, scratch);
    SEMKV_LAUNCH(dim3(batch), dim3(1), 0, stream, (compact::lengthKernel), params, scratch);
    SEMKV_LAUNCH(dim3(static_cast<unsigned>(ceilDivide(params.capacity, compact::kThreads)),
                     static_cast<unsigned>(params.heads), batch),
        dim3(compact::kThreads), 0, stream, (compact::biasKernel), params, scratch);
    cudaError_t const error
        = copyBias(params.slotBiasOut, scratch.bias, params.batch, params.heads, params.capacity, stream);
    RowMove const move{{params.keyCache, params.valueCache}, {params.keyCacheOut, params.valueCacheOut},
        scratch.staging, scratch.source, nullptr, nullptr,
        scratch.count, scratch.ascending, params.heads, params.groups, params.capacity, params.headSize};
    return error != cudaSuccess ? error : moveCaches(move, params.element, params.batch, stream);
}
} // namespace semkv
