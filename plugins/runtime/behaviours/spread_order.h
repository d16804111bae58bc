// Which tokens of a turn its Nexus rows begin as, where they are spread over it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace semkv::runtime
{
// Places of a turn's tokens in the order in which spread rows begin as them (`spread_rule` of the contract).
// rank: where a token stands in `common`.
std::vector<size_t> spreadOrder(
    std::vector<int64_t> const& tokens, std::unordered_map<int64_t, size_t> const& rank);
} // namespace semkv::runtime
