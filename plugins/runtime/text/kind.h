// Which tokenizers onnxruntime-genai encodes with as Python does. It leaves out steps that it does not know, without a
// word, and gives other ids: so what it is given is one of those that were compared (tests/runtime_cpp/test_text.py).
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <string>

namespace semkv::text
{
struct Kind
{
    bool nfc; // texts are brought to this form first, which the library does not do
};

// Throws SEMKV_NO_TARGET, naming the step, for a tokenizer.json that is none of them.
Kind kindOf(nlohmann::json const& tokenizer, std::string const& where);
} // namespace semkv::text
