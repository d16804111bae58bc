#include "text/kind.h"

#include "common/error.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <iterator>

namespace semkv::text
{
using nlohmann::json;

namespace
{
// Of Qwen 2 and 3, Llama 3, and GPT-4o.
char const* const kSplits[] = {
    R"re((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|)re"
    R"re(\s+(?!\S)|\s+)re",
    R"re((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|)re"
    R"re(\s+(?!\S)|\s+)re",
    R"re([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|)re"
    R"re([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|)re"
    R"re(\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)re",
};

[[noreturn]] void refuse(std::string const& where, std::string const& expected, json const& got)
{
    throw runtime::Error(SEMKV_NO_TARGET, "onnxruntime-genai was not compared with Python on such a tokenizer")
        .where(where)
        .expected(expected)
        .got(got.dump(-1, ' ', false, json::error_handler_t::replace).substr(0, 200))
        .fix("give ids, which Python's tokenizer makes");
}

bool isByteLevel(json const& step, bool regex)
{
    return step.at("type") == "ByteLevel" && !step.at("add_prefix_space") && step.value("use_regex", true) == regex;
}

bool isKnownSplit(json const& step)
{
    if (step.at("type") != "Split" || step.at("behavior") != "Isolated" || step.at("invert"))
    {
        return false;
    }
    std::string const by = step.at("pattern").value("Regex", "");
    return std::find(std::begin(kSplits), std::end(kSplits), by) != std::end(kSplits);
}

bool isKnown(json const& pre)
{
    if (!pre.is_object())
    {
        return false;
    }
    if (pre.at("type") != "Sequence")
    {
        return isByteLevel(pre, true);
    }
    json const& steps = pre.at("pretokenizers");
    return steps.size() == 2 && isKnownSplit(steps[0]) && isByteLevel(steps[1], false);
}

// What the last step puts around a text.
void readAround(json const& step, Kind& kind)
{
    if (step.is_null() || step.at("type") == "ByteLevel")
    {
        return;
    }
    if (step.at("type") == "Sequence")
    {
        for (json const& each : step.at("processors"))
        {
            readAround(each, kind);
        }
        return;
    }
    if (step.at("type") != "TemplateProcessing")
    {
        kind.around = step.at("type");
        return;
    }
    bool behind = false;
    for (json const& part : step.at("single"))
    {
        if (part.contains("Sequence"))
        {
            behind = true;
            continue;
        }
        json const& named = step.at("special_tokens").at(part.at("SpecialToken").at("id").get<std::string>());
        for (json const& id : named.at("ids"))
        {
            (behind ? kind.behind : kind.before).push_back(id);
        }
    }
}

// null and "" say the same.
bool isEmpty(json const& value)
{
    return value.is_null() || value == "" || value == json::array();
}
} // namespace

Kind kindOf(json const& tokenizer, std::string const& where)
{
    json const none;
    json const& model = tokenizer.at("model");
    json const& decoder = tokenizer.at("decoder");
    if (model.at("type") != "BPE" || !decoder.is_object() || decoder.at("type") != "ByteLevel")
    {
        refuse(where + ": decoder", "byte-level BPE (ByteLevel)", decoder);
    }
    for (char const* name : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"})
    {
        if (!isEmpty(model.value(name, none)))
        {
            refuse(where + ": model." + name, "none", model.at(name));
        }
    }
    json const pre = tokenizer.value("pre_tokenizer", none);
    if (!isKnown(pre))
    {
        refuse(where + ": pre_tokenizer", "ByteLevel, or the Split of Qwen, Llama 3 or GPT-4o before it", pre);
    }
    for (json const& added : tokenizer.value("added_tokens", json::array()))
    {
        if (added.value("single_word", false) || added.value("lstrip", false) || added.value("rstrip", false))
        {
            refuse(where + ": added_tokens", "tokens without single_word, lstrip and rstrip", added);
        }
    }
    json const normalizer = tokenizer.value("normalizer", none);
    bool const nfc = normalizer.is_object() && normalizer.at("type") == "NFC";
    bool const nothing = normalizer.is_null() || isEmpty(normalizer.value("normalizers", json(0)));
    if (!nfc && !nothing)
    {
        refuse(where + ": normalizer", "none, or NFC", normalizer);
    }
    Kind kind;
    kind.nfc = nfc;
    readAround(tokenizer.value("post_processor", none), kind);
    return kind;
}
} // namespace semkv::text
