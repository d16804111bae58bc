// Exponential, hyperbolic tangent, sine and cosine of float32 vectors. Compiled once for each instruction set.
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

// sin(x) and cos(x), each within 1e-6, for |x| below 100,000: a multiple n of pi/2 is taken away, in three parts so that
// the first products are exact; then series on |r| <= pi/4, which n's last bits exchange and negate.
HWY_INLINE void sineAndCosine(FloatVec x, FloatVec& sine, FloatVec& cosine)
{
    Floats const tag;
    auto const n = hn::Round(hn::Mul(x, hn::Set(tag, 0.636619772f)));
    auto r = hn::NegMulAdd(n, hn::Set(tag, 1.5703125f), x);
    r = hn::NegMulAdd(n, hn::Set(tag, 4.837512969970703125e-4f), r);
    r = hn::NegMulAdd(n, hn::Set(tag, 7.54978995489188216e-8f), r);
    auto const square = hn::Mul(r, r);
    auto ofSine = hn::MulAdd(hn::Set(tag, -1.9515295891e-4f), square, hn::Set(tag, 8.3321608736e-3f));
    ofSine = hn::MulAdd(ofSine, square, hn::Set(tag, -1.6666654611e-1f));
    ofSine = hn::MulAdd(hn::Mul(ofSine, square), r, r);
    auto ofCosine = hn::MulAdd(hn::Set(tag, 2.443315711809948e-5f), square, hn::Set(tag, -1.388731625493765e-3f));
    ofCosine = hn::MulAdd(ofCosine, square, hn::Set(tag, 4.166664568298827e-2f));
    ofCosine = hn::MulAdd(ofCosine, square, hn::Set(tag, -0.5f));
    ofCosine = hn::MulAdd(ofCosine, square, hn::Set(tag, 1.0f));
    Ints const whole;
    auto const quarter = hn::ConvertTo(whole, n);
    auto const odd = hn::RebindMask(tag, hn::Ne(hn::And(quarter, hn::Set(whole, 1)), hn::Zero(whole)));
    auto const two = hn::Set(whole, 2);
    auto const negateSine = hn::ShiftLeft<30>(hn::And(quarter, two));
    auto const negateCosine = hn::ShiftLeft<30>(hn::And(hn::Add(quarter, hn::Set(whole, 1)), two));
    sine = hn::Xor(hn::IfThenElse(odd, ofCosine, ofSine), hn::BitCast(tag, negateSine));
    cosine = hn::Xor(hn::IfThenElse(odd, ofSine, ofCosine), hn::BitCast(tag, negateCosine));
}
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#endif
