#include "text/texts.h"

#include "text/turns.h"

#include <nlohmann/json.hpp>

namespace semkv::text
{
using runtime::Error;

Texts::Texts(std::map<std::string, std::string> files)
    : mFiles(std::move(files))
{
    auto const file = mFiles.find("tokenizer.json");
    if (file == mFiles.end())
    {
        throw Error(SEMKV_NO_TARGET, "the bundle has no tokenizer that this library reads")
            .where("tokenizer")
            .expected("a file tokenizer/tokenizer.json")
            .got("none")
            .fix("give ids, which Python's tokenizer makes");
    }
    mDetokenizer
        = std::make_unique<Detokenizer>(file->second.data(), file->second.size(), "tokenizer/tokenizer.json");
}

void Texts::load(std::string const& genai, std::string const& onnxruntime)
{
    try
    {
        Genai const& library = Genai::load(genai, onnxruntime);
        mTokenizer = std::make_unique<Tokenizer>(library, mDetokenizer->kind(), mFiles, "tokenizer");
    }
    catch (Error const& error)
    {
        mWhy = error;
        throw;
    }
    mFiles.clear();
    mEnds = endIds(*mTokenizer, *mDetokenizer);
}

Tokenizer const& Texts::tokenizer() const
{
    if (mTokenizer == nullptr)
    {
        throw mWhy.value_or(Error(SEMKV_NO_TARGET, "onnxruntime-genai was not loaded").where("text"));
    }
    return *mTokenizer;
}

std::map<std::string, std::string> tokenizerFiles(
    std::string const& manifest, std::function<std::string(std::string const&)> const& read)
{
    std::string const folder = "tokenizer/";
    std::map<std::string, std::string> files;
    nlohmann::json const all = nlohmann::json::parse(manifest);
    for (auto const& [name, record] : all.at("files").items())
    {
        if (name.compare(0, folder.size(), folder) == 0)
        {
            files[name.substr(folder.size())] = read(name);
        }
    }
    return files;
}
} // namespace semkv::text
