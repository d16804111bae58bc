// What nexus_attention.cpp calls of the code that is compiled once for each instruction set.
#pragma once

#include "nexus_attention.h"

namespace semkv::native
{
// One KV head of one batch row. Rows of its query heads are numbered row * group + (query head within the group).
struct HeadView
{
    NexusAttentionCall const* call;
    void const* keys;        // [C,D] of the cache type
    void const* values;      // [C,D]
    float const* keyScale;   // [C] or null
    float const* valueScale; // [C] or null
    float const* bias;       // [C]
    int64_t const* slots;    // slots to read by position, new rows last; null: position and slot are one
    int64_t length;          // L, slots before this call's rows
    int64_t positions;       // how many there are to read
    int64_t batchRow;        // b
    int64_t kvHead;          // h

    int64_t group() const { return call->heads / call->kvHeads; }
    int64_t queryRows() const { return call->rows * group(); }
    int64_t slot(int64_t position) const { return slots == nullptr ? position : slots[position]; }
};

// Statistics of a softmax that can be merged with that of other positions: the largest logit and the sum of exponentials
// relative to it.
struct RowState
{
    float largest;
    float sum;
};

// Positions that are taken at once: their keys and values as float32 and a panel of queries stay in the caches of a core.
constexpr int64_t kBlock = 64;

// Rows of queries and outputs of a head are worked on in arrays of this size.
constexpr int64_t kLongestHead = 512;

struct NexusAttentionKernels
{
    int64_t target; // Highway's bit of the instruction set

    // A head size as rows of float32 have it in memory: a whole number of vectors.
    int64_t (*paddedSize)(int64_t headSize);

    // Rows of queries that attendTiles takes at once.
    int64_t panelRows;

    // Writes rows of `element` to a cache, as codes with their scales where `scales` is given.
    void (*append)(void const* rows, Element element, int64_t count, int64_t headSize, void* cache, Element cacheElement,
        float* scales);

    // All query rows of a head as float32 [R,padded], times the scale.
    void (*loadQueries)(HeadView const& head, float* queries);

    // The positions from..end-1 for all query rows: unnormalised sums [R,padded] and states [R]. For few rows.
    void (*attendPiece)(
        HeadView const& head, float const* queries, int64_t from, int64_t end, float* sums, RowState* states);

    // Output row r from the pieces' sums and states of it, which lie `sumStride` and `stateStride` apart; returns the
    // states' merged one.
    RowState (*merge)(HeadView const& head, int64_t r, int64_t pieces, float const* sums, int64_t sumStride,
        RowState const* states, int64_t stateStride);

    // Output rows first..end-1, all positions; states [R] get theirs. For many rows. `scratch`: tilesScratch floats,
    // aligned to 64 bytes.
    void (*attendTiles)(HeadView const& head, int64_t first, int64_t end, RowState* states, float* scratch);
    size_t (*tilesScratch)(int64_t headSize, int64_t rows);

    // Adds the softmax weights of all query rows at the positions from..end-1 to the head's mass [C].
    void (*addMass)(HeadView const& head, float const* queries, RowState const* states, int64_t from, int64_t end,
        float* mass);
};

// Of the best instruction set that this CPU has.
NexusAttentionKernels const& nexusAttentionKernels();
} // namespace semkv::native
