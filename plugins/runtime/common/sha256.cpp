#include "sha256.h"

#include <algorithm>
#include <cstring>

namespace semkv::runtime
{
namespace
{
constexpr uint32_t kRound[64] = {0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
    0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152,
    0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138,
    0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70,
    0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5,
    0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa,
    0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

constexpr uint32_t rotated(uint32_t value, int by)
{
    return (value >> by) | (value << (32 - by));
}
} // namespace

void Sha256::block(uint8_t const* data)
{
    uint32_t word[64];
    for (int i = 0; i < 16; ++i)
    {
        word[i] = uint32_t{data[4 * i]} << 24 | uint32_t{data[4 * i + 1]} << 16 | uint32_t{data[4 * i + 2]} << 8
            | uint32_t{data[4 * i + 3]};
    }
    for (int i = 16; i < 64; ++i)
    {
        uint32_t const a = word[i - 15], b = word[i - 2];
        word[i] = word[i - 16] + (rotated(a, 7) ^ rotated(a, 18) ^ (a >> 3)) + word[i - 7]
            + (rotated(b, 17) ^ rotated(b, 19) ^ (b >> 10));
    }
    auto [a, b, c, d, e, f, g, h] = mState;
    for (int i = 0; i < 64; ++i)
    {
        uint32_t const first
            = h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) + kRound[i] + word[i];
        uint32_t const second = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g;
        g = f;
        f = e;
        e = d + first;
        d = c;
        c = b;
        b = a;
        a = first + second;
    }
    uint32_t const added[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i)
    {
        mState[i] += added[i];
    }
}

void Sha256::update(void const* data, size_t bytes)
{
    auto const* from = static_cast<uint8_t const*>(data);
    size_t held = mBytes % 64;
    mBytes += bytes;
    while (bytes > 0)
    {
        if (held == 0 && bytes >= 64)
        {
            block(from);
            from += 64;
            bytes -= 64;
            continue;
        }
        size_t const taken = std::min(bytes, 64 - held);
        std::memcpy(mPending.data() + held, from, taken);
        held = (held + taken) % 64;
        from += taken;
        bytes -= taken;
        if (held == 0)
        {
            block(mPending.data());
        }
    }
}

std::string Sha256::digest()
{
    uint64_t const bits = 8 * mBytes;
    uint8_t const one = 0x80, zero = 0;
    update(&one, 1);
    while (mBytes % 64 != 56)
    {
        update(&zero, 1);
    }
    uint8_t length[8];
    for (int i = 0; i < 8; ++i)
    {
        length[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
    }
    update(length, 8);
    std::string text;
    for (uint32_t const word : mState)
    {
        for (int shift = 28; shift >= 0; shift -= 4)
        {
            text += "0123456789abcdef"[word >> shift & 15];
        }
    }
    return text;
}
} // namespace semkv::runtime
