// Rows of any element type as float32 vectors and back. Compiled once for each instruction set.
#if defined(SEMKV_ELEMENTS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef SEMKV_ELEMENTS_INL_H
#undef SEMKV_ELEMENTS_INL_H
#else
#define SEMKV_ELEMENTS_INL_H
#endif

#include "hwy/cache_control.h"
#include "hwy/highway.h"

#include <cstddef>
#include <cstdint>

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;
using Ints = hn::RebindToSigned<Floats>;
using FloatVec = hn::Vec<Floats>;
constexpr size_t kLanes = hn::MaxLanes(Floats());

// What caches and queries are made of; the bits of a 16-bit type are taken as such.
using Half = hwy::float16_t;
using Brain = hwy::bfloat16_t;

// `count` elements, or a whole vector where there are as many; the rest is 0.
HWY_INLINE FloatVec load(float const* from, size_t count = kLanes)
{
    return count >= kLanes ? hn::LoadU(Floats(), from) : hn::LoadN(Floats(), from, count);
}

HWY_INLINE FloatVec load(Half const* from, size_t count = kLanes)
{
    hn::Rebind<Half, Floats> const tag;
    return hn::PromoteTo(Floats(), count >= kLanes ? hn::LoadU(tag, from) : hn::LoadN(tag, from, count));
}

HWY_INLINE FloatVec load(Brain const* from, size_t count = kLanes)
{
    hn::Rebind<uint16_t, Floats> const tag;
    auto const* bits = reinterpret_cast<uint16_t const*>(from);
    auto const narrow = count >= kLanes ? hn::LoadU(tag, bits) : hn::LoadN(tag, bits, count);
    hn::RebindToUnsigned<Floats> const wide;
    return hn::BitCast(Floats(), hn::ShiftLeft<16>(hn::PromoteTo(wide, narrow)));
}

HWY_INLINE FloatVec load(int8_t const* from, size_t count = kLanes)
{
    hn::Rebind<int8_t, Floats> const tag;
    auto const codes = count >= kLanes ? hn::LoadU(tag, from) : hn::LoadN(tag, from, count);
    return hn::ConvertTo(Floats(), hn::PromoteTo(Ints(), codes));
}

HWY_INLINE void store(FloatVec value, float* to, size_t count = kLanes)
{
    if (count >= kLanes)
    {
        hn::StoreU(value, Floats(), to);
    }
    else
    {
        hn::StoreN(value, Floats(), to, count);
    }
}

HWY_INLINE void store(FloatVec value, Half* to, size_t count = kLanes)
{
    hn::Rebind<Half, Floats> const tag;
    auto const narrow = hn::DemoteTo(tag, value);
    if (count >= kLanes)
    {
        hn::StoreU(narrow, tag, to);
    }
    else
    {
        hn::StoreN(narrow, tag, to, count);
    }
}

// Rounded half to even, as every other implementation does; a NaN keeps its upper bits and stays one.
HWY_INLINE void store(FloatVec value, Brain* to, size_t count = kLanes)
{
    hn::RebindToUnsigned<Floats> const wide;
    auto const bits = hn::BitCast(wide, value);
    auto const odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(wide, 1u));
    auto const rounded = hn::Add(bits, hn::Add(odd, hn::Set(wide, 0x7FFFu)));
    auto const quiet = hn::Or(bits, hn::Set(wide, 0x400000u));
    auto const nan = hn::RebindMask(wide, hn::IsNaN(value));
    hn::Rebind<uint16_t, Floats> const tag;
    auto const narrow = hn::TruncateTo(tag, hn::ShiftRight<16>(hn::IfThenElse(nan, quiet, rounded)));
    auto* bits16 = reinterpret_cast<uint16_t*>(to);
    if (count >= kLanes)
    {
        hn::StoreU(narrow, tag, bits16);
    }
    else
    {
        hn::StoreN(narrow, tag, bits16, count);
    }
}
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#endif
