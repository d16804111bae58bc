// Exponential and hyperbolic tangent of float32 vectors. Compiled once for each instruction set.
#if defined(SEMKV_MATH_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef SEMKV_MATH_INL_H
#undef SEMKV_MATH_INL_H
#else
#define SEMKV_MATH_INL_H
#endif

#include "elements-inl.h"

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
// exp(x) to 2 units in the last place; 0 below -87.3, where float32 has no normal number for it. For x up to 88.
HWY_INLINE FloatVec exponential(FloatVec x)
{
    Floats const tag;
    auto const lowest = hn::Set(tag, -87.3f);
    auto const clipped = hn::Max(x, lowest);
    // x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts so that n ln 2 is exact; then a series for e^r.
    auto const n = hn::Round(hn::Mul(clipped, hn::Set(tag, 1.44269504f)));
    auto r = hn::NegMulAdd(n, hn::Set(tag, 0.693359375f), clipped);
    r = hn::NegMulAdd(n, hn::Set(tag, -2.12194440e-4f), r);
    auto series = hn::Set(tag, 1.0f / 5040.0f);
    series = hn::MulAdd(series, r, hn::Set(tag, 1.0f / 720.0f));
    series = hn::MulAdd(series, r, hn::Set(tag, 1.0f / 120.0f));
    series = hn::MulAdd(series, r, hn::Set(tag, 1.0f / 24.0f));
    series = hn::MulAdd(series, r, hn::Set(tag, 1.0f / 6.0f));
    series = hn::MulAdd(series, r, hn::Set(tag, 0.5f));
    series = hn::MulAdd(series, r, hn::Set(tag, 1.0f));
    series = hn::MulAdd(series, r, hn::Set(tag, 1.0f));
    auto const exponent = hn::Add(hn::ConvertTo(Ints(), n), hn::Set(Ints(), 127));
    auto const power = hn::BitCast(tag, hn::ShiftLeft<23>(exponent));
    return hn::IfThenElseZero(hn::Ge(x, lowest), hn::Mul(series, power));
}

// tanh(x); near 0 by its series, where 1 - 2 / (e^2x + 1) would lose what is small.
HWY_INLINE FloatVec hyperbolicTangent(FloatVec x)
{
    Floats const tag;
    auto const size = hn::Min(hn::Abs(x), hn::Set(tag, 20.0f));
    auto const grown = hn::Add(exponential(hn::Add(size, size)), hn::Set(tag, 1.0f));
    auto const large = hn::Sub(hn::Set(tag, 1.0f), hn::Div(hn::Set(tag, 2.0f), grown));
    auto const square = hn::Mul(size, size);
    auto const small = hn::NegMulAdd(hn::Mul(square, hn::Set(tag, 1.0f / 3.0f)), size, size);
    return hn::CopySign(hn::IfThenElse(hn::Lt(size, hn::Set(tag, 0.03f)), small, large), x);
}
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#endif
