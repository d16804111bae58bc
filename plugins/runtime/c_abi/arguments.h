// Arguments of C interfaces, checked: of libsemkv's, and of libsemkv_text's.
#pragma once

#include "common/error.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace semkv::runtime
{
[[noreturn]] inline void reject(std::string const& where, std::string const& expected, std::string const& got)
{
    throw Error(SEMKV_BAD_ARGUMENT, "a wrong argument").where(where).expected(expected).got(got);
}

inline void notNull(void const* pointer, char const* where)
{
    if (pointer == nullptr)
    {
        reject(where, "a pointer", "null");
    }
}

// A caller's struct in the size that this library has it: what an older header lacks is 0.
template <class Options>
Options taken(Options const* given, char const* where)
{
    Options options;
    std::memset(&options, 0, sizeof(options));
    if (given != nullptr)
    {
        if (given->size < sizeof(size_t) || given->size > 4096)
        {
            reject(std::string(where) + ".size", "sizeof the struct", std::to_string(given->size));
        }
        auto const* const bytes = reinterpret_cast<unsigned char const*>(given);
        if (std::any_of(bytes + std::min(given->size, sizeof(options)), bytes + given->size,
                [](unsigned char byte) { return byte != 0; }))
        {
            reject(where, "fields that this version knows", "one of a newer semkv.h that is not 0");
        }
        std::memcpy(&options, given, std::min(given->size, sizeof(options)));
    }
    return options;
}

// Fills in what the caller's struct has room for.
template <class Result>
void give(Result result, Result* out, char const* where)
{
    notNull(out, where);
    if (out->size < sizeof(size_t))
    {
        reject(std::string(where) + ".size", "sizeof the struct", std::to_string(out->size));
    }
    result.size = out->size;
    std::memcpy(static_cast<void*>(out), &result, std::min(out->size, sizeof(result)));
}

inline std::string text(char const* given)
{
    return given != nullptr ? given : "";
}
} // namespace semkv::runtime
