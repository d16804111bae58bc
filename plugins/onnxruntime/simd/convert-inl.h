// Rows of a type that is known at run time, to float32 and back. Compiled once for each instruction set.
#if defined(SEMKV_CONVERT_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef SEMKV_CONVERT_INL_H
#undef SEMKV_CONVERT_INL_H
#else
#define SEMKV_CONVERT_INL_H
#endif

#include "../element.h"
#include "elements-inl.h"

#include <algorithm>
#include <type_traits>

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
// Calls `code` with a pointer to `element`s.
template <class Code>
HWY_INLINE void withType(Element element, void const* data, Code const& code)
{
    switch (element)
    {
    case Element::kFloat32: return code(static_cast<float const*>(data));
    case Element::kFloat16: return code(static_cast<Half const*>(data));
    case Element::kBfloat16: return code(static_cast<Brain const*>(data));
    case Element::kInt8: return code(static_cast<int8_t const*>(data));
    }
}

// A row as codes: the largest magnitude becomes 127, ratios are rounded half to even.
template <class From>
HWY_INLINE float quantize(From const* row, int64_t size, int8_t* codes)
{
    auto largest = hn::Zero(Floats());
    for (int64_t i = 0; i < size; i += kLanes)
    {
        largest = hn::Max(largest, hn::Abs(load(row + i, static_cast<size_t>(size - i))));
    }
    float const scale = hn::ReduceMax(Floats(), largest) / 127.0f;
    auto const divisor = hn::Set(Floats(), scale > 0.0f ? scale : 1.0f);
    for (int64_t i = 0; i < size; i += kLanes)
    {
        auto const ratio = hn::Div(load(row + i, static_cast<size_t>(size - i)), divisor);
        auto const rounded = hn::Clamp(hn::Round(ratio), hn::Set(Floats(), -127.0f), hn::Set(Floats(), 127.0f));
        hn::Rebind<int8_t, Floats> const narrow;
        auto const code = hn::DemoteTo(narrow, hn::ConvertTo(Ints(), rounded));
        auto const count = std::min(kLanes, static_cast<size_t>(size - i));
        hn::StoreN(code, narrow, codes + i, count);
    }
    return scale;
}

// Row `row` of [·,size] as float32, times its scale where there are scales.
HWY_INLINE void widenRow(Element element, void const* rows, float const* scales, int64_t row, int64_t size, float* to)
{
    auto const scale = hn::Set(Floats(), scales == nullptr ? 1.0f : scales[row]);
    withType(element, rows, [&](auto const* from) {
        for (int64_t i = 0; i < size; i += kLanes)
        {
            auto const left = static_cast<size_t>(size - i);
            store(hn::Mul(load(from + row * size + i, left), scale), to + i, left);
        }
    });
}

// Writes float32 to row `row` of [·,size]; int8 rows get a scale.
HWY_INLINE void narrowRow(Element element, float const* from, void* rows, float* scales, int64_t row, int64_t size)
{
    withType(element, rows, [&](auto const* untyped) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(untyped)>>;
        T* to = const_cast<T*>(untyped) + row * size;
        if constexpr (std::is_same_v<T, int8_t>)
        {
            scales[row] = quantize(from, size, to);
        }
        else
        {
            for (int64_t i = 0; i < size; i += kLanes)
            {
                store(load(from + i, static_cast<size_t>(size - i)), to + i, static_cast<size_t>(size - i));
            }
        }
    });
}
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#endif
