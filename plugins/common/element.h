// Element types of the caches, as every launch interface names them.
#pragma once

#include <cstdint>

namespace semkv
{
enum class Element : int32_t
{
    kFloat32 = 0,
    kFloat16 = 1,
    kBFloat16 = 2,
};

inline int32_t elementBytes(Element element)
{
    return element == Element::kFloat32 ? 4 : 2;
}
} // namespace semkv
