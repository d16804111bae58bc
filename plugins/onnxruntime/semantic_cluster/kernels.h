// What is compiled once for each instruction set: how alike slots are, which join which, and clusters' means.
#pragma once

#include "semantic_cluster.h"

namespace semkv::native
{
// The slots of a group of heads from the first that may merge to the last, in tiles of as many slots as a vector has lanes.
struct Band
{
    SemanticClusterCall const* call;
    int64_t batchRow;       // b
    int64_t group;          // g
    int64_t first;          // slot of the first lane of tile 0
    int64_t tiles;
    int64_t reach;          // tiles before a slot's own that have what it may join
    uint8_t const* live;    // [tiles,lanes] whether a slot is live
    uint8_t const* may;     // [tiles,lanes] whether a slot is live and may merge at any level
    int64_t const* lowest;  // [tiles] chunk, over all levels, of slots that may merge
    int64_t const* highest; // [tiles]
    float* units;           // [tiles,width,lanes] unit keys, the group's heads one after the other; else 0
    float* alike;           // [tiles,lanes,reach+1,lanes] similarity of a slot to those of the tiles before, and its own

    int64_t width() const { return call->perGroup() * call->size; }
    // Head h of the group among all heads of all batch rows.
    int64_t head(int64_t h) const { return batchRow * call->heads + group * call->perGroup() + h; }
};

// One cluster of several slots, seed first.
struct Members
{
    int64_t seed;
    int64_t const* next; // [C] slot that comes after one, negative: none
    float const* weight; // [C]
    float total;
};

struct SemanticClusterKernels
{
    int64_t lanes;

    // Fills in a tile's units.
    void (*loadUnits)(Band const& band, int64_t tile);

    // Fills in a tile's similarities, from units that all are there.
    void (*compare)(Band const& band, int64_t tile);

    // Seeds at one level: owner[slot - first] of live slots of the band becomes the slot's seed. `chunk` [C]. Returns how
    // many there are; stops, with any number above it, where they are more than `most`.
    int64_t (*seeds)(Band const& band, int64_t const* chunk, float threshold, int64_t most, int64_t* owner);

    // Writes the mean of a cluster's rows to slot `to` of a head. `turn`: rows are rotated back by their positions
    // [C], and the mean to the seed's.
    void (*mean)(SemanticClusterCall const& call, CacheRows const& rows, int64_t head, Members const& members,
        int64_t const* turn, int64_t to);
};

// Of the best instruction set that this CPU has.
SemanticClusterKernels const& semanticClusterKernels();
} // namespace semkv::native
