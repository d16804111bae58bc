// Host side of the NexusAttention kernels for one element type of the cache; one .cu file instantiates it for each.
#pragma once

#include "nexus_attention_splits.h"
#include "nexus_attention_tensor_kernel.cuh"

#include <cmath>

namespace semkv::nexus
{
// Thread blocks that the device holds at a time.
inline cudaError_t blocksAtATime(int blocksPerMultiprocessor, int64_t& blocks)
{
    int device = 0;
    int multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
    {
        error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    blocks = static_cast<int64_t>(multiprocessors) * blocksPerMultiprocessor;
    return error;
}

// nexus_attention_merge.cu
cudaError_t launchMerge(Plan const& plan, cudaStream_t stream);

// nexus_attention_mass.cu
cudaError_t launchMass(Plan const& plan, cudaStream_t stream);

using Kernel = void (*)(Plan);

// S: the shape of the kernel.
template <typename S>
cudaError_t launchKernel(Plan plan, Kernel kernel, cudaStream_t stream)
{
    NexusAttentionParams const& call = plan.call;
    plan.rowTile = S::kRows;
    plan.slotTile = S::kSlotTile;
    int const headTiles = call.kvHeads * ceilDivide(plan.queries, S::kRows);
    int const blocksPerSplit = call.batch * headTiles;
    Filling filling{blocksPerSplit, ceilDivide(plan.entries, S::kSlotTile), 0};
    cudaError_t error = blocksAtATime(S::kBlocks, filling.slots);
    if (error != cudaSuccess)
    {
        return error;
    }
    plan.splits = static_cast<int32_t>(chooseSplits(filling, maxSplits(blocksPerSplit), call.splitHalves));

    dim3 const grid(static_cast<unsigned>(headTiles), static_cast<unsigned>(plan.splits), static_cast<unsigned>(call.batch));
    SEMKV_LAUNCH(grid, dim3(kThreads), S::kSharedBytes, stream, (kernel), plan);
    error = plan.splits > 1 ? launchMerge(plan, stream) : cudaGetLastError();
    return error == cudaSuccess && call.mass != nullptr ? launchMass(plan, stream) : error;
}

template <typename T, int kHeadSize, int kRows>
cudaError_t launchRows(Plan const& plan, cudaStream_t stream)
{
    return launchKernel<Shape<T, kHeadSize, kRows>>(plan, decodeKernel<T, kHeadSize, kRows>, stream);
}

// Whether tensor cores take this call: several query rows of 16 bits, and machine code, or PTX, of sm_80 or later.
// Machine code for sm_75 runs on nothing later, but its PTX does, and the kernels in that are empty.
template <typename T, typename C, int kHeadSize>
cudaError_t launchTensor(Plan const& plan, cudaStream_t stream, bool& taken)
{
    cudaFuncAttributes attributes{};
    cudaError_t const error = cudaFuncGetAttributes(&attributes, tensorKernel<T, C, kHeadSize>);
    taken = error != cudaSuccess || attributes.ptxVersion >= 80;
    return error == cudaSuccess && taken
        ? launchKernel<TensorShape<T, C, kHeadSize>>(plan, tensorKernel<T, C, kHeadSize>, stream)
        : error;
}

template <typename C, int kHeadSize>
cudaError_t launchTensorElement(Plan const& plan, cudaStream_t stream, bool& taken)
{
    if constexpr (kIsCode<C>)
    {
        switch (plan.call.element)
        {
        case Element::kFloat16: return launchTensor<__half, C, kHeadSize>(plan, stream, taken);
        case Element::kBFloat16: return launchTensor<__nv_bfloat16, C, kHeadSize>(plan, stream, taken);
        default: return cudaSuccess;
        }
    }
    else if constexpr (sizeof(C) == 2)
    {
        return launchTensor<C, C, kHeadSize>(plan, stream, taken);
    }
    return cudaSuccess;
}

template <typename C, int kHeadSize>
cudaError_t launchHeadSize(Plan const& plan, cudaStream_t stream)
{
    if (plan.queries == 1)
    {
        return launchRows<C, kHeadSize, 1>(plan, stream);
    }
    bool taken = false;
    cudaError_t const error = launchTensorElement<C, kHeadSize>(plan, stream, taken);
    if (taken)
    {
        return error;
    }
    // Eight or sixteen elements a lane instead of four leave no registers for eight rows.
    if constexpr (sizeof(C) == 4)
    {
        if (plan.queries == 2)
        {
            return launchRows<C, kHeadSize, 2>(plan, stream);
        }
        if (plan.queries > 4)
        {
            return launchRows<C, kHeadSize, 8>(plan, stream);
        }
    }
    return launchRows<C, kHeadSize, 4>(plan, stream);
}

template <typename T>
cudaError_t launch(NexusAttentionParams const& call, cudaStream_t stream)
{
    Plan plan{};
    plan.call = call;
    float const scale = call.scale != 0.0F ? call.scale : 1.0F / std::sqrt(static_cast<float>(call.headSize));
    plan.factor = call.softcap > 0.0F ? scale / call.softcap : scale * kLog2E;
    plan.cap = call.softcap > 0.0F ? call.softcap * kLog2E : 0.0F;
    plan.group = call.queryHeads / call.kvHeads;
    plan.queries = plan.group * call.rows;
    plan.entries = call.slotIndex != nullptr ? call.indexWidth + call.rows : call.capacity;
    plan.partials = call.workspace;
    if (call.mass != nullptr)
    {
        int64_t const queryRows = static_cast<int64_t>(call.batch) * call.queryHeads * call.rows;
        plan.statistics = call.workspace;
        plan.products = plan.statistics + 2 * queryRows;
        int64_t const floats = (2 + plan.entries) * queryRows;
        plan.partials = call.workspace + (floats + 3) / 4 * 4; // sums are read four at a time
    }
    if constexpr (kIsCode<T>)
    {
        dim3 const grid(static_cast<unsigned>(call.rows), static_cast<unsigned>(call.kvHeads),
            static_cast<unsigned>(call.batch));
        SEMKV_LAUNCH(grid, dim3(64), 0, stream, (appendCodesKernel<T>), plan);
    }
    switch (call.headSize)
    {
#if defined(SEMKV_HEAD_SIZE) // a build narrowed to one head size, for reading resource reports quickly
    case SEMKV_HEAD_SIZE: return launchHeadSize<T, SEMKV_HEAD_SIZE>(plan, stream);
#else
    case 64: return launchHeadSize<T, 64>(plan, stream);
    case 80: return launchHeadSize<T, 80>(plan, stream);
    case 96: return launchHeadSize<T, 96>(plan, stream);
    case 128: return launchHeadSize<T, 128>(plan, stream);
    case 256: return launchHeadSize<T, 256>(plan, stream);
#endif
    default: return cudaErrorInvalidValue;
    }
}
} // namespace semkv::nexus
