#include "text/detokenizer.h"

#include "common/error.h"
#include "text/utf8.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cctype>

namespace semkv::text
{
using nlohmann::json;
using runtime::Error;

namespace
{
constexpr size_t kMostIds = size_t{1} << 24; // more is no vocabulary
constexpr size_t kHeld = 3;                  // parts of a character that lacks its end

// The bytes that byte-level BPE's 256 characters stand for: those that can be printed are themselves, the others follow
// from U+0100 on.
std::array<int, 0x144> byteTable()
{
    std::array<int, 0x144> table;
    table.fill(-1);
    size_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte)
    {
        bool const printed = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
        table[printed ? static_cast<size_t>(byte) : next++] = byte;
    }
    return table;
}

// What a token's written form stands for; the form itself where it has other characters, as an added token may.
std::string bytesOf(std::string const& written)
{
    static std::array<int, 0x144> const table = byteTable();
    std::string bytes;
    for (Character const& each : charactersOf(written))
    {
        auto const at = [&](size_t i) { return static_cast<uint8_t>(written[each.begin + i]); };
        size_t const two = each.bytes == 2 ? ((at(0) & 0x1Fu) << 6) | (at(1) & 0x3Fu) : table.size();
        size_t const code = each.bytes == 1 ? at(0) : two;
        if (code >= table.size() || table[code] < 0)
        {
            return written;
        }
        bytes += static_cast<char>(table[code]);
    }
    return bytes;
}
} // namespace

Detokenizer::Detokenizer(char const* data, size_t bytes, std::string const& where)
{
    try
    {
        json const read = json::parse(data, data + bytes);
        mKind = kindOf(read, where);
        auto const place = [&](int64_t id) -> std::string& {
            if (id < 0 || id >= static_cast<int64_t>(kMostIds))
            {
                throw Error(SEMKV_BAD_BUNDLE, "no id of a token").where(where).got(std::to_string(id));
            }
            mBytes.resize(std::max(mBytes.size(), static_cast<size_t>(id) + 1));
            return mBytes[static_cast<size_t>(id)];
        };
        for (auto const& [written, id] : read.at("model").at("vocab").items())
        {
            place(id.get<int64_t>()) = bytesOf(written);
        }
        for (json const& each : read.value("added_tokens", json::array()))
        {
            auto const id = each.at("id").get<int64_t>();
            Added added{each.at("content"), each.at("special")};
            place(id) = added.special ? "" : bytesOf(added.content);
            mAdded.emplace(static_cast<int32_t>(id), std::move(added));
        }
    }
    catch (json::exception const& error)
    {
        throw Error(SEMKV_BAD_BUNDLE, "not a tokenizer's file").where(where).got(error.what());
    }
}

std::string const& Detokenizer::bytes(int32_t id) const
{
    static std::string const none;
    if (id < 0)
    {
        throw Error(SEMKV_BAD_ARGUMENT, "no token").where("token").expected("0 or more").got(std::to_string(id));
    }
    return static_cast<size_t>(id) < mBytes.size() ? mBytes[static_cast<size_t>(id)] : none;
}

std::optional<int32_t> Detokenizer::added(std::string const& content) const
{
    auto const found = std::find_if(
        mAdded.begin(), mAdded.end(), [&](auto const& each) { return each.second.content == content; });
    return found != mAdded.end() ? std::optional<int32_t>(found->first) : std::nullopt;
}

bool Detokenizer::isMarkup(int32_t id) const
{
    auto const found = mAdded.find(id);
    if (found == mAdded.end())
    {
        return false;
    }
    std::string const& content = found->second.content;
    size_t at = 0;
    while (at < content.size() && std::isspace(static_cast<unsigned char>(content[at])) != 0)
    {
        ++at;
    }
    return found->second.special || (at < content.size() && std::string("<[|").find(content[at]) != std::string::npos);
}

std::string Stream::push(std::string const& bytes)
{
    mPending += bytes;
    auto const characters = charactersOf(mPending);
    size_t certain = characters.size();
    while (certain > 0 && characters.size() - certain < kHeld && characters[certain - 1].replacement)
    {
        --certain;
    }
    std::string text = textOf(mPending, characters, certain);
    mPending.erase(0, certain < characters.size() ? characters[certain].begin : mPending.size());
    return text;
}

std::string Stream::flush()
{
    auto const characters = charactersOf(mPending);
    std::string text = textOf(mPending, characters, characters.size());
    mPending.clear();
    return text;
}
} // namespace semkv::text
