#include "group.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace semkv::native
{
Group::Group(SemanticClusterCall const& call, int64_t b, int64_t g)
    // With one group all heads have the same biases.
    : bias(call.bias + (b * call.heads + g) * call.capacity)
    , position(call.position == nullptr ? nullptr : call.position + (b * call.groups + g) * call.capacity)
    , band{}
    , mCall(&call)
    , mRow(b * call.groups + g)
    , mUsed(call.length[b])
{
    int64_t const lanes = semanticClusterKernels().lanes;
    auto const live = [&](int64_t slot) { return bias[slot] > -std::numeric_limits<float>::infinity(); };
    auto const chunkAt = [&](int64_t level, int64_t slot) {
        return call.chunk[(mRow * call.levels + level) * call.capacity + slot];
    };
    int64_t first = mUsed, end = 0;
    for (int64_t level = 0; level < call.levels; ++level)
    {
        int64_t slot = 0;
        for (; slot < first && !(live(slot) && chunkAt(level, slot) >= 0); ++slot)
        {
        }
        first = std::min(first, slot);
        for (slot = mUsed; slot > end && !(live(slot - 1) && chunkAt(level, slot - 1) >= 0); --slot)
        {
        }
        end = std::max(end, slot);
    }
    int64_t const tiles = std::max<int64_t>(0, (end - first + lanes - 1) / lanes);
    auto const slots = static_cast<size_t>(tiles * lanes);
    mLive.resize(slots);
    mMay.resize(slots);
    mOwner.resize(slots);
    mLowest.assign(static_cast<size_t>(tiles), std::numeric_limits<int64_t>::max());
    mHighest.assign(static_cast<size_t>(tiles), -1);
    for (int64_t slot = 0; slot < mUsed; ++slot)
    {
        auto const at = static_cast<size_t>(slot - first);
        if (slot >= first && at < slots)
        {
            mLive[at] = live(slot);
        }
        else
        {
            mOutside += live(slot);
        }
    }
    for (int64_t level = 0; level < call.levels; ++level)
    {
        for (int64_t slot = first; slot < end; ++slot)
        {
            auto const at = static_cast<size_t>(slot - first), tile = at / static_cast<size_t>(lanes);
            int64_t const chunk = chunkAt(level, slot);
            if (mLive[at] && chunk >= 0)
            {
                mMay[at] = 1;
                mLowest[tile] = std::min(mLowest[tile], chunk);
                mHighest[tile] = std::max(mHighest[tile], chunk);
            }
        }
    }
    int64_t const reach = (std::min(call.span, mUsed) + lanes - 2) / lanes;
    mUnits = alignedFloats(slots * static_cast<size_t>(call.perGroup() * call.size));
    mAlike = alignedFloats(slots * static_cast<size_t>((reach + 1) * lanes));
    band = {&call, b, g, first, tiles, reach, mLive.data(), mMay.data(), mLowest.data(), mHighest.data(), mUnits.get(),
        mAlike.get()};
}

void Group::findSeeds(int64_t level, int64_t most)
{
    int64_t const* chunk = mCall->chunk + (mRow * mCall->levels + level) * mCall->capacity;
    count = mOutside
        + semanticClusterKernels().seeds(band, chunk, mCall->thresholds[level], most - mOutside, mOwner.data());
}

void Group::settle()
{
    int64_t* const source = mCall->source + mRow * mCall->capacity;
    std::fill(source, source + mCall->capacity, -1);
    clusters.reserve(static_cast<size_t>(count));
    mNext.assign(static_cast<size_t>(mUsed), -1);
    mWeight.resize(static_cast<size_t>(mUsed));
    std::vector<int64_t> last(static_cast<size_t>(mUsed)), place(static_cast<size_t>(mUsed));
    int64_t const bandEnd = band.first + static_cast<int64_t>(mLive.size());
    for (int64_t slot = 0; slot < mUsed; ++slot)
    {
        if (!(bias[slot] > -std::numeric_limits<float>::infinity()))
        {
            continue;
        }
        bool const inside = slot >= band.first && slot < bandEnd;
        int64_t const seed = inside ? mOwner[static_cast<size_t>(slot - band.first)] : slot;
        auto const s = static_cast<size_t>(seed);
        if (seed == slot)
        {
            place[s] = static_cast<int64_t>(clusters.size());
            last[s] = slot;
            source[clusters.size()] = slot;
            clusters.push_back({{slot, mNext.data(), mWeight.data(), 0.0f}, bias[slot], true});
            continue;
        }
        Cluster& cluster = clusters[static_cast<size_t>(place[s])];
        if (cluster.alone)
        {
            cluster.alone = false;
            mWeight[s] = std::exp(bias[s]);
            cluster.members.total = mWeight[s];
        }
        mWeight[static_cast<size_t>(slot)] = std::exp(bias[slot]);
        cluster.members.total += mWeight[static_cast<size_t>(slot)];
        mNext[static_cast<size_t>(last[s])] = slot;
        last[s] = slot;
    }
    for (Cluster& cluster : clusters)
    {
        cluster.bias = cluster.alone ? cluster.bias : std::log(cluster.members.total);
    }
}
} // namespace semkv::native
