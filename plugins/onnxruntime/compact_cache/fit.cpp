// The fit for each instruction set, and which of them this CPU gets.
#include "../simd/targets.h"

#include "fit.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compact_cache/fit.cpp"
#include "hwy/foreach_target.h"
// First the above, then what is compiled for each target.
#include "fit-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
// Data, not code: code here would be of this instruction set, and run on every CPU.
constexpr FitKernels kFitKernels{fit};
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace semkv::native
{
FitKernels const& fitKernels()
{
#if HWY_TARGETS & HWY_AVX3
    if (runs(HWY_AVX3))
    {
        return N_AVX3::kFitKernels;
    }
#endif
#if HWY_TARGETS & HWY_AVX2
    if (runs(HWY_AVX2))
    {
        return N_AVX2::kFitKernels;
    }
#endif
    return HWY_STATIC_DISPATCH(kFitKernels);
}
} // namespace semkv::native
#endif
