// Which tokenizers onnxruntime-genai encodes with as Python does. It leaves out steps that it does not know, without a
// word, and gives other ids: so what it is given is one of those that were compared (tests/runtime_cpp/test_text.py).
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace semkv::text
{
struct Kind
{
    bool nfc = false; // texts are brought to this form first, which the library does not do
    std::vector<int32_t> before{}, behind{}; // ids that it puts around a text that stands alone
    std::string around{}; // the step that puts others there, which is not known here; empty: there is none
};

// Throws SEMKV_NO_TARGET, naming the step, for a tokenizer.json that is none of them.
Kind kindOf(nlohmann::json const& tokenizer, std::string const& where);
} // namespace semkv::text
