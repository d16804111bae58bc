// onnxruntime-genai's library, loaded when it runs: the functions of its C interface that are called here. Declarations
// are our own, because its wheel, where users have the library from, has no headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace semkv::text
{
struct OgaResult;
struct OgaTokenizer;
struct OgaSequences;

class Genai
{
public:
    // The library, loaded once a process: the first paths that load count. Empty ones: the environment's, else what
    // the loader finds. Throws SEMKV_NO_TARGET saying what to install.
    static Genai const& load(std::string const& path, std::string const& onnxruntime);

    // Throws what the library says was wrong, as a code of ours; `what` says what failed.
    void check(OgaResult* result, char const* what, char const* where, int code) const;

    OgaResult* (*createTokenizer)(char const* folder, OgaTokenizer** out) = nullptr;
    void (*destroyTokenizer)(OgaTokenizer*) = nullptr;
    OgaResult* (*updateOptions)(OgaTokenizer*, char const* const* keys, char const* const* values, size_t) = nullptr;
    OgaResult* (*createSequences)(OgaSequences** out) = nullptr;
    void (*destroySequences)(OgaSequences*) = nullptr;
    OgaResult* (*encode)(OgaTokenizer const*, char const* text, OgaSequences*) = nullptr;
    size_t (*sequenceCount)(OgaSequences const*, size_t sequence) = nullptr;
    int32_t const* (*sequenceData)(OgaSequences const*, size_t sequence) = nullptr;
    OgaResult* (*applyChatTemplate)(OgaTokenizer const*, char const* source, char const* messages, char const* tools,
        bool prompt, char const** out) = nullptr;
    void (*destroyString)(char const*) = nullptr;

private:
    explicit Genai(void* library);

    char const* (*mResultError)(OgaResult const*) = nullptr;
    void (*mDestroyResult)(OgaResult*) = nullptr;
};
} // namespace semkv::text
