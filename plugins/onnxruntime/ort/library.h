// What ONNX Runtime asks of a library of operators when it loads it.
#pragma once

#include "api.h"

#define SEMKV_EXPORT extern "C" __attribute__((visibility("default")))

namespace semkv::native
{
// A library's operators, all for one execution provider.
struct Library
{
    char const* name;       // in messages
    uint32_t ortVersion;    // of the C API: the oldest that has all that the operators use
    char const* ortRelease; // the first release with it
    std::vector<std::unique_ptr<Operator>> (*operators)();
};

// Gives the operators to a session's options. They are made once, and never freed: sessions may outlive static objects.
OrtStatus* registerOperators(Library const& library, OrtSessionOptions* options, OrtApiBase const* base);
} // namespace semkv::native
