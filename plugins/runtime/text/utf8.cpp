#include "text/utf8.h"

#include "common/error.h"

#include <algorithm>
#include <cstdint>

namespace semkv::text
{
namespace
{
char const* const kReplacement = "\xef\xbf\xbd";

struct Lead
{
    size_t bytes;        // of the character; 0: begins none
    uint8_t least, most; // of the second byte; the others are 0x80 to 0xBF
};

// Table 3-7 of the Unicode standard.
Lead leadOf(uint8_t byte)
{
    if (byte < 0x80)
    {
        return {1, 0, 0};
    }
    if (byte < 0xC2 || byte > 0xF4)
    {
        return {0, 0, 0};
    }
    if (byte < 0xE0)
    {
        return {2, 0x80, 0xBF};
    }
    uint8_t const least = byte == 0xE0 ? 0xA0 : byte == 0xF0 ? 0x90 : 0x80;
    uint8_t const most = byte == 0xED ? 0x9F : byte == 0xF4 ? 0x8F : 0xBF;
    return {byte < 0xF0 ? size_t{3} : size_t{4}, least, most};
}
} // namespace

std::vector<Character> charactersOf(std::string const& bytes)
{
    std::vector<Character> found;
    for (size_t at = 0; at < bytes.size();)
    {
        Lead const lead = leadOf(static_cast<uint8_t>(bytes[at]));
        size_t length = 1;
        for (; length < lead.bytes && at + length < bytes.size(); ++length)
        {
            auto const next = static_cast<uint8_t>(bytes[at + length]);
            if (next < (length == 1 ? lead.least : 0x80) || next > (length == 1 ? lead.most : 0xBF))
            {
                break;
            }
        }
        bool const valid = length == lead.bytes;
        found.push_back({at, length, valid, !valid || bytes.compare(at, length, kReplacement) == 0});
        at += length;
    }
    return found;
}

std::string textOf(std::string const& bytes, std::vector<Character> const& characters, size_t count)
{
    std::string text;
    for (size_t i = 0; i < count; ++i)
    {
        Character const& each = characters[i];
        text += each.valid ? bytes.substr(each.begin, each.bytes) : kReplacement;
    }
    return text;
}

void requireUtf8(std::string const& text, std::string const& where)
{
    auto const characters = charactersOf(text);
    auto const bad = std::find_if(characters.begin(), characters.end(), [](auto const& each) { return !each.valid; });
    if (bad != characters.end())
    {
        throw runtime::Error(SEMKV_BAD_ARGUMENT, "not UTF-8 text")
            .where(where)
            .got("byte " + std::to_string(static_cast<uint8_t>(text[bad->begin])) + " at offset "
                + std::to_string(bad->begin))
            .fix("convert it to UTF-8 (iconv -t UTF-8)");
    }
}
} // namespace semkv::text
