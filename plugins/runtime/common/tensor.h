// Element types and arrays, owned and viewed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <string>
#include <vector>

namespace semkv::runtime
{
enum class Type
{
    kFloat32,
    kFloat16,
    kBFloat16,
    kInt8,
    kInt64
};

using Shape = std::vector<int64_t>;
using Ids = std::vector<int64_t>;
using Rows = std::vector<uint8_t>; // by batch row, whether it is meant

inline size_t bytesOf(Type type)
{
    return type == Type::kInt64 ? 8 : type == Type::kFloat32 ? 4 : type == Type::kInt8 ? 1 : 2;
}

// As manifests and NumPy have it.
inline char const* nameOf(Type type)
{
    switch (type)
    {
    case Type::kFloat32: return "float32";
    case Type::kFloat16: return "float16";
    case Type::kBFloat16: return "bfloat16";
    case Type::kInt8: return "int8";
    default: return "int64";
    }
}

// Throws std::bad_alloc for more than any memory has.
inline int64_t elements(Shape const& shape)
{
    int64_t count = 1;
    for (int64_t const size : shape)
    {
        if (__builtin_mul_overflow(count, size, &count) || count > int64_t{1} << 56)
        {
            throw std::bad_alloc();
        }
    }
    return count;
}

// Somebody else's memory.
struct View
{
    Type type = Type::kInt64;
    Shape shape;
    void* data = nullptr;

    size_t bytes() const
    {
        return static_cast<size_t>(elements(shape)) * bytesOf(type);
    }
};

struct Array
{
    Type type = Type::kInt64;
    Shape shape;
    std::vector<std::byte> data;

    Array() = default;

    Array(Type of, Shape sizes)
        : type(of)
        , shape(std::move(sizes))
        , data(static_cast<size_t>(elements(shape)) * bytesOf(of))
    {
    }

    static Array of(Shape sizes, std::vector<int64_t> const& values);

    template <class T>
    T* as()
    {
        return reinterpret_cast<T*>(data.data());
    }

    template <class T>
    T const* as() const
    {
        return reinterpret_cast<T const*>(data.data());
    }

    View view() const
    {
        return {type, shape, const_cast<std::byte*>(data.data())};
    }
};

inline Array Array::of(Shape sizes, std::vector<int64_t> const& values)
{
    Array array(Type::kInt64, std::move(sizes));
    for (size_t i = 0; i < values.size(); ++i)
    {
        array.as<int64_t>()[i] = values[i];
    }
    return array;
}
} // namespace semkv::runtime
