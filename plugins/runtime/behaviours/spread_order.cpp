#include "behaviours/spread_order.h"

#include <algorithm>

namespace semkv::runtime
{
namespace
{
// n - 1 less each number with its bits reversed, those below 0 left out.
std::vector<size_t> evenly(size_t n)
{
    size_t bits = 1;
    while (n > size_t{1} << bits)
    {
        ++bits;
    }
    std::vector<size_t> places;
    for (size_t number = 0; number < size_t{1} << bits; ++number)
    {
        size_t reversed = 0;
        for (size_t bit = 0; bit < bits; ++bit)
        {
            reversed |= (number >> bit & 1) << (bits - 1 - bit);
        }
        if (reversed < n)
        {
            places.push_back(n - 1 - reversed);
        }
    }
    return places;
}
} // namespace

std::vector<size_t> spreadOrder(
    std::vector<int64_t> const& tokens, std::unordered_map<int64_t, size_t> const& rank)
{
    size_t const n = tokens.size();
    std::vector<size_t> rarest = evenly(n);
    auto const rankOf = [&](size_t place) {
        auto const found = rank.find(tokens[place]);
        return found == rank.end() ? rank.size() : found->second;
    };
    std::stable_sort(
        rarest.begin(), rarest.end(), [&](size_t left, size_t right) { return rankOf(left) > rankOf(right); });
    std::vector<size_t> order;
    std::vector<uint8_t> taken(n);
    auto const take = [&](size_t place) {
        if (taken[place] == 0)
        {
            taken[place] = 1;
            order.push_back(place);
        }
    };
    for (size_t number = 0; number < n; ++number)
    {
        take(n - 1 - number);
        take(rarest[number]);
    }
    return order;
}
} // namespace semkv::runtime
