#include "semantic_block_map.h"

#include "../common/device.cuh"

namespace semkv
{
namespace block_map
{
constexpr int kThreads = 256;
constexpr int kDepth = 4;

// One channel's values so far.
template <int kVectors>
struct Summary
{
    float low{kVectors == 2 ? -minusInfinity() : 0.0F}; // the sum, where the mean is wanted
    float high{minusInfinity()};

    __device__ __forceinline__ void add(float otherLow, float otherHigh)
    {
        low = kVectors == 2 ? fminf(low, otherLow) : low + otherLow;
        high = fmaxf(high, otherHigh);
    }
};

// One warp a block and head. A block's keys are one run of memory; the warp reads it front to back, 16 bytes a lane, in
// as many rows at once as its lanes cover. Grid: blocks, heads, batch.
template <typename T, int kVectors>
__global__ void __launch_bounds__(kThreads) blockMapKernel(SemanticBlockMapParams const params)
{
    constexpr int kSize = Vector<T>::kSize;
    int const block = static_cast<int>(blockIdx.x) * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
    if (block >= params.blocks)
    {
        return;
    }
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int64_t const entry = static_cast<int64_t>(blockIdx.z) * params.blocks + block;
    int64_t const head = static_cast<int64_t>(blockIdx.z) * params.kvHeads + blockIdx.y;
    int64_t const start = params.blockStart[entry];
    int64_t const length = params.blockLength[entry];
    bool const valid = length == 0
        || (length > 0 && length <= params.maxBlockLength && start >= 0 && start <= params.capacity - length);
    if (blockIdx.y == 0)
    {
        for (int i = lane; i < params.maxBlockLength; i += 32)
        {
            int64_t const slot = i < length ? start + i : -1;
            params.blockSlots[entry * params.maxBlockLength + i] = valid ? slot : params.capacity;
        }
    }
    int const rows = valid ? static_cast<int>(length) : 0;
    T const* const keys
        = static_cast<T const*>(params.keyCache) + (head * params.capacity + (rows > 0 ? start : 0)) * params.headSize;
    T* const to = static_cast<T*>(params.representatives) + (head * params.blocks + block) * kVectors * params.headSize;
    int const pieces = params.headSize / kSize;
    for (int firstPiece = 0; firstPiece < pieces; firstPiece += 32)
    {
        int const width = min(pieces - firstPiece, 32);
        int const phases = 32 / width;
        int const phase = lane / width;
        int const column = (firstPiece + lane % width) * kSize;
        Summary<kVectors> summary[kSize];
        for (int base = phase; phase < phases && base < rows; base += phases * kDepth)
        {
            Vector<T> v[kDepth];
            SEMKV_UNROLL
            for (int i = 0; i < kDepth; ++i)
            {
                int const row = min(base + i * phases, rows - 1);
                v[i] = loadVector(keys + static_cast<int64_t>(row) * params.headSize + column);
            }
            SEMKV_UNROLL
            for (int i = 0; i < kDepth; ++i)
            {
                SEMKV_UNROLL
                for (int e = 0; base + i * phases < rows && e < kSize; ++e)
                {
                    summary[e].add(elementOf(v[i], e), elementOf(v[i], e));
                }
            }
        }
        // The lanes of phase 0 collect; the others must keep what they have.
        for (int other = 1; other < phases; ++other)
        {
            SEMKV_UNROLL
            for (int e = 0; e < kSize; ++e)
            {
                float const low = __shfl_sync(kFullWarp, summary[e].low, lane % width + other * width);
                float const high
                    = kVectors == 2 ? __shfl_sync(kFullWarp, summary[e].high, lane % width + other * width) : 0.0F;
                if (phase == 0)
                {
                    summary[e].add(low, high);
                }
            }
        }
        float low[kSize];
        float high[kSize];
        SEMKV_UNROLL
        for (int e = 0; e < kSize; ++e)
        {
            float const empty = valid ? 0.0F : notANumber();
            float const first = kVectors == 2 ? summary[e].low : summary[e].low / static_cast<float>(rows);
            low[e] = rows > 0 ? first : empty;
            high[e] = rows > 0 ? summary[e].high : empty;
        }
        if (phase == 0)
        {
            storeVector(to + column, packVector<T>(low));
            if (kVectors == 2)
            {
                storeVector(to + params.headSize + column, packVector<T>(high));
            }
        }
    }
}

template <typename T>
cudaError_t run(SemanticBlockMapParams const& params, cudaStream_t stream)
{
    dim3 const grid(static_cast<unsigned>(ceilDivide(params.blocks, kThreads / 32)),
        static_cast<unsigned>(params.kvHeads), static_cast<unsigned>(params.batch));
    if (params.vectors == 2)
    {
        SEMKV_LAUNCH(grid, dim3(kThreads), 0, stream, (blockMapKernel<T, 2>), params);
    }
    else
    {
        SEMKV_LAUNCH(grid, dim3(kThreads), 0, stream, (blockMapKernel<T, 1>), params);
    }
    return cudaGetLastError();
}
} // namespace block_map

cudaError_t semanticBlockMap(SemanticBlockMapParams const& params, cudaStream_t stream)
{
    if (params.batch < 0 || params.batch > 65535 || params.kvHeads <= 0 || params.kvHeads > 65535 || params.capacity < 0
        || params.headSize <= 0 || params.headSize * elementBytes(params.element) % 16 != 0 || params.blocks < 0
        || (params.vectors != 1 && params.vectors != 2) || params.maxBlockLength < 1)
    {
        return cudaErrorInvalidValue;
    }
    if (params.batch == 0 || params.blocks == 0)
    {
        return cudaSuccess;
    }
    return forElement(params.element, [&](auto type) { return block_map::run<decltype(type)>(params, stream); });
}
} // namespace semkv
