// SemanticCluster, second half: greedy seeds, places and weights of the clusters. The rows are moved by row_move.cuh.
#pragma once

#include "neighbours.cuh"

namespace semkv::cluster
{
// Bit d - 1: slot 64 * word + position - d is a seed.
__device__ __forceinline__ uint64_t seedsBefore(uint64_t previous, uint64_t own, int position)
{
    uint64_t const joined = position == 0 ? previous : own << (kWord - position) | previous >> position;
    return __brevll(joined);
}

// Seeds of one word's 64 slots, given those of the word before.
__device__ __forceinline__ uint64_t scanWord(uint64_t const* neighbour, int words, uint64_t previous)
{
    uint64_t history = __brevll(previous);
    uint64_t seeds = 0;
    for (int k = 0; k < kWord; ++k)
    {
        uint64_t const bits = neighbour[static_cast<int64_t>(k) * words];
        uint64_t const seed = (bits & 1U) != 0 && (bits >> 1 & history) == 0 ? 1 : 0;
        history = history << 1 | seed;
        seeds |= seed << k;
    }
    return seeds;
}

__host__ __device__ inline size_t seedShared(int words)
{
    return static_cast<size_t>(words) * 2 * (sizeof(uint64_t) + 1) + sizeof(int);
}

// Greedy seeds. The only state that passes from one word to the next is the seeds of 64 slots, so all words are scanned
// at once from a guess and again where the word before has changed; the fixed point is the sequential answer, because
// word w is right after w + 1 rounds at the latest. Chunks end, so two to four rounds are usual. Grid: levels, groups,
// batch.
__global__ void __launch_bounds__(kThreads) seedKernel(SemanticClusterParams const params, Scratch const scratch)
{
    SEMKV_SHARED_BYTES(bytes);
    int const words = ceilDivide(slotsInUse(params, blockIdx.z), kWord);
    int64_t const row = (static_cast<int64_t>(blockIdx.z) * params.groups + blockIdx.y) * params.levels + blockIdx.x;
    uint64_t* now = reinterpret_cast<uint64_t*>(bytes);
    uint64_t* next = now + scratch.words;
    unsigned char* changed = reinterpret_cast<unsigned char*>(next + scratch.words);
    unsigned char* nextChanged = changed + scratch.words;
    uint64_t const* const neighbour = scratch.neighbour + row * kWord * scratch.words;

    for (int w = static_cast<int>(threadIdx.x); w < words; w += kThreads)
    {
        now[w] = 0;
        changed[w] = 1;
    }
    bool first = true;
    int anyChanged = 1;
    while (anyChanged != 0)
    {
        __syncthreads();
        anyChanged = 0;
        for (int w = static_cast<int>(threadIdx.x); w < words; w += kThreads)
        {
            bool const stale = first || (w > 0 && changed[w - 1] != 0);
            next[w] = stale ? scanWord(neighbour + w, scratch.words, w > 0 ? now[w - 1] : 0) : now[w];
            nextChanged[w] = next[w] != now[w] ? 1 : 0;
            anyChanged |= nextChanged[w];
        }
        anyChanged = __syncthreads_or(anyChanged);
        uint64_t* const words0 = now;
        now = next;
        next = words0;
        unsigned char* const flags0 = changed;
        changed = nextChanged;
        nextChanged = flags0;
        first = false;
    }

    int* const count = reinterpret_cast<int*>(bytes + (seedShared(scratch.words) - sizeof(int)) / 4 * 4);
    if (threadIdx.x == 0)
    {
        *count = 0;
    }
    __syncthreads();
    int own = 0;
    for (int w = static_cast<int>(threadIdx.x); w < words; w += kThreads)
    {
        scratch.seeds[row * scratch.words + w] = now[w];
        own += __popcll(now[w]);
    }
    atomicAdd(count, own);
    __syncthreads();
    if (threadIdx.x == 0)
    {
        scratch.seedCount[row] = *count;
    }
}

// The first level that meets the target, else the last; `length` gets the longest group's number of clusters.
__device__ __forceinline__ int chooseLevel(
    SemanticClusterParams const& params, Scratch const& scratch, int64_t batch, int& length)
{
    for (int level = 0;; ++level)
    {
        length = 0;
        for (int g = 0; g < params.groups; ++g)
        {
            length = max(length, scratch.seedCount[(batch * params.groups + g) * params.levels + level]);
        }
        if (length <= params.target[batch] || level == params.levels - 1)
        {
            return level;
        }
    }
}

constexpr int kPlaceThreads = 128;
constexpr size_t kPlaceShared = sizeof(int) * (kPlaceThreads / 32 + 1) + kPlaceThreads + kWord;

// How far before slot j its seed lies; 0: it is one; 255: it is dead.
__device__ __forceinline__ unsigned char distanceToSeed(
    uint64_t const* neighbour, uint64_t const* seeds, int words, int j)
{
    int const word = j / kWord;
    int const position = j % kWord;
    uint64_t const bits = neighbour[static_cast<int64_t>(position) * words + word];
    uint64_t const joins = bits >> 1 & seedsBefore(word > 0 ? seeds[word - 1] : 0, seeds[word], position);
    int const back = joins != 0 ? kWord - __clzll(static_cast<long long>(joins)) : 0;
    return static_cast<unsigned char>((bits & 1U) == 0 ? 255 : back);
}

// Where every cluster goes and which slots it has, one thread a slot. A cluster's place is the number of seeds before its
// own; its members are among the next 63 slots, so a block works out the distances of 64 more. Grid: slots, groups, batch.
__global__ void __launch_bounds__(kPlaceThreads) placeKernel(SemanticClusterParams const params, Scratch const scratch)
{
    SEMKV_SHARED_BYTES(bytes);
    unsigned char* const distance = bytes + sizeof(int) * (kPlaceThreads / 32 + 1);
    int64_t const batch = blockIdx.z;
    int64_t const group = batch * params.groups + blockIdx.y;
    int const thread = static_cast<int>(threadIdx.x);
    int const first = static_cast<int>(blockIdx.x) * kPlaceThreads;
    int const slot = first + thread;
    int const used = slotsInUse(params, batch);
    int64_t* const sourceSlot = params.sourceSlot + group * params.capacity;
    bool const writesRow = blockIdx.x == 0 && thread == 0;
    if (used == 0)
    {
        // The batch row stays as it is.
        bool const valid = lengthValid(params, batch);
        if (slot < params.capacity)
        {
            sourceSlot[slot] = valid && slot < params.length[batch] ? slot : -1;
        }
        if (writesRow)
        {
            scratch.count[group] = kKeepAll;
            params.lengthOut[batch] = valid ? params.length[batch] : -1;
            params.level[batch] = -1;
        }
        return;
    }
    int length = 0;
    int const level = chooseLevel(params, scratch, batch, length);
    int64_t const row = group * params.levels + level;
    uint64_t const* const seeds = scratch.seeds + row * scratch.words;
    uint64_t const* const neighbour = scratch.neighbour + row * kWord * scratch.words;
    int const count = scratch.seedCount[row];
    if (writesRow)
    {
        scratch.count[group] = count;
        // Every group writes the same two values.
        params.lengthOut[batch] = length;
        params.level[batch] = level;
    }
    if (slot < params.capacity && slot >= count)
    {
        sourceSlot[slot] = -1;
    }
    for (int i = thread; i < kPlaceThreads + kWord; i += kPlaceThreads)
    {
        distance[i] = first + i < used ? distanceToSeed(neighbour, seeds, scratch.words, first + i) : 255;
    }
    int before = 0;
    for (int w = thread; w < min(first, used) / kWord; w += kPlaceThreads)
    {
        before += __popcll(seeds[w]);
    }
    int place = 0;
    blockScan<kPlaceThreads>(before, reinterpret_cast<int*>(bytes), place);
    if (slot >= used || distance[thread] != 0)
    {
        return;
    }
    for (int w = first / kWord; w < slot / kWord; ++w)
    {
        place += __popcll(seeds[w]);
    }
    place += __popcll(seeds[slot / kWord] & ((uint64_t{1} << slot % kWord) - 1));
    uint64_t members = 1;
    for (int d = 1; d < params.span; ++d)
    {
        members |= static_cast<uint64_t>(distance[thread + d] == d) << d;
    }
    scratch.source[group * params.capacity + place] = slot;
    scratch.members[group * params.capacity + place] = members;
    sourceSlot[place] = slot;
}

// New biases, and each slot's share in its cluster. Grid: slots, heads, batch.
__global__ void __launch_bounds__(kThreads) weightKernel(SemanticClusterParams const params, Scratch const scratch)
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
    if (count == kKeepAll)
    {
        scratch.bias[head + slot] = params.slotBias[head + slot];
        return;
    }
    if (slot >= count)
    {
        scratch.bias[head + slot] = slot < params.lengthOut[batch] ? minusInfinity() : 0.0F;
        return;
    }
    float const* const bias
        = params.slotBias + (batch * params.heads + (params.groups == 1 ? 0 : blockIdx.y)) * params.capacity;
    int const source = scratch.source[group * params.capacity + slot];
    uint64_t const members = scratch.members[group * params.capacity + slot];
    if (members == 1)
    {
        scratch.bias[head + slot] = bias[source];
        return;
    }
    float sum = 0.0F;
    for (uint64_t rest = members; rest != 0; rest &= rest - 1)
    {
        sum += expf(bias[source + __ffsll(static_cast<long long>(rest)) - 1]);
    }
    for (uint64_t rest = members; rest != 0; rest &= rest - 1)
    {
        int const member = source + __ffsll(static_cast<long long>(rest)) - 1;
        scratch.weight[head + member] = expf(bias[member]) / sum;
    }
    scratch.bias[head + slot] = logf(sum);
}
} // namespace semkv::cluster
