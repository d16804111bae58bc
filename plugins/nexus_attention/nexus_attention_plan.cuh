// What the NexusAttention kernels agree on: register tiles, which slots a split has, the workspace, the append.
#pragma once

#include "../common/device.cuh"
#include "nexus_attention.h"

namespace semkv::nexus
{
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;

// Bounds the workspace: beyond 2048 blocks no device gains from another split.
constexpr int maxSplits(int blocksPerSplit)
{
    int const enough = ceilDivide(2048, blocksPerSplit);
    return enough < 128 ? enough : 128;
}

// What the kernels need beyond the caller's parameters.
struct Plan
{
    NexusAttentionParams call;
    float factor;    // multiplies q.k: scale * log2(e), or scale / softcap
    float cap;       // softcap * log2(e), or 0
    int32_t group;   // query heads per KV head
    int32_t queries; // query rows per KV head: group * rows
    int32_t rowTile; // kRows of the kernel
    int32_t slotTile;
    int32_t splits;
};

// Thread blocks that registers leave room for on one multiprocessor. Given to the compiler, which otherwise aims at one
// more and spills for it, and used to fill whole waves.
__host__ __device__ constexpr int expectedBlocks(int rows)
{
    return rows >= 2 ? 2 : 3;
}

template <typename T, int kHeadSize, int kRows>
struct Shape
{
    static constexpr int kVector = Vector<T>::kSize;
    static constexpr int kPieces = kHeadSize / kVector;
    static constexpr int kLanes = kPieces >= 32 ? 32 : nextPowerOfTwo(kPieces);
    static constexpr int kPerLane = ceilDivide(kPieces, kLanes);
    static constexpr int kGroups = 32 / kLanes;
    // Registers: keys and values in flight, query and accumulator, logits.
    static constexpr int registers(int unroll)
    {
        return 8 * unroll * kPerLane + 2 * kRows * kVector * kPerLane + unroll * kRows;
    }
    static constexpr int kUnroll = kPerLane == 1 && registers(8) <= 168 ? 8 : registers(4) <= 200 ? 4 : 2;
    static constexpr int kReplicas = kLanes / kUnroll;
    static constexpr int kWarpSlots = kGroups * kUnroll;
    static constexpr int kSlotTile = kWarps * kWarpSlots;
    static constexpr int kWeightFloats = kWarps * 2 * kWarpSlots * kRows;
    static constexpr int kMergeFloats = kWarps * kRows * (kHeadSize + 2);
    static constexpr size_t kSharedBytes
        = sizeof(float) * static_cast<size_t>(kWeightFloats > kMergeFloats ? kWeightFloats : kMergeFloats);
    static_assert(kHeadSize % kVector == 0 && kReplicas >= 1);
};

struct Range
{
    int begin;  // first slot of the split
    int end;    // one past its last slot
    int active; // splits that have slots; the others leave at once
};

// The slots that a split of a row tile works through: only live ones, and only those some row of the tile can see.
__device__ __forceinline__ Range slotRange(Plan const& plan, int length, int rowTileIndex, int split)
{
    NexusAttentionParams const& call = plan.call;
    int const first = rowTileIndex * plan.rowTile;
    int const last = min(first + plan.rowTile, plan.queries) - 1;
    bool const oneHead = first / call.rows == last / call.rows;
    int const oldest = oneHead ? first % call.rows : 0;
    int const newest = oneHead ? last % call.rows : call.rows - 1;
    int const end = call.causal != 0 ? length + newest + 1 : length + call.rows;
    int const begin = call.window > 0 ? max(0, length + oldest - call.window + 1) : 0;
    int const tiles = ceilDivide(end - begin, plan.slotTile);
    int const perSplit = ceilDivide(tiles, plan.splits);
    Range range;
    range.active = ceilDivide(tiles, perSplit);
    range.begin = begin + split * perSplit * plan.slotTile;
    range.end = min(end, range.begin + perSplit * plan.slotTile);
    return range;
}

__device__ __forceinline__ bool lengthFits(Plan const& plan, int64_t length)
{
    return length >= 0 && length + plan.call.rows <= plan.call.capacity;
}

// Workspace of one query row: the sums of all splits, then (maximum, sum of weights) of all splits.
__device__ __forceinline__ float* partialSums(Plan const& plan, int64_t row)
{
    return plan.call.workspace + row * plan.splits * plan.call.headSize;
}

__device__ __forceinline__ float* partialScales(Plan const& plan, int64_t row)
{
    int64_t const rows = static_cast<int64_t>(plan.call.batch) * plan.call.kvHeads * plan.queries;
    return plan.call.workspace + rows * plan.splits * plan.call.headSize + row * plan.splits * 2;
}

template <typename T, int kHeadSize>
__device__ __forceinline__ void appendRows(Plan const& plan, int64_t head, int length, int rowTileIndex, int rowTiles)
{
    constexpr int kVector = Vector<T>::kSize;
    constexpr int kPieces = kHeadSize / kVector;
    NexusAttentionParams const& call = plan.call;
    for (int row = rowTileIndex; row < call.rows; row += rowTiles)
    {
        int64_t const from = (head * call.rows + row) * kHeadSize;
        int64_t const to = (head * call.capacity + length + row) * kHeadSize;
        for (int piece = static_cast<int>(threadIdx.x); piece < 2 * kPieces; piece += kThreads)
        {
            bool const isKey = piece < kPieces;
            int const offset = (isKey ? piece : piece - kPieces) * kVector;
            T const* source = static_cast<T const*>(isKey ? call.key : call.value) + from + offset;
            T* target = static_cast<T*>(isKey ? call.keyCache : call.valueCache) + to + offset;
            storeVector(target, loadVector(source));
        }
    }
}
} // namespace semkv::nexus
