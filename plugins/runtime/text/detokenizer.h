// Bytes of tokens, from tokenizer.json. onnxruntime-genai decodes as well, but a text ends there at the first byte that
// is no UTF-8, or is 0: a model's reply must not.
#pragma once

#include "text/kind.h"

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace semkv::text
{
class Detokenizer
{
public:
    // Reads tokenizer.json. Throws SEMKV_NO_TARGET for a tokenizer of another kind than those in kind.h.
    Detokenizer(char const* data, size_t bytes, std::string const& where);

    // Nothing for special tokens, and for ids that the tokenizer has not: a model's vocabulary may be wider.
    std::string const& bytes(int32_t id) const;

    Kind const& kind() const
    {
        return mKind;
    }

    // The added token that is written so, special or not; none: no such.
    std::optional<int32_t> added(std::string const& content) const;

    // Whether a token is no word of a text but markup: special, or added and written as such (<|user|>).
    bool isMarkup(int32_t id) const;

private:
    struct Added
    {
        std::string content;
        bool special;
    };

    Kind mKind{};
    std::vector<std::string> mBytes;
    std::unordered_map<int32_t, Added> mAdded;
};

// The text of a growing list of tokens, as semkv_deploy.runtime.tokens.TextStream gives it.
class Stream
{
public:
    // What has become certain with these bytes. The last three characters may be parts of one that is not whole yet.
    std::string push(std::string const& bytes);

    // The rest; the stream is then as new.
    std::string flush();

private:
    std::string mPending;
};
} // namespace semkv::text
