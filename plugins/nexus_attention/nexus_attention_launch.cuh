// Host side of the NexusAttention kernels for one element type of the cache; one .cu file instantiates it for each.
#pragma once

#include "nexus_attention.cuh"

#include <cmath>

namespace semkv::nexus
{
// Fewest splits that come within a tenth of the best filling of whole waves.
inline int chooseSplits(int blocksPerSplit, int mostSplits, int blocksPerMultiprocessor, int waves)
{
    int device = 0;
    int multiprocessors = 0;
    if (cudaGetDevice(&device) != cudaSuccess
        || cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    {
        return 1;
    }
    int const slots = multiprocessors * blocksPerMultiprocessor;
    int best = 1;
    float bestFilling = 0.0F;
    for (int splits = 1; splits <= mostSplits && (splits == 1 || splits * blocksPerSplit <= slots * waves); ++splits)
    {
        int const blocks = splits * blocksPerSplit;
        float const filling = static_cast<float>(blocks) / static_cast<float>(ceilDivide(blocks, slots) * slots);
        if (filling > bestFilling * 1.1F)
        {
            best = splits;
            bestFilling = filling;
        }
    }
    return best;
}

// nexus_attention_mass.cu
cudaError_t launchMass(Plan const& plan, cudaStream_t stream);

template <typename T, int kHeadSize, int kRows>
cudaError_t launchRows(Plan plan, cudaStream_t stream)
{
    using S = Shape<T, kHeadSize, kRows>;
    NexusAttentionParams const& call = plan.call;
    plan.rowTile = kRows;
    plan.slotTile = S::kSlotTile;
    int const rowTiles = ceilDivide(plan.queries, kRows);
    int const blocksPerSplit = call.batch * call.kvHeads * rowTiles;
    int const mostSplits = min(maxSplits(blocksPerSplit), ceilDivide(plan.entries, S::kSlotTile));
    plan.splits = chooseSplits(blocksPerSplit, mostSplits, expectedBlocks(kRows), call.maxWaves > 0 ? call.maxWaves : 2);

    dim3 const grid(static_cast<unsigned>(plan.splits), static_cast<unsigned>(call.kvHeads * rowTiles),
        static_cast<unsigned>(call.batch));
    SEMKV_LAUNCH(grid, dim3(kThreads), S::kSharedBytes, stream, (decodeKernel<T, kHeadSize, kRows>), plan);
    if (plan.splits > 1)
    {
        dim3 const mergeGrid(static_cast<unsigned>(plan.queries), static_cast<unsigned>(call.kvHeads),
            static_cast<unsigned>(call.batch));
        SEMKV_LAUNCH(mergeGrid, dim3(kThreads), 0, stream, (mergeKernel<T>), plan);
    }
    return call.mass != nullptr ? launchMass(plan, stream) : cudaGetLastError();
}

template <typename T, int kHeadSize>
cudaError_t launchHeadSize(Plan const& plan, cudaStream_t stream)
{
    if (plan.queries == 1)
    {
        return launchRows<T, kHeadSize, 1>(plan, stream);
    }
    if (plan.queries == 2)
    {
        return launchRows<T, kHeadSize, 2>(plan, stream);
    }
    // Sixteen elements a lane instead of eight or four leave no registers for eight rows.
    if constexpr (kIsCode<T>)
    {
        return launchRows<T, kHeadSize, 4>(plan, stream);
    }
    else
    {
        return plan.queries <= 4 ? launchRows<T, kHeadSize, 4>(plan, stream)
                                 : launchRows<T, kHeadSize, 8>(plan, stream);
    }
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
        plan.partials = plan.products + queryRows * plan.entries;
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
