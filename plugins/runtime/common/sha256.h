// SHA-256 (FIPS 180-4): what manifests list files by, and saved sessions are verified with.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace semkv::runtime
{
class Sha256
{
public:
    void update(void const* data, size_t bytes);

    void update(std::string const& text)
    {
        update(text.data(), text.size());
    }

    // Hexadecimal, lower case; nothing may be added afterwards.
    std::string digest();

private:
    void block(uint8_t const* data);

    std::array<uint32_t, 8> mState{
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<uint8_t, 64> mPending{};
    uint64_t mBytes = 0;
};
} // namespace semkv::runtime
