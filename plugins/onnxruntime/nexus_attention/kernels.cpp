// The kernels for each instruction set, and which of them this CPU gets.
#include "../simd/targets.h"

#include "kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "nexus_attention/kernels.cpp"
#include "hwy/foreach_target.h"
// First the above, then what is compiled for each target.
#include "hwy/highway.h"
#include "tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
// Calls `code` with a value of the caches' type.
template <class Code>
HWY_INLINE void withCacheType(HeadView const& head, Code const& code)
{
    withType(head.call->cacheElement, head.keys, [&](auto const* keys) { code(*keys); });
}

void attendPiece(HeadView const& head, float const* queries, int64_t from, int64_t end, float* sums, RowState* states)
{
    withCacheType(head, [&](auto const& key) {
        attendPieceOf<std::decay_t<decltype(key)>>(head, queries, from, end, sums, states);
    });
}

void attendTiles(HeadView const& head, int64_t first, int64_t end, RowState* states, float* scratch)
{
    withCacheType(head, [&](auto const& key) {
        attendTilesOf<std::decay_t<decltype(key)>>(head, first, end, states, scratch);
    });
}

void addMass(HeadView const& head, float const* queries, RowState const* states, int64_t from, int64_t end, float* mass)
{
    withCacheType(head, [&](auto const& key) {
        addMassOf<std::decay_t<decltype(key)>>(head, queries, states, from, end, mass);
    });
}

// Data, not code: code here would be of this instruction set, and run on every CPU.
constexpr NexusAttentionKernels kKernels{
    HWY_TARGET, padded, kPanel, append, loadQueries, attendPiece, merge, attendTiles, tilesScratch, addMass};
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace semkv::native
{
NexusAttentionKernels const& nexusAttentionKernels()
{
#if HWY_TARGETS & HWY_AVX3
    if (runs(HWY_AVX3))
    {
        return N_AVX3::kKernels;
    }
#endif
#if HWY_TARGETS & HWY_AVX2
    if (runs(HWY_AVX2))
    {
        return N_AVX2::kKernels;
    }
#endif
    return HWY_STATIC_DISPATCH(kKernels);
}

char const* nexusAttentionTarget()
{
    return hwy::TargetName(nexusAttentionKernels().target);
}
} // namespace semkv::native
#endif
