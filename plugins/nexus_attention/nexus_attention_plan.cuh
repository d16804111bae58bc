// What the NexusAttention kernels agree on: register tiles, which slots a split has, the workspace, the append.
#pragma once

#include "codes.cuh"
#include "nexus_attention.h"

namespace semkv::nexus
{
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;

constexpr int kMostSplits = 128;

// Bounds the workspace: beyond 2048 blocks no device gains from another split.
constexpr int maxSplits(int blocksPerSplit)
{
    int const enough = ceilDivide(2048, blocksPerSplit);
    return enough < kMostSplits ? enough : kMostSplits;
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
    int32_t entries;   // most entries of a row: named and new ones, or all slots
    float* partials;   // sums, then (maximum, sum of weights), of every query row and split
    float* statistics; // (maximum, sum of weights) of every query row; null without mass
    float* products;   // factor * q.k of every query row and entry; null without mass
};

// What a kernel works through are a row's entries: the live slots in order, or, with slotIndex, the named slots and then
// the new ones.
__device__ __forceinline__ int oldEntries(Plan const& plan, int length)
{
    return plan.call.slotIndex != nullptr ? plan.call.indexWidth : length;
}

// In slotIndex: an old slot that is not there. What it makes of the logit cannot be missed.
constexpr int kImpossibleSlot = -2;

// The slot that an entry stands for; negative: none.
__device__ __forceinline__ int slotOfEntry(Plan const& plan, int64_t head, int length, int entry)
{
    if (plan.call.slotIndex == nullptr)
    {
        return entry;
    }
    if (entry >= plan.call.indexWidth)
    {
        return length + entry - plan.call.indexWidth;
    }
    int64_t const named = plan.call.slotIndex[head * plan.call.indexWidth + entry];
    return named < 0 ? -1 : named < length ? static_cast<int>(named) : kImpossibleSlot;
}

struct Range
{
    int begin;  // first entry of the split
    int end;    // one past its last entry
    int active; // splits that have entries; the others leave at once
};

// All entries that some row of the tile may see.
__device__ __forceinline__ Range visibleRange(Plan const& plan, int length, int rowTileIndex)
{
    NexusAttentionParams const& call = plan.call;
    int const first = rowTileIndex * plan.rowTile;
    int const last = min(first + plan.rowTile, plan.queries) - 1;
    bool const oneHead = first / call.rows == last / call.rows;
    int const oldest = oneHead ? first % call.rows : 0;
    int const newest = oneHead ? last % call.rows : call.rows - 1;
    int const old = oldEntries(plan, length);
    Range range;
    range.active = 1;
    range.end = call.causal != 0 ? old + newest + 1 : old + call.rows;
    range.begin = call.window > 0 && call.slotIndex == nullptr ? max(0, length + oldest - call.window + 1) : 0;
    return range;
}

// The entries that a split of a row tile works through.
__device__ __forceinline__ Range slotRange(Plan const& plan, int length, int rowTileIndex, int split)
{
    Range range = visibleRange(plan, length, rowTileIndex);
    int const tiles = ceilDivide(range.end - range.begin, plan.slotTile);
    int const perSplit = ceilDivide(tiles, plan.splits);
    range.active = ceilDivide(tiles, perSplit);
    range.begin += split * perSplit * plan.slotTile;
    range.end = min(range.end, range.begin + perSplit * plan.slotTile);
    return range;
}

// A logit times log2(e) of a row that sits at `position` (-1: no such row), with masks and bias.
__device__ __forceinline__ float masked(Plan const& plan, float x, int position, int slot, float bias)
{
    int const distance = position - slot;
    bool const seen = slot >= 0 && position >= 0 && (plan.call.causal == 0 || distance >= 0)
        && (plan.call.window <= 0 || distance < plan.call.window) && bias > minusInfinity();
    return seen ? x + bias : slot == kImpossibleSlot ? notANumber() : minusInfinity();
}

// The same from factor * q.k.
__device__ __forceinline__ float maskedLogit(Plan const& plan, float product, int position, int slot, float bias)
{
    return masked(plan, plan.cap > 0.0F ? plan.cap * tanhf(product) : product, position, slot, bias);
}

__device__ __forceinline__ float biasOfSlot(Plan const& plan, int64_t head, int length, int slot)
{
    return slot >= 0 && slot < length ? plan.call.slotBias[head * plan.call.capacity + slot] * kLog2E : 0.0F;
}

__device__ __forceinline__ bool lengthFits(Plan const& plan, int64_t length)
{
    return length >= 0 && length + plan.call.rows <= plan.call.capacity;
}

// The splits' results for one query row: the sums of all splits, then (maximum, sum of weights) of all splits.
__device__ __forceinline__ float* partialSums(Plan const& plan, int64_t row)
{
    return plan.partials + row * plan.splits * plan.call.headSize;
}

__device__ __forceinline__ float* partialScales(Plan const& plan, int64_t row)
{
    int64_t const rows = static_cast<int64_t>(plan.call.batch) * plan.call.kvHeads * plan.queries;
    return plan.partials + rows * plan.splits * plan.call.headSize + row * plan.splits * 2;
}

__device__ __forceinline__ void keepStatistics(Plan const& plan, int64_t row, float highest, float weight)
{
    if (plan.statistics != nullptr)
    {
        plan.statistics[2 * row] = highest;
        plan.statistics[2 * row + 1] = weight;
    }
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

__device__ __forceinline__ void writeNotANumber(Plan const& plan, int64_t head, int rowTileIndex)
{
    int const first = rowTileIndex * plan.rowTile * plan.call.headSize;
    int const last = min((rowTileIndex + 1) * plan.rowTile, plan.queries) * plan.call.headSize;
    int64_t const base = head * plan.queries * plan.call.headSize;
    for (int i = first + static_cast<int>(threadIdx.x); i < last; i += kThreads)
    {
        storeElement(plan.call.output, plan.call.element, base + i, notANumber());
    }
}

// What a thread block has to do. Grid: KV heads x row tiles, splits, batch.
struct Share
{
    int64_t head; // batch row * kvHeads + KV head
    int rowTileIndex;
    int split;
    int length;
    Range range;
};

// False where there is nothing to do: the split has no entries, or the length is impossible, which is answered with NaN.
// Otherwise the first split's blocks have appended the new rows, unless the cache holds codes. T: the cache's element type.
template <typename T, int kHeadSize, int kRows>
__device__ __forceinline__ bool takeShare(Plan const& plan, Share& share)
{
    NexusAttentionParams const& call = plan.call;
    int const rowTiles = ceilDivide(plan.queries, kRows);
    int const batch = static_cast<int>(blockIdx.z);
    share.rowTileIndex = static_cast<int>(blockIdx.x) % rowTiles;
    share.split = static_cast<int>(blockIdx.y);
    share.head = static_cast<int64_t>(batch) * call.kvHeads + static_cast<int>(blockIdx.x) / rowTiles;
    int64_t const given = call.length[batch];
    if (!lengthFits(plan, given))
    {
        if (share.split == 0)
        {
            writeNotANumber(plan, share.head, share.rowTileIndex);
        }
        return false;
    }
    share.length = static_cast<int>(given);
    share.range = slotRange(plan, share.length, share.rowTileIndex, share.split);
    if (share.split >= share.range.active)
    {
        return false;
    }
    if constexpr (!kIsCode<T>)
    {
        if (share.split == 0)
        {
            appendRows<T, kHeadSize>(plan, share.head, share.length, share.rowTileIndex, rowTiles);
        }
    }
    return true;
}
} // namespace semkv::nexus
