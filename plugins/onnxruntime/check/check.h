// What the checks of all operators share: threads, buffers to the byte, numbers that every type holds.
#pragma once

#include "element.h"
#include "parallel.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

namespace semkv::native
{
inline Parallel const kThreads{[](void const*, size_t count, void (*work)(void*, size_t), void* data) {
                            std::atomic<size_t> next{0};
                            auto const loop = [&] {
                                for (size_t piece = next++; piece < count; piece = next++)
                                {
                                    work(data, piece);
                                }
                            };
                            std::thread other(loop), third(loop);
                            loop();
                            other.join();
                            third.join();
                        },
    nullptr};

// Bytes on the heap, to the byte.
struct Bytes
{
    std::unique_ptr<char[]> data;
    explicit Bytes(size_t count)
        : data(new char[count])
    {
        std::memset(data.get(), 0, count);
    }
    template <class T>
    T* as() const
    {
        return reinterpret_cast<T*>(data.get());
    }
};

// Small numbers that every type holds exactly.
inline void fill(Bytes const& bytes, size_t count, Element element, std::mt19937& random)
{
    for (size_t i = 0; i < count; ++i)
    {
        int const number = static_cast<int>(random() % 5) - 2;
        switch (element)
        {
        case Element::kFloat32: bytes.as<float>()[i] = static_cast<float>(number); break;
        case Element::kInt8: bytes.as<int8_t>()[i] = static_cast<int8_t>(number); break;
        case Element::kFloat16:
        case Element::kBfloat16: {
            int const one = element == Element::kFloat16 ? 0x3C00 : 0x3F80, two = element == Element::kFloat16 ? 0x4000 : 0x4000;
            int const size = number == 0 ? 0 : std::abs(number) == 1 ? one : two;
            bytes.as<uint16_t>()[i] = static_cast<uint16_t>(size | (number < 0 ? 0x8000 : 0));
        }
        }
    }
}

inline float read(Bytes const& bytes, size_t i, Element element)
{
    if (element == Element::kFloat32)
    {
        return bytes.as<float>()[i];
    }
    if (element == Element::kInt8)
    {
        return bytes.as<int8_t>()[i];
    }
    uint16_t const bits = bytes.as<uint16_t>()[i];
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    if (element == Element::kFloat16)
    {
        uint32_t const exponent = bits >> 10 & 31;
        float const value = std::ldexp(static_cast<float>((bits & 1023) | (exponent ? 1024 : 0)),
            static_cast<int>(exponent ? exponent : 1) - 25);
        return bits & 0x8000 ? -value : value;
    }
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Cases of SemanticCluster, and of CompactCache's fit: add their number, and how many failed.
void checkClusters(int& cases, int& failed);
void checkFits(int& cases, int& failed);
} // namespace semkv::native
