// Dot products, on the best instruction set that this CPU has.
#pragma once

#include <cstddef>

namespace semkv::native
{
using Dot = float (*)(float const* a, float const* b, size_t count);

Dot dotProduct();
} // namespace semkv::native
