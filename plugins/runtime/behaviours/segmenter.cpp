#include "behaviours/segmenter.h"

#include <algorithm>
#include <cstdlib>
#include <tuple>

namespace semkv::runtime
{
int64_t Segmenter::append(BlockRule const& rule, int64_t code)
{
    open.push_back(code);
    for (size_t domain = 0; code >= 0 && domain < rule.domains.size(); ++domain)
    {
        sums[domain] += rule.domains[domain].logShares[static_cast<size_t>(code)];
    }
    int64_t const length = cut(rule, code);
    if (length > 0)
    {
        open.erase(open.begin(), open.begin() + length);
        ++closed;
    }
    return length;
}

int64_t Segmenter::cut(BlockRule const& rule, int64_t last) const
{
    int64_t const tokens = static_cast<int64_t>(open.size());
    if (last == kTurn && tokens >= rule.shortest())
    {
        return tokens;
    }
    if (tokens < rule.longest())
    {
        return 0;
    }
    if (rule.domains.empty())
    {
        return rule.base;
    }
    // The first of the largest, as ties go to the first domain.
    size_t const likeliest = rule.domain
        ? static_cast<size_t>(*rule.domain)
        : static_cast<size_t>(std::max_element(sums.begin(), sums.end()) - sums.begin());
    int64_t best = 0;
    std::tuple<int64_t, int64_t, int64_t> highest;
    for (int64_t n = rule.shortest(); n <= rule.longest(); ++n)
    {
        int64_t const code = n > 0 ? open[static_cast<size_t>(n - 1)] : kNoDelimiter;
        if (code == kNoDelimiter)
        {
            continue;
        }
        // Python indexes with the code, and -2 is the last but one.
        auto const& weights = rule.domains[likeliest].weights;
        size_t const at = static_cast<size_t>(code >= 0 ? code : static_cast<int64_t>(weights.size()) + code);
        int64_t const distance = std::abs(n - rule.base);
        int64_t const score = weights.at(at) * std::max<int64_t>(rule.search, 1) - rule.nearness * distance;
        std::tuple<int64_t, int64_t, int64_t> const found{score, -distance, -n};
        if (best == 0 || found > highest)
        {
            highest = found;
            best = n;
        }
    }
    return best == 0 ? rule.base : best;
}

std::vector<int64_t> codesOf(BlockRule const& rule, std::vector<uint8_t> const& isDelimiter)
{
    std::vector<int64_t> codes(isDelimiter.size(), Segmenter::kNoDelimiter);
    if (rule.domains.empty())
    {
        return codes;
    }
    int64_t const others = static_cast<int64_t>(rule.tokenIds.size());
    std::transform(isDelimiter.begin(), isDelimiter.end(), codes.begin(),
        [&](uint8_t delimiter) { return delimiter ? others : Segmenter::kNoDelimiter; });
    for (size_t i = 0; i < rule.tokenIds.size(); ++i)
    {
        codes[static_cast<size_t>(rule.tokenIds[i])] = static_cast<int64_t>(i);
    }
    for (int64_t const token : rule.turnIds)
    {
        codes[static_cast<size_t>(token)] = Segmenter::kTurn;
    }
    return codes;
}
} // namespace semkv::runtime
