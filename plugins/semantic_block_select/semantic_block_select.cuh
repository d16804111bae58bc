// SemanticBlockSelect: the scores of all blocks, then the choice among them.
#pragma once

#include "../common/scratch.cuh"
#include "semantic_block_select.h"

namespace semkv::block_select
{
constexpr int kScoreThreads = 256;
constexpr int kBlocksPerWarp = 4;
constexpr int kBlocksPerGroup = kScoreThreads / 32 * kBlocksPerWarp;
constexpr int kSelectThreads = 512;
constexpr int kDigits = 256;
constexpr size_t kSelectShared = sizeof(int) * (kDigits + 2 + kSelectThreads / 32 + 1 + 2 * kSelectThreads);

// Above the key of infinity: NaN, the pinned blocks by number, and of these block 0.
constexpr uint32_t kNotANumberKey = 0xFF800001U;
constexpr uint32_t kPinnedKeys = 0xFF800002U;
constexpr uint32_t kFirstPinnedKey = 0xFFFFFFFFU;
static_assert(kSemanticBlockSelectMaxBlocks <= kFirstPinnedKey - kPinnedKeys);

struct Scratch
{
    uint32_t* key;   // [B,Hkv,N] orders blocks as the choice does: larger first, equal ones by number
    int32_t* length; // [B,N] slots; 0: no candidate
};

inline size_t carve(SemanticBlockSelectParams const& params, Scratch& scratch)
{
    size_t const blocks = static_cast<size_t>(params.batch) * static_cast<size_t>(params.blocks);
    Carver carver(params.workspace);
    scratch.key = carver.take<uint32_t>(blocks * static_cast<size_t>(params.kvHeads));
    scratch.length = carver.take<int32_t>(blocks);
    return carver.used();
}

__device__ __forceinline__ bool countValid(SemanticBlockSelectParams const& params, int64_t batch)
{
    return params.blockCount[batch] >= 0 && params.blockCount[batch] <= params.blocks;
}

__device__ __forceinline__ int blocksInUse(SemanticBlockSelectParams const& params, int64_t batch)
{
    return countValid(params, batch) ? static_cast<int>(params.blockCount[batch]) : 0;
}

// A number that orders as the score does.
__device__ __forceinline__ uint32_t orderedKey(float score)
{
    if (score != score)
    {
        return kNotANumberKey;
    }
    // Sums that start at +0 are never -0, so equal scores have equal bits.
    uint32_t const bits = __float_as_uint(score);
    return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

__device__ __forceinline__ uint32_t pinnedKey(int block)
{
    return block == 0 ? kFirstPinnedKey : kPinnedKeys + static_cast<uint32_t>(block);
}

// What the block's vectors are multiplied with, [R,D] floats: the query, or its negative and its positive part, summed
// over rows firstRow .. lastRow - 1 of the KV head's P = Hq/Hkv * S.
template <typename T>
__device__ __forceinline__ void prepareQuery(
    SemanticBlockSelectParams const& params, int64_t head, int firstRow, int lastRow, float* weight)
{
    constexpr int kSize = Vector<T>::kSize;
    int64_t const rowsPerHead = params.queryHeads / params.kvHeads * params.rows;
    T const* const query = static_cast<T const*>(params.query) + head * rowsPerHead * params.headSize;
    for (int column = static_cast<int>(threadIdx.x) * kSize; column < params.headSize; column += kScoreThreads * kSize)
    {
        float first[kSize] = {};
        float second[kSize] = {};
        SEMKV_NO_UNROLL
        for (int row = firstRow; row < lastRow; ++row)
        {
            Vector<T> const q = loadVector(query + static_cast<int64_t>(row) * params.headSize + column);
            SEMKV_UNROLL
            for (int e = 0; e < kSize; ++e)
            {
                float const v = elementOf(q, e);
                first[e] += params.vectors == 2 ? fminf(v, 0.0F) : v;
                second[e] += fmaxf(v, 0.0F);
            }
        }
        SEMKV_UNROLL
        for (int e = 0; e < kSize; ++e)
        {
            weight[column + e] = first[e];
            if (params.vectors == 2)
            {
                weight[params.headSize + column + e] = second[e];
            }
        }
    }
}

// Not unrolled, here and in prepareQuery: sm_80 and sm_90 spill otherwise.
//
// Scores of the four blocks from `first` on, with the weights in shared memory. Blocks past the last one in use give the
// last one's again.
template <typename T>
__device__ __forceinline__ void scoreBlocks(SemanticBlockSelectParams const& params, int64_t head, int first, int inUse,
    float const* weight, float (&score)[kBlocksPerWarp])
{
    constexpr int kSize = Vector<T>::kSize;
    int const length = params.vectors * params.headSize;
    T const* const vectors = static_cast<T const*>(params.representatives) + head * params.blocks * length;
    SEMKV_UNROLL
    for (int i = 0; i < kBlocksPerWarp; ++i)
    {
        score[i] = 0.0F;
    }
    SEMKV_NO_UNROLL
    for (int at = static_cast<int>(threadIdx.x) % 32 * kSize; at < length; at += 32 * kSize)
    {
        Vector<T> v[kBlocksPerWarp];
        SEMKV_UNROLL
        for (int i = 0; i < kBlocksPerWarp; ++i)
        {
            v[i] = loadVector(vectors + static_cast<int64_t>(min(first + i, inUse - 1)) * length + at);
        }
        SEMKV_UNROLL
        for (int e = 0; e < kSize; ++e)
        {
            float const w = weight[at + e];
            SEMKV_UNROLL
            for (int i = 0; i < kBlocksPerWarp; ++i)
            {
                score[i] += w * elementOf(v[i], e);
            }
        }
    }
    SEMKV_UNROLL
    for (int i = 0; i < kBlocksPerWarp; ++i)
    {
        SEMKV_UNROLL
        for (int offset = 16; offset > 0; offset /= 2)
        {
            score[i] += __shfl_xor_sync(kFullWarp, score[i], offset);
        }
    }
}

// Slots of each of the four blocks from `first` on.
__device__ __forceinline__ void writeLengths(
    SemanticBlockSelectParams const& params, Scratch const& scratch, int64_t batch, int first, int inUse)
{
    int const lane = static_cast<int>(threadIdx.x) % 32;
    for (int block = first; block < min(first + kBlocksPerWarp, params.blocks); ++block)
    {
        int64_t const entry = batch * params.blocks + block;
        int length = 0;
        for (int base = 0; block < inUse && base < params.maxBlockLength; base += 32)
        {
            int const i = base + lane;
            bool const isSlot = i < params.maxBlockLength && params.blockSlots[entry * params.maxBlockLength + i] >= 0;
            length += __popcll(__ballot_sync(kFullWarp, isSlot ? 1 : 0));
        }
        if (lane == 0)
        {
            scratch.length[entry] = length;
        }
    }
}

// Lengths and keys of 32 blocks, four a warp. Grid: groups of blocks, heads, batch.
template <typename T>
__global__ void __launch_bounds__(kScoreThreads)
    blockScoreKernel(SemanticBlockSelectParams const params, Scratch const scratch)
{
    SEMKV_SHARED_BYTES(bytes);
    float* const weight = reinterpret_cast<float*>(bytes);
    int64_t const batch = blockIdx.z;
    int64_t const head = batch * params.kvHeads + blockIdx.y;
    int const inUse = blocksInUse(params, batch);
    int const groupFirst = static_cast<int>(blockIdx.x) * kBlocksPerGroup;
    int const first = groupFirst + static_cast<int>(threadIdx.x) / 32 * kBlocksPerWarp;
    if (blockIdx.y == 0)
    {
        writeLengths(params, scratch, batch, first, inUse);
    }
    if (groupFirst >= inUse)
    {
        return;
    }
    int const rows = params.queryHeads / params.kvHeads * params.rows;
    int const rowsAtOnce = params.reduceMax != 0 ? 1 : rows;
    float best[kBlocksPerWarp] = {};
    for (int row = 0; row < rows; row += rowsAtOnce)
    {
        __syncthreads();
        prepareQuery<T>(params, head, row, row + rowsAtOnce, weight);
        __syncthreads();
        float score[kBlocksPerWarp];
        scoreBlocks<T>(params, head, first, inUse, weight, score);
        SEMKV_UNROLL
        for (int i = 0; i < kBlocksPerWarp; ++i)
        {
            // Keeps a NaN.
            bool const keep = row > 0 && (best[i] != best[i] || score[i] <= best[i]);
            best[i] = keep ? best[i] : score[i];
        }
    }
    SEMKV_UNROLL
    for (int i = 0; i < kBlocksPerWarp; ++i)
    {
        if (threadIdx.x % 32 == 0 && first + i < inUse)
        {
            bool const pinned = params.pinned[batch * params.blocks + first + i] != 0;
            scratch.key[head * params.blocks + first + i] = pinned ? pinnedKey(first + i) : orderedKey(best[i]);
        }
    }
}

// The key of the block that is cut, found digit by digit: blocks with larger keys fit, together with those of this very
// key they do not. `room` becomes what is left for the latter. False when all blocks fit.
__device__ __forceinline__ bool findCut(uint32_t const* key, int32_t const* length, int inUse, int* histogram,
    int* chosen, int* scan, uint32_t& cut, int& room)
{
    int const thread = static_cast<int>(threadIdx.x);
    cut = 0;
    uint32_t known = 0;
    for (int shift = 24; shift >= 0; shift -= 8)
    {
        if (thread < kDigits)
        {
            histogram[thread] = 0;
        }
        __syncthreads();
        for (int block = thread; block < inUse; block += kSelectThreads)
        {
            if (length[block] > 0 && (key[block] & known) == cut)
            {
                atomicAdd(&histogram[key[block] >> shift & (kDigits - 1)], length[block]);
            }
        }
        __syncthreads();
        int const digit = kDigits - 1 - thread;
        int const own = digit >= 0 ? histogram[digit] : 0;
        int total = 0;
        int const above = blockScan<kSelectThreads>(own, scan, total);
        if (total <= room)
        {
            return false;
        }
        if (above <= room && room < above + own)
        {
            chosen[0] = digit;
            chosen[1] = above;
        }
        __syncthreads();
        cut |= static_cast<uint32_t>(chosen[0]) << shift;
        known |= static_cast<uint32_t>(kDigits - 1) << shift;
        room -= chosen[1];
        __syncthreads();
    }
    return true;
}

// Grid: heads, batch.
__global__ void __launch_bounds__(kSelectThreads)
    blockSelectKernel(SemanticBlockSelectParams const params, Scratch const scratch)
{
    SEMKV_SHARED_BYTES(bytes);
    int* const histogram = reinterpret_cast<int*>(bytes);
    int* const chosen = histogram + kDigits;
    int* const scan = chosen + 2;
    int* const tileStart = scan + kSelectThreads / 32 + 1;
    int* const tileTaken = tileStart + kSelectThreads;
    int const thread = static_cast<int>(threadIdx.x);
    int64_t const batch = blockIdx.y;
    int64_t const head = batch * params.kvHeads + blockIdx.x;
    int64_t* const out = params.slotIndex + head * params.width;
    int const inUse = blocksInUse(params, batch);
    uint32_t const* const key = scratch.key + head * params.blocks;
    int32_t const* const length = scratch.length + batch * params.blocks;
    int64_t const* const slots = params.blockSlots + batch * params.blocks * params.maxBlockLength;

    uint32_t cut = 0;
    int room = params.width;
    bool const someCut = findCut(key, length, inUse, histogram, chosen, scan, cut, room);
    int written = 0;
    int tiedBefore = 0;
    for (int tile = 0; tile < inUse; tile += kSelectThreads)
    {
        int const block = tile + thread;
        int const own = block < inUse ? length[block] : 0;
        uint32_t const ownKey = own > 0 ? key[block] : 0;
        bool const tied = someCut && own > 0 && ownKey == cut;
        int total = 0;
        int const tiedHere = blockScan<kSelectThreads>(tied ? own : 0, scan, total);
        int const roomHere = min(max(room - tiedBefore - tiedHere, 0), own);
        tiedBefore += total;
        int const taken = !someCut || ownKey > cut ? own : tied ? roomHere : 0;
        tileStart[thread] = written + blockScan<kSelectThreads>(taken, scan, total);
        tileTaken[thread] = taken;
        written += total;
        __syncthreads();
        for (int i = thread / 32; i < min(kSelectThreads, inUse - tile); i += kSelectThreads / 32)
        {
            for (int s = thread % 32; s < tileTaken[i]; s += 32)
            {
                out[tileStart[i] + s] = slots[static_cast<int64_t>(tile + i) * params.maxBlockLength + s];
            }
        }
        __syncthreads();
    }
    int64_t const filling = countValid(params, batch) ? -1 : kNoSuchSlot;
    for (int i = written + thread; i < params.width; i += kSelectThreads)
    {
        out[i] = filling;
    }
}
} // namespace semkv::block_select
