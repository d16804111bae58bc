// The kernels for each instruction set, and which of them this CPU gets.
#include "../simd/targets.h"

#include "kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "semantic_cluster/kernels.cpp"
#include "hwy/foreach_target.h"
// First the above, then what is compiled for each target.
#include "hwy/highway.h"
#include "units-inl.h"

#include <cstring>

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
// Slots whose similarities are summed at once, in a register each.
constexpr size_t kSlotsAtOnce = kLanes < 8 ? kLanes : 8;

// Similarities of kSlotsAtOnce slots, whose units begin at `slots`, and those of a tile. A head's products are summed
// before they are added to the others': in float32 a sum of few numbers is exacter.
HWY_INLINE void compareTile(
    float const* slots, float const* tile, int64_t heads, int64_t size, float* to, int64_t stride)
{
    FloatVec all[kSlotsAtOnce];
    for (size_t s = 0; s < kSlotsAtOnce; ++s)
    {
        all[s] = hn::Zero(Floats());
    }
    for (int64_t h = 0; h < heads; ++h)
    {
        FloatVec sum[kSlotsAtOnce];
        for (size_t s = 0; s < kSlotsAtOnce; ++s)
        {
            sum[s] = hn::Zero(Floats());
        }
        for (int64_t d = 0; d < size; ++d, slots += kLanes, tile += kLanes)
        {
            auto const other = hn::LoadU(Floats(), tile);
            for (size_t s = 0; s < kSlotsAtOnce; ++s)
            {
                sum[s] = hn::MulAdd(hn::Set(Floats(), slots[s]), other, sum[s]);
            }
        }
        for (size_t s = 0; s < kSlotsAtOnce; ++s)
        {
            all[s] = hn::Add(all[s], sum[s]);
        }
    }
    auto const count = hn::Set(Floats(), static_cast<float>(heads));
    for (size_t s = 0; s < kSlotsAtOnce; ++s)
    {
        hn::StoreU(hn::Div(all[s], count), Floats(), to + static_cast<int64_t>(s) * stride);
    }
}

inline void compare(Band const& band, int64_t tile)
{
    auto const lanes = static_cast<int64_t>(kLanes);
    int64_t const row = (band.reach + 1) * lanes, size = band.width() * lanes;
    for (int64_t other = std::max<int64_t>(0, tile - band.reach); other <= tile; ++other)
    {
        // Most tiles that are near are of one chunk with this one; of the others nobody asks.
        bool const asked = band.lowest[tile] <= band.highest[other] && band.lowest[other] <= band.highest[tile];
        float* const to = band.alike + tile * lanes * row + (band.reach + other - tile) * lanes;
        for (int64_t s = 0; s < lanes; s += asked ? static_cast<int64_t>(kSlotsAtOnce) : lanes)
        {
            if (asked)
            {
                compareTile(band.units + tile * size + s, band.units + other * size, band.call->perGroup(),
                    band.call->size, to + s * row, row);
            }
            else
            {
                for (int64_t each = 0; each < lanes; ++each)
                {
                    hn::StoreU(hn::Zero(Floats()), Floats(), to + each * row);
                }
            }
        }
    }
}

// Which of a tile's similarities are above a threshold, a bit each.
HWY_INLINE uint64_t above(float const* alike, FloatVec threshold)
{
    uint8_t bytes[8] = {};
    hn::StoreMaskBits(Floats(), hn::Gt(hn::LoadU(Floats(), alike), threshold), bytes);
    uint64_t bits = 0;
    std::memcpy(&bits, bytes, (kLanes + 7) / 8);
    return bits;
}

inline int64_t seeds(Band const& band, int64_t const* chunk, float threshold, int64_t most, int64_t* owner)
{
    auto const lanes = static_cast<int64_t>(kLanes);
    auto const limit = hn::Set(Floats(), threshold);
    int64_t const span = band.call->span, row = (band.reach + 1) * lanes;
    // A bit for each seed that can be joined.
    std::vector<uint64_t> seeds(static_cast<size_t>(band.tiles), 0);
    int64_t count = 0;
    for (int64_t at = 0; at < band.tiles * lanes; ++at)
    {
        int64_t const slot = band.first + at, tile = at / lanes;
        if (!band.live[at])
        {
            continue;
        }
        owner[at] = slot;
        // Rounding can lift the cosine of equal keys above 1.
        bool const may = band.may[at] && chunk[slot] >= 0;
        for (int64_t other = std::max<int64_t>(0, tile - band.reach); may && threshold < 1.0f && other <= tile; ++other)
        {
            uint64_t bits = seeds[static_cast<size_t>(other)];
            int64_t const tooFar = at - span - other * lanes; // lane of the last slot that is
            if (bits == 0 || tooFar >= lanes - 1)
            {
                continue;
            }
            bits &= above(band.alike + at * row + (band.reach + other - tile) * lanes, limit);
            bits &= tooFar >= 0 ? ~uint64_t{0} << (tooFar + 1) : ~uint64_t{0};
            for (; bits != 0 && owner[at] == slot; bits &= bits - 1)
            {
                int64_t const seed = band.first + other * lanes + static_cast<int64_t>(hwy::Num0BitsBelowLS1Bit_Nonzero64(bits));
                if (chunk[seed] == chunk[slot])
                {
                    owner[at] = seed;
                }
            }
            if (owner[at] != slot)
            {
                break;
            }
        }
        if (owner[at] == slot)
        {
            seeds[static_cast<size_t>(tile)] |= may ? uint64_t{1} << (at % lanes) : 0;
            if (++count > most)
            {
                return count;
            }
        }
    }
    return count;
}

// Data, not code: code here would be of this instruction set, and run on every CPU.
constexpr SemanticClusterKernels kClusterKernels{static_cast<int64_t>(kLanes), loadUnits, compare, seeds, mean};
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace semkv::native
{
SemanticClusterKernels const& semanticClusterKernels()
{
#if HWY_TARGETS & HWY_AVX3
    if (runs(HWY_AVX3))
    {
        return N_AVX3::kClusterKernels;
    }
#endif
#if HWY_TARGETS & HWY_AVX2
    if (runs(HWY_AVX2))
    {
        return N_AVX2::kClusterKernels;
    }
#endif
    return HWY_STATIC_DISPATCH(kClusterKernels);
}
} // namespace semkv::native
#endif
