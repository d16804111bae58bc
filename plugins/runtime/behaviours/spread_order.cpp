#include "behaviours/spread_order.h"

#include <cstdint>

namespace semkv::runtime
{
std::vector<size_t> spreadOrder(size_t n)
{
    size_t bits = 1;
    while (n > size_t{1} << bits)
    {
        ++bits;
    }
    std::vector<size_t> order;
    std::vector<uint8_t> taken(n);
    auto const take = [&](size_t token) {
        if (taken[token] == 0)
        {
            taken[token] = 1;
            order.push_back(token);
        }
    };
    size_t number = 0;
    for (size_t last = n; last-- > 0;)
    {
        take(last);
        for (bool found = false; !found && number < size_t{1} << bits; ++number)
        {
            size_t reversed = 0;
            for (size_t bit = 0; bit < bits; ++bit)
            {
                reversed |= (number >> bit & 1) << (bits - 1 - bit);
            }
            found = reversed < n;
            if (found)
            {
                take(n - 1 - reversed);
            }
        }
    }
    return order;
}
} // namespace semkv::runtime
