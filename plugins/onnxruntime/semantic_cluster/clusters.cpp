#include "clusters.h"

#include <limits>
#include <utility>

namespace semkv::native
{
namespace
{
constexpr float kUnknown = 3.0f;
} // namespace

GroupSlots::GroupSlots(
    std::vector<float> unitKeys, int64_t used, int64_t width, int64_t heads, float const* bias, int64_t span)
    : mKeys(std::move(unitKeys))
    , mKnown(static_cast<size_t>(used * span), kUnknown)
    , mBias(bias)
    , mUsed(used)
    , mWidth(width)
    , mHeads(heads)
    , mSpan(span)
    , mDot(dotProduct())
{
}

float GroupSlots::similarity(int64_t seed, int64_t slot)
{
    // Levels differ in chunks and thresholds, not in this.
    float& known = mKnown[static_cast<size_t>(slot * mSpan + slot - seed)];
    if (known == kUnknown)
    {
        float const* keys = mKeys.data();
        known = mDot(keys + seed * mWidth, keys + slot * mWidth, static_cast<size_t>(mWidth)) / static_cast<float>(mHeads);
    }
    return known;
}

std::vector<Cluster> GroupSlots::clusters(int64_t const* chunk, float threshold)
{
    std::vector<Cluster> found;
    size_t nearest = 0; // the first cluster whose seed is within reach
    for (int64_t slot = 0; slot < mUsed; ++slot)
    {
        if (!(mBias[slot] > -std::numeric_limits<float>::infinity()))
        {
            continue;
        }
        while (nearest < found.size() && slot - found[nearest].front() >= mSpan)
        {
            ++nearest;
        }
        Cluster* joined = nullptr;
        // Rounding can lift the cosine of equal keys above 1.
        for (size_t c = nearest; joined == nullptr && chunk[slot] >= 0 && threshold < 1.0f && c < found.size(); ++c)
        {
            int64_t const seed = found[c].front();
            if (chunk[seed] == chunk[slot] && similarity(seed, slot) > threshold)
            {
                joined = &found[c];
            }
        }
        if (joined == nullptr)
        {
            joined = &found.emplace_back();
        }
        joined->push_back(slot);
    }
    return found;
}
} // namespace semkv::native
