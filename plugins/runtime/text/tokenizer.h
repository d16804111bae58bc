// A bundle's tokenizer and chat template, as onnxruntime-genai reads them.
#pragma once

#include "text/genai.h"
#include "text/kind.h"

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace semkv::text
{
using Ids = std::vector<int32_t>;

struct Message
{
    std::string role, content;
};

class Tokenizer
{
public:
    // Args: verified files of the bundle's tokenizer/, by their names there. They are written to a temporary folder
    // beside a genai_config.json, without which the library reads none, and removed once they are read.
    Tokenizer(
        Genai const& genai, Kind kind, std::map<std::string, std::string> const& files, std::string const& where);

    // Adds no special tokens of its own. Throws SEMKV_BAD_ARGUMENT for a text that is no UTF-8, or not in the form that
    // the tokenizer would bring it to.
    Ids encode(std::string const& text) const;

    // With the special tokens that the tokenizer puts around a text that stands alone. Throws SEMKV_BAD_ARGUMENT where
    // that is not known, too.
    Ids encodeAlone(std::string const& text) const;

    bool hasTemplate() const
    {
        return mHasTemplate;
    }

    // Throws SEMKV_BAD_ARGUMENT where there is no template, or it refuses the conversation.
    std::string render(std::vector<Message> const& messages, bool prompt) const;

private:
    Genai const& mGenai;
    Kind mKind;
    std::unique_ptr<OgaTokenizer, void (*)(OgaTokenizer*)> mTokenizer;
    bool mHasTemplate;
    mutable std::mutex mLock; // the library does not say that threads may share a tokenizer
};
} // namespace semkv::text
