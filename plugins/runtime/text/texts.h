// A bundle's texts: what makes tokens of them, and them of tokens.
#pragma once

#include "common/error.h"
#include "text/detokenizer.h"
#include "text/tokenizer.h"

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

namespace semkv::text
{
class Texts
{
public:
    // No texts, and why: what wants them throws that.
    explicit Texts(runtime::Error why)
        : mWhy(std::move(why))
    {
    }

    // Args: the files of the bundle's tokenizer/ by their names there, verified. Throws SEMKV_NO_TARGET where there is
    // no tokenizer that can be read here.
    explicit Texts(std::map<std::string, std::string> files);

    // Loads onnxruntime-genai's library, by which texts become tokens. Throws SEMKV_NO_TARGET; the texts of tokens can
    // be had then all the same.
    void load(std::string const& genai, std::string const& onnxruntime);

    // Throws why there is none.
    Tokenizer const& tokenizer() const;

    // Null: tokens have no text here.
    Detokenizer const* detokenizer() const
    {
        return mDetokenizer.get();
    }

    bool hasTemplate() const
    {
        return mTokenizer != nullptr && mTokenizer->hasTemplate();
    }

    // Ids of the tokens with which the chat template ends a reply.
    Ids const& ends() const
    {
        return mEnds;
    }

private:
    std::map<std::string, std::string> mFiles; // until the library has read them
    std::unique_ptr<Detokenizer> mDetokenizer;
    std::unique_ptr<Tokenizer> mTokenizer;
    std::optional<runtime::Error> mWhy;
    Ids mEnds;
};

// The files of a bundle's tokenizer, by their names in its folder.
// Args: the text of bundle.json, and what reads a file of the bundle, verified.
std::map<std::string, std::string> tokenizerFiles(
    std::string const& manifest, std::function<std::string(std::string const&)> const& read);
} // namespace semkv::text
