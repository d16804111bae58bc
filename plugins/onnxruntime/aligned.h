// Memory for vectors.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace semkv::native
{
struct FreeAligned
{
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

// Floats that begin at a cache line; not set to anything.
using AlignedFloats = std::unique_ptr<float[], FreeAligned>;

inline AlignedFloats alignedFloats(size_t count)
{
    return AlignedFloats(static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t{64})));
}
} // namespace semkv::native
