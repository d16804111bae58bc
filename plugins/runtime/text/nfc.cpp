#include "text/nfc.h"

#include "text/utf8.h"

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace semkv::text
{
namespace
{
struct Range
{
    uint32_t first, last;
    uint8_t order; // combining class: neighbours that are not 0 stand in rising order
    bool changes;  // never in the form, or perhaps not behind another
};

constexpr Range kRanges[] = {
#include "text/nfc_ranges.inc"
};

uint32_t codeOf(std::string const& text, Character const& each)
{
    auto const at = [&](size_t i) { return static_cast<uint8_t>(text[each.begin + i]); };
    uint32_t code = each.bytes == 1 ? at(0) : at(0) & (0xFFu >> (each.bytes + 1));
    for (size_t i = 1; i < each.bytes; ++i)
    {
        code = (code << 6) | (at(i) & 0x3Fu);
    }
    return code;
}
} // namespace

bool isSurelyNfc(std::string const& text)
{
    uint8_t before = 0;
    for (Character const& each : charactersOf(text))
    {
        uint32_t const code = codeOf(text, each);
        auto const found = std::lower_bound(std::begin(kRanges), std::end(kRanges), code,
            [](Range const& range, uint32_t value) { return range.last < value; });
        bool const listed = found != std::end(kRanges) && found->first <= code;
        uint8_t const order = listed ? found->order : 0;
        if ((listed && found->changes) || (order != 0 && order < before))
        {
            return false;
        }
        before = order;
    }
    return true;
}
} // namespace semkv::text
