// SemanticCluster, first half: the scratch memory, and which earlier slots each slot may join.
//
// Slots are compared inside the last 64 only (span <= 64), so what a slot needs to know is one 64-bit word: bit 0 says
// the slot is live, bit d that it may join slot j - d at this level. All levels are worked out at once; which one is used
// is decided on the device from the counts of seeds.
#pragma once

#include "../common/row_move.cuh"
#include "semantic_cluster.h"

namespace semkv::cluster
{
constexpr int kThreads = 256;
constexpr int kWord = 64;
constexpr int kDepth = 32; // columns of the keys in shared memory at a time

struct Scratch
{
    float* inverseNorm;  // [B,H,C]
    uint64_t* neighbour; // [B,G,L,64,W]: slot j at [j % 64, j / 64], so that threads with one word each read in a line
    uint64_t* seeds;     // [B,G,L,W]
    int32_t* seedCount;  // [B,G,L]
    uint8_t* distance;   // [B,G,C] slots back to the seed; 0: a seed; 255: dead
    int32_t* source;     // [B,G,C]
    uint64_t* members;   // [B,G,C]
    int32_t* count;      // [B,G]
    float* weight;       // [B,H,C]
    float* bias;         // [B,H,C]
    int32_t words;       // W
};

inline size_t carve(SemanticClusterParams const& params, Scratch& scratch)
{
    size_t const groups = static_cast<size_t>(params.batch) * static_cast<size_t>(params.groups);
    size_t const levels = groups * static_cast<size_t>(params.levels);
    size_t const slots
        = static_cast<size_t>(params.batch) * static_cast<size_t>(params.heads) * static_cast<size_t>(params.capacity);
    size_t const groupSlots = groups * static_cast<size_t>(params.capacity);
    scratch.words = ceilDivide(params.capacity, kWord);
    size_t const words = static_cast<size_t>(scratch.words);
    Carver carver(params.workspace);
    scratch.inverseNorm = carver.take<float>(slots);
    scratch.neighbour = carver.take<uint64_t>(levels * words * kWord);
    scratch.seeds = carver.take<uint64_t>(levels * words);
    scratch.seedCount = carver.take<int32_t>(levels);
    scratch.distance = carver.take<uint8_t>(groupSlots);
    scratch.source = carver.take<int32_t>(groupSlots);
    scratch.members = carver.take<uint64_t>(groupSlots);
    scratch.count = carver.take<int32_t>(groups);
    scratch.weight = carver.take<float>(slots);
    scratch.bias = carver.take<float>(slots);
    return carver.used();
}

__device__ __forceinline__ bool lengthValid(SemanticClusterParams const& params, int64_t batch)
{
    return params.length[batch] >= 0 && params.length[batch] <= params.capacity;
}

// Slots to look at: 0 where the batch row stays as it is.
__device__ __forceinline__ int slotsInUse(SemanticClusterParams const& params, int64_t batch)
{
    int64_t const length = params.length[batch];
    return lengthValid(params, batch) && length > params.target[batch] ? static_cast<int>(length) : 0;
}

// One warp a slot. Grid: slots, heads, batch.
template <typename T>
__global__ void __launch_bounds__(kThreads) normKernel(SemanticClusterParams const params, Scratch const scratch)
{
    int const slot = static_cast<int>(blockIdx.x) * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
    if (slot >= slotsInUse(params, blockIdx.z))
    {
        return;
    }
    int64_t const row
        = (static_cast<int64_t>(blockIdx.z) * params.heads + blockIdx.y) * params.capacity + slot;
    T const* const key = static_cast<T const*>(params.keyCache) + row * params.headSize;
    float sum = 0.0F;
    for (int d = static_cast<int>(threadIdx.x) % 32 * Vector<T>::kSize; d < params.headSize;
         d += 32 * Vector<T>::kSize)
    {
        Vector<T> const v = loadVector(key + d);
        SEMKV_UNROLL
        for (int i = 0; i < Vector<T>::kSize; ++i)
        {
            sum += elementOf(v, i) * elementOf(v, i);
        }
    }
    SEMKV_UNROLL
    for (int offset = 16; offset > 0; offset /= 2)
    {
        sum += __shfl_xor_sync(kFullWarp, sum, offset);
    }
    if (threadIdx.x % 32 == 0)
    {
        scratch.inverseNorm[row] = 1.0F / fmaxf(sqrtf(sum), 1e-12F);
    }
}

constexpr int kTileRows = 2 * kWord;
constexpr int kTilePitch = kDepth + 1;
constexpr size_t kNeighbourShared = sizeof(float) * kWord * kTileRows + kTileRows;
static_assert(kTileRows * kTilePitch <= kWord * kTileRows);

// Adds the cosines of one head. 256 threads: thread (y, x) has slots y + 16a of the word and x + 16c of the 128 tried.
template <typename T>
__device__ __forceinline__ void addCosines(
    SemanticClusterParams const& params, Scratch const& scratch, int64_t head, int firstSlot, int used, float* tile,
    float (&sum)[4][8])
{
    int const thread = static_cast<int>(threadIdx.x);
    T const* const keys = static_cast<T const*>(params.keyCache) + head * params.capacity * params.headSize;
    float const* const inverseNorm = scratch.inverseNorm + head * params.capacity;
    constexpr int kPieces = kDepth / Vector<T>::kSize;
    for (int depth = 0; depth < params.headSize; depth += kDepth)
    {
        __syncthreads();
        for (int i = thread; i < kTileRows * kPieces; i += kThreads)
        {
            int const row = i / kPieces;
            int const column = i % kPieces * Vector<T>::kSize;
            int const slot = firstSlot + row;
            bool const inside = slot >= 0 && slot < used && depth + column < params.headSize;
            float const norm = inside ? inverseNorm[slot] : 0.0F;
            Vector<T> const v = inside
                ? loadVector(keys + static_cast<int64_t>(slot) * params.headSize + depth + column)
                : zeroVector<T>();
            SEMKV_UNROLL
            for (int e = 0; e < Vector<T>::kSize; ++e)
            {
                tile[row * kTilePitch + column + e] = elementOf(v, e) * norm;
            }
        }
        __syncthreads();
        for (int d = 0; d < kDepth; ++d)
        {
            float own[4];
            float tried[8];
            SEMKV_UNROLL
            for (int a = 0; a < 4; ++a)
            {
                own[a] = tile[(kWord + thread / 16 + 16 * a) * kTilePitch + d];
            }
            SEMKV_UNROLL
            for (int c = 0; c < 8; ++c)
            {
                tried[c] = tile[(thread % 16 + 16 * c) * kTilePitch + d];
            }
            SEMKV_UNROLL
            for (int a = 0; a < 4; ++a)
            {
                SEMKV_UNROLL
                for (int c = 0; c < 8; ++c)
                {
                    sum[a][c] += own[a] * tried[c];
                }
            }
        }
    }
}

// The neighbour words of 64 slots at all levels. Grid: words, groups, batch.
template <typename T>
__global__ void __launch_bounds__(kThreads) neighbourKernel(SemanticClusterParams const params, Scratch const scratch)
{
    SEMKV_SHARED_BYTES(bytes);
    float* const shared = reinterpret_cast<float*>(bytes);
    unsigned char* const live = bytes + sizeof(float) * kWord * kTileRows;
    int64_t const batch = blockIdx.z;
    int const word = static_cast<int>(blockIdx.x);
    int const used = slotsInUse(params, batch);
    if (word * kWord >= used)
    {
        return;
    }
    int const thread = static_cast<int>(threadIdx.x);
    int const firstSlot = (word - 1) * kWord;
    int const groupHead = params.groups == 1 ? 0 : static_cast<int>(blockIdx.y);
    int const heads = params.groups == 1 ? params.heads : 1;
    int64_t const firstHead = batch * params.heads + groupHead;

    if (thread < kTileRows)
    {
        int const slot = firstSlot + thread;
        live[thread] = slot >= 0 && slot < used
                && params.slotBias[firstHead * params.capacity + slot] > minusInfinity()
            ? 1
            : 0;
    }
    float sum[4][8] = {};
    for (int h = 0; h < heads; ++h)
    {
        addCosines<T>(params, scratch, firstHead + h, firstSlot, used, shared, sum);
    }
    __syncthreads();
    SEMKV_UNROLL
    for (int a = 0; a < 4; ++a)
    {
        SEMKV_UNROLL
        for (int c = 0; c < 8; ++c)
        {
            shared[(thread / 16 + 16 * a) * kTileRows + thread % 16 + 16 * c]
                = sum[a][c] / static_cast<float>(heads);
        }
    }
    __syncthreads();

    int64_t const group = batch * params.groups + blockIdx.y;
    for (int i = thread; i < kWord * params.levels; i += kThreads)
    {
        int const own = i % kWord;
        int const level = i / kWord;
        int const slot = word * kWord + own;
        int64_t const* const chunk = params.chunkId + (group * params.levels + level) * params.capacity;
        // Rounding can lift the cosine of equal keys above 1.
        float const given = params.thresholds[level];
        float const threshold = given < 1.0F ? given : -minusInfinity();
        uint64_t bits = live[kWord + own];
        if (bits != 0 && chunk[slot] >= 0)
        {
            int const farthest = min(params.span - 1, slot);
            for (int d = 1; d <= farthest; ++d)
            {
                int const tried = kWord + own - d;
                bool const joins = live[tried] != 0 && chunk[slot - d] == chunk[slot]
                    && shared[own * kTileRows + tried] > threshold;
                bits |= static_cast<uint64_t>(joins) << d;
            }
        }
        scratch.neighbour[((group * params.levels + level) * kWord + own) * scratch.words + word] = bits;
    }
}
} // namespace semkv::cluster
