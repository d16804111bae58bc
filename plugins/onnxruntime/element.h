// What caches and queries are made of.
#pragma once

#include <cstddef>
#include <cstdint>

namespace semkv::native
{
enum class Element : int32_t
{
    kFloat32,
    kFloat16,
    kBfloat16,
    kInt8
};

constexpr size_t elementBytes(Element element)
{
    return element == Element::kFloat32 ? 4 : element == Element::kInt8 ? 1 : 2;
}
} // namespace semkv::native
