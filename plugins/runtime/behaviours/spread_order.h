// Which tokens of a turn its Nexus rows begin as, where they are spread over it.
#pragma once

#include <cstddef>
#include <vector>

namespace semkv::runtime
{
// Numbers of n tokens in the order in which spread rows begin as them (`spread_rule` of the contract).
std::vector<size_t> spreadOrder(size_t n);
} // namespace semkv::runtime
