#include "session/sampler.h"

#include <array>
#include <cstddef>

namespace semkv::runtime
{
namespace
{
using std::size_t;

// SeedSequence of numpy/random/bit_generator.pyx (M. E. O'Neill's seed_seq), for one integer: four words of state.
std::array<uint64_t, 4> seedWords(uint64_t seed)
{
    uint32_t constant = 0x43b0d7e5;
    auto const hashed = [&](uint32_t value) {
        value ^= constant;
        constant *= 0x931e8875;
        value *= constant;
        return value ^ (value >> 16);
    };
    auto const mixed = [](uint32_t x, uint32_t y) {
        uint32_t const result = 0xca01f9dd * x - 0x4973f715 * y;
        return result ^ (result >> 16);
    };
    std::array<uint32_t, 4> pool{};
    for (size_t i = 0; i < pool.size(); ++i)
    {
        pool[i] = hashed(i < 2 ? static_cast<uint32_t>(seed >> (32 * i)) : 0);
    }
    for (size_t from = 0; from < pool.size(); ++from)
    {
        for (size_t to = 0; to < pool.size(); ++to)
        {
            if (from != to)
            {
                pool[to] = mixed(pool[to], hashed(pool[from]));
            }
        }
    }
    std::array<uint64_t, 4> words{};
    constant = 0x8b51f9dd;
    for (size_t i = 0; i < 8; ++i)
    {
        uint32_t value = pool[i % 4] ^ constant;
        constant *= 0x58f38ded;
        value *= constant;
        value ^= value >> 16;
        words[i / 2] |= static_cast<uint64_t>(value) << (32 * (i % 2));
    }
    return words;
}

constexpr unsigned __int128 wide(uint64_t high, uint64_t low)
{
    return static_cast<unsigned __int128>(high) << 64 | low;
}

constexpr unsigned __int128 kMultiplier = wide(2549297995355413924u, 4865540595714422341u);
} // namespace

Random::Random(uint64_t seed)
{
    auto const words = seedWords(seed);
    mIncrement = wide(words[2], words[3]) << 1 | 1;
    mState = mIncrement + wide(words[0], words[1]);
    mState = mState * kMultiplier + mIncrement;
}

double Random::uniform()
{
    mState = mState * kMultiplier + mIncrement;
    uint64_t const folded = static_cast<uint64_t>(mState >> 64) ^ static_cast<uint64_t>(mState);
    unsigned const turn = static_cast<unsigned>(mState >> 122);
    uint64_t const value = folded >> turn | folded << (-turn & 63);
    return static_cast<double>(value >> 11) * (1.0 / 9007199254740992.0);
}
} // namespace semkv::runtime
