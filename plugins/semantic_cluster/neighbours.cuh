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

// A word's 64 slots are tried with 1 to 63 slots before them. In blocks of 8 by 8, block I of the word meets blocks I to
// I + 8 of the 128 slots that begin one word earlier; of the first it needs the pairs above the diagonal (no more than
// 63 back), of the last those below it (before itself). Together these two are one block, so 8 times 8 threads with 64
// sums each compute the pairs of the band and nothing else but the diagonal. Twice as many threads share the columns.
constexpr int kTileRows = 2 * kWord;
constexpr int kPairBlock = 8;
constexpr int kBandThreads = 128;
constexpr int kPiecesAtOnce = 4; // loads of 16 bytes that a thread has in flight
// Columns of a tile lie one behind the other: of every 8 rows the first 4, then the second 4 of all, so that 8 threads
// read 128 bytes in a line. The gap, and the shift of 4 floats every 8 columns, keep the transposing stores apart.
constexpr int kHalfPitch = 80;
constexpr int kTilePitch = 156;
constexpr size_t kNeighbourShared = sizeof(float) * kDepth * kTilePitch + kTileRows;
static_assert(kDepth * kTilePitch >= kWord * (kWord + 1) && kHalfPitch + kWord + 4 * (kDepth / 8 - 1) <= kTilePitch);

// Where the tile has rows 8 * block + 4 * half and the three behind it at one column.
__device__ __forceinline__ int tileAt(int column, int block, int half)
{
    return column * kTilePitch + column / 8 * 4 + half * kHalfPitch + block * 4;
}

// Where the cosine of slot `own` of the word with the slot `back` before it goes: no more than two threads of a warp
// meet in a bank, neither where one pair of each thread's block is written nor where one `back` of all slots is read.
constexpr int kCosinePitch = kWord + 1;
__device__ __forceinline__ int cosineAt(int own, int back)
{
    return back * kCosinePitch + own % kPairBlock * kPairBlock + own / kPairBlock;
}

// Puts `kDepth` columns of 128 keys, normalised, into the tile.
template <typename T>
__device__ __forceinline__ void fillTile(
    SemanticClusterParams const& params, Scratch const& scratch, int64_t head, int firstSlot, int used, int depth,
    float* tile)
{
    constexpr int kPieces = kDepth / Vector<T>::kSize;
    constexpr int kRowsPerPass = kBandThreads / kPieces;
    static_assert(kRowsPerPass % 8 == 0 && 8 % Vector<T>::kSize == 0 && kTileRows % (kRowsPerPass * kPiecesAtOnce) == 0);
    float const* const inverseNorm = scratch.inverseNorm + head * params.capacity;
    int const column = static_cast<int>(threadIdx.x) % kPieces * Vector<T>::kSize;
    T const* const keys
        = static_cast<T const*>(params.keyCache) + head * params.capacity * params.headSize + depth + column;
    int const usedHere = depth + column < params.headSize ? used : 0;
    SEMKV_NO_UNROLL
    for (int pass = 0; pass < kTileRows; pass += kRowsPerPass * kPiecesAtOnce)
    {
        int const firstRow = pass + static_cast<int>(threadIdx.x) / kPieces;
        float* const to = tile + tileAt(column, firstRow / 8, firstRow / 4 % 2) + firstRow % 4;
        Vector<T> pieces[kPiecesAtOnce];
        float norms[kPiecesAtOnce];
        SEMKV_UNROLL
        for (int i = 0; i < kPiecesAtOnce; ++i)
        {
            int const slot = firstSlot + firstRow + i * kRowsPerPass;
            bool const inside = slot >= 0 && slot < usedHere;
            norms[i] = inside ? inverseNorm[slot] : 0.0F;
            pieces[i] = inside ? loadVector(keys + static_cast<int64_t>(slot) * params.headSize) : zeroVector<T>();
        }
        SEMKV_UNROLL
        for (int i = 0; i < kPiecesAtOnce; ++i)
        {
            SEMKV_UNROLL
            for (int e = 0; e < Vector<T>::kSize; ++e)
            {
                // Eight rows on is four floats on.
                to[e * kTilePitch + i * kRowsPerPass / 2] = elementOf(pieces[i], e) * norms[i];
            }
        }
    }
}

__device__ __forceinline__ void loadFour(float const* from, float* to)
{
    float4 const four = *reinterpret_cast<float4 const*>(from);
    to[0] = four.x;
    to[1] = four.y;
    to[2] = four.z;
    to[3] = four.w;
}

// Adds the cosines of one head: thread (I, x) has block I of the word with block I + x, and I + 8 for x = 0.
template <typename T>
__device__ __forceinline__ void addCosines(
    SemanticClusterParams const& params, Scratch const& scratch, int64_t head, int firstSlot, int used, float* tile,
    float (&sum)[kPairBlock][kPairBlock])
{
    int const pair = static_cast<int>(threadIdx.x) % (kPairBlock * kPairBlock);
    int const part = static_cast<int>(threadIdx.x) / (kPairBlock * kPairBlock);
    int const own = pair / kPairBlock;
    int const apart = pair % kPairBlock;
    constexpr int kColumns = kDepth / (kBandThreads / (kPairBlock * kPairBlock));
    for (int depth = 0; depth < params.headSize; depth += kDepth)
    {
        __syncthreads();
        fillTile<T>(params, scratch, head, firstSlot, used, depth, tile);
        __syncthreads();
        SEMKV_NO_UNROLL
        for (int d = part * kColumns; d < (part + 1) * kColumns; ++d)
        {
            float mine[kPairBlock];
            loadFour(tile + tileAt(d, kPairBlock + own, 0), mine);
            loadFour(tile + tileAt(d, kPairBlock + own, 1), mine + 4);
            SEMKV_UNROLL
            for (int half = 0; half < 2; ++half)
            {
                float above[4];
                float below[4];
                loadFour(tile + tileAt(d, own + apart, half), above);
                loadFour(tile + tileAt(d, apart == 0 ? own + kPairBlock : own + apart, half), below);
                SEMKV_UNROLL
                for (int i = 0; i < kPairBlock; ++i)
                {
                    SEMKV_UNROLL
                    for (int j = 0; j < 4; ++j)
                    {
                        sum[i][4 * half + j] += mine[i] * (4 * half + j > i ? above[j] : below[j]);
                    }
                }
            }
        }
    }
}

// Adds up the parts that the threads have of the pairs' sums, and leaves the mean over the heads in shared memory.
__device__ __forceinline__ void gatherCosines(
    float const (&sum)[kPairBlock][kPairBlock], int heads, float* cosine)
{
    int const pair = static_cast<int>(threadIdx.x) % (kPairBlock * kPairBlock);
    int const apart = pair % kPairBlock;
    // Pair (i, j) lies 64 - 8 * apart + i - j back, or i - j for those of block I + 8.
    float* const far = cosine + cosineAt(pair / kPairBlock * kPairBlock, kWord - kPairBlock * apart);
    float* const near = apart > 0 ? far : cosine + cosineAt(pair / kPairBlock * kPairBlock, 0);
    for (int part = kBandThreads / (kPairBlock * kPairBlock) - 1; part >= 0; --part)
    {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) / (kPairBlock * kPairBlock) != part)
        {
            continue;
        }
        SEMKV_UNROLL
        for (int i = 0; i < kPairBlock; ++i)
        {
            SEMKV_UNROLL
            for (int j = 0; j < kPairBlock; ++j)
            {
                if (apart == 0 && i == j)
                {
                    continue;
                }
                float* const to = (j > i ? far : near) + (i - j) * kCosinePitch + i * kPairBlock;
                *to = part == kBandThreads / (kPairBlock * kPairBlock) - 1 ? sum[i][j] : *to + sum[i][j];
            }
        }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kWord * kCosinePitch; i += kBandThreads)
    {
        cosine[i] /= static_cast<float>(heads);
    }
    __syncthreads();
}

// The neighbour words of 64 slots at all levels. Grid: words, groups, batch.
template <typename T>
__global__ void __launch_bounds__(kBandThreads, 4)
    neighbourKernel(SemanticClusterParams const params, Scratch const scratch)
{
    SEMKV_SHARED_BYTES(bytes);
    float* const shared = reinterpret_cast<float*>(bytes);
    unsigned char* const live = bytes + sizeof(float) * kDepth * kTilePitch;
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

    for (int row = thread; row < kTileRows; row += kBandThreads)
    {
        int const slot = firstSlot + row;
        live[row] = slot >= 0 && slot < used
                && params.slotBias[firstHead * params.capacity + slot] > minusInfinity()
            ? 1
            : 0;
    }
    float sum[kPairBlock][kPairBlock] = {};
    SEMKV_NO_UNROLL
    for (int h = 0; h < heads; ++h)
    {
        addCosines<T>(params, scratch, firstHead + h, firstSlot, used, shared, sum);
    }
    gatherCosines(sum, heads, shared);

    int64_t const group = batch * params.groups + blockIdx.y;
    for (int i = thread; i < kWord * params.levels; i += kBandThreads)
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
                bool const joins = live[kWord + own - d] != 0 && shared[cosineAt(own, d)] > threshold
                    && chunk[slot - d] == chunk[slot];
                bits |= static_cast<uint64_t>(joins) << d;
            }
        }
        scratch.neighbour[((group * params.levels + level) * kWord + own) * scratch.words + word] = bits;
    }
}
} // namespace semkv::cluster
