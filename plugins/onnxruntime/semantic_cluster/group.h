// The slots of one group of heads in one batch row: which may merge, and the clusters that they become.
#pragma once

#include "../aligned.h"
#include "kernels.h"

#include <cstdint>
#include <vector>

namespace semkv::native
{
class Group
{
public:
    struct Cluster
    {
        Members members;
        float bias;
        bool alone; // the seed is its only member
    };

    // The levels' chunks are read; the band's units and similarities are not there yet.
    Group(SemanticClusterCall const& call, int64_t b, int64_t g);
    Group(Group const&) = delete;
    Group(Group&&) = default; // vectors' and arrays' memory stays where it is

    // Tries a level: `count` becomes the number of clusters, or any number above `most`.
    void findSeeds(int64_t level, int64_t most);

    // Makes `clusters`, in the order of their seeds, of the last level that was tried; writes the call's sources.
    void settle();

    float const* bias;       // [C] of the group
    int64_t const* position; // [C], or null
    Band band;
    int64_t count = 0;
    std::vector<Cluster> clusters;

private:
    SemanticClusterCall const* mCall;
    int64_t mRow; // of the group among all groups of all batch rows
    int64_t mUsed;
    int64_t mOutside = 0; // live slots that are not in the band: clusters of their own
    std::vector<uint8_t> mLive, mMay;
    std::vector<int64_t> mLowest, mHighest, mOwner, mNext;
    std::vector<float> mWeight;
    AlignedFloats mUnits, mAlike;
};
} // namespace semkv::native
