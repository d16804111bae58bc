// What follows a split: its warps' results become the output, or a partial result that the merge kernel finishes.
#pragma once

#include "nexus_attention_plan.cuh"

namespace semkv::nexus
{
__device__ __forceinline__ float4 scaled(float4 const& v, float factor)
{
    return float4{v.x * factor, v.y * factor, v.z * factor, v.w * factor};
}

__device__ __forceinline__ float4 plusScaled(float4 const& sum, float4 const& v, float factor)
{
    return float4{sum.x + v.x * factor, sum.y + v.y * factor, sum.z + v.z * factor, sum.w + v.w * factor};
}

// Four neighbouring elements of the output.
template <typename T>
__device__ __forceinline__ void storeFour(void* base, int64_t index, float4 const& v)
{
    if constexpr (sizeof(T) == 4)
    {
        *reinterpret_cast<float4*>(static_cast<float*>(base) + index) = v;
    }
    else
    {
        T const elements[4]{fromFloat<T>(v.x), fromFloat<T>(v.y), fromFloat<T>(v.z), fromFloat<T>(v.w)};
        uint2 words;
        memcpy(&words, elements, 8);
        *reinterpret_cast<uint2*>(static_cast<T*>(base) + index) = words;
    }
}

__device__ __forceinline__ void storeFour(NexusAttentionParams const& call, int64_t index, float4 const& v)
{
    switch (call.element)
    {
    case Element::kFloat16: storeFour<__half>(call.output, index, v); break;
    case Element::kBFloat16: storeFour<__nv_bfloat16>(call.output, index, v); break;
    default: storeFour<float>(call.output, index, v);
    }
}

// Shared memory of a thread block at the end of its split, where kParts warps each have a result for all kRows rows: sums
// [part][row][dimension], then maxima and weights [part][row]. Rows are four floats apart from a multiple of 32 banks.
template <int kHeadSize, int kRows, int kParts>
struct Results
{
    static constexpr int kStride = kHeadSize + 4;
    static constexpr int kSums = kParts * kRows * kStride;
    static constexpr size_t kBytes = sizeof(float) * static_cast<size_t>(kSums + 2 * kParts * kRows);

    float* shared;

    __device__ __forceinline__ float* sums(int part, int row) const
    {
        return shared + (part * kRows + row) * kStride;
    }
    __device__ __forceinline__ float& maximum(int part, int row) const
    {
        return shared[kSums + part * kRows + row];
    }
    __device__ __forceinline__ float& weight(int part, int row) const
    {
        return shared[kSums + (kParts + part) * kRows + row];
    }

    // Merges the parts; four dimensions of a row a thread. Follows a __syncthreads.
    __device__ __forceinline__ void finish(Plan const& plan, int64_t head, int firstRow, int split, int active) const
    {
        constexpr int kPieces = kHeadSize / 4;
        int const rows = min(kRows, plan.queries - firstRow);
        for (int i = static_cast<int>(threadIdx.x); i < rows * kPieces; i += kThreads)
        {
            int const r = i / kPieces;
            int const d = i % kPieces * 4;
            float highest = minusInfinity();
            SEMKV_UNROLL
            for (int part = 0; part < kParts; ++part)
            {
                highest = fmaxf(highest, maximum(part, r));
            }
            float4 total{0.0F, 0.0F, 0.0F, 0.0F};
            float all = 0.0F;
            SEMKV_UNROLL
            for (int part = 0; part < kParts; ++part)
            {
                float const shrink = highest > minusInfinity() ? exp2f(maximum(part, r) - highest) : 0.0F;
                total = plusScaled(total, *reinterpret_cast<float4 const*>(sums(part, r) + d), shrink);
                all += weight(part, r) * shrink;
            }
            int64_t const outputRow = head * plan.queries + firstRow + r;
            if (active == 1)
            {
                storeFour(plan.call, outputRow * kHeadSize + d, scaled(total, 1.0F / all));
                if (d == 0)
                {
                    keepStatistics(plan, outputRow, highest, all);
                }
                continue;
            }
            *reinterpret_cast<float4*>(partialSums(plan, outputRow) + split * kHeadSize + d) = total;
            if (d == 0)
            {
                float* const scales = partialScales(plan, outputRow) + split * 2;
                scales[0] = highest;
                scales[1] = all;
            }
        }
    }
};
} // namespace semkv::nexus
