// Greedy clusters of one group's slots. Knows nothing of ONNX Runtime.
#pragma once

#include "dot.h"

#include <cstdint>
#include <vector>

namespace semkv::native
{
// A seed and the slots that joined it, seed first.
using Cluster = std::vector<int64_t>;

// Slots 0 … used-1 of a group and how alike they are.
class GroupSlots
{
public:
    // `unitKeys` [used,width]: the keys of the group's `heads` heads, each of length 1, side by side. `bias` [used].
    GroupSlots(std::vector<float> unitKeys, int64_t used, int64_t width, int64_t heads, float const* bias, int64_t span);

    // The clusters at one level, in the order of their seeds.
    std::vector<Cluster> clusters(int64_t const* chunk, float threshold);

private:
    float similarity(int64_t seed, int64_t slot);

    std::vector<float> mKeys;
    std::vector<float> mKnown; // [used,span]: similarity to the slot so far before; above 2: not known yet
    float const* mBias;
    int64_t mUsed;
    int64_t mWidth;
    int64_t mHeads;
    int64_t mSpan;
    Dot mDot;
};
} // namespace semkv::native
