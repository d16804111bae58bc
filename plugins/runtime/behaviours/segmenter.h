// Cuts one row's growing text into semantic blocks (block_rule of docs/contract.md), in integers alone.
#pragma once

#include "bundle/contract.h"

#include <cstdint>
#include <vector>

namespace semkv::runtime
{
struct Segmenter
{
    // Codes of a token that ends nothing, and of one that ends a turn; others index a domain's weights.
    static constexpr int64_t kNoDelimiter = -1, kTurn = -2;

    std::vector<int64_t> open; // codes of the open block's tokens
    std::vector<int64_t> sums; // by domain, log shares of the delimiters seen so far
    int64_t closed = 0;        // blocks that are closed

    // Takes the next token's code; returns the length of the block that it closes, or 0.
    int64_t append(BlockRule const& rule, int64_t code);

    bool operator==(Segmenter const& other) const
    {
        return open == other.open && sums == other.sums && closed == other.closed;
    }

private:
    int64_t cut(BlockRule const& rule, int64_t last) const;
};

// [vocab]: what each token is at a boundary.
std::vector<int64_t> codesOf(BlockRule const& rule, std::vector<uint8_t> const& isDelimiter);
} // namespace semkv::runtime
