#include "targets.h"

#include "dot.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "simd/dot.cpp"
#include "hwy/foreach_target.h"
// First the above, then what is compiled for each target.
#include "elements-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
float dot(float const* a, float const* b, size_t count)
{
    auto sum = hn::Zero(Floats()), other = sum;
    size_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes)
    {
        sum = hn::MulAdd(load(a + i), load(b + i), sum);
        other = hn::MulAdd(load(a + i + kLanes), load(b + i + kLanes), other);
    }
    for (; i < count; i += kLanes)
    {
        sum = hn::MulAdd(load(a + i, count - i), load(b + i, count - i), sum);
    }
    return hn::ReduceSum(Floats(), hn::Add(sum, other));
}

constexpr Dot kDot = dot;
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace semkv::native
{
Dot dotProduct()
{
#if HWY_TARGETS & HWY_AVX3
    if (runs(HWY_AVX3))
    {
        return N_AVX3::kDot;
    }
#endif
#if HWY_TARGETS & HWY_AVX2
    if (runs(HWY_AVX2))
    {
        return N_AVX2::kDot;
    }
#endif
    return HWY_STATIC_DISPATCH(kDot);
}
} // namespace semkv::native
#endif
