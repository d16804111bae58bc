// What the files of the C interface share: handles, arguments that are checked, exceptions turned into errors.
#pragma once

#include "semkv/semkv.h"
#include "session/session.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>

struct semkv_error
{
    semkv_code code;
    std::string message;
};

struct semkv_bundle
{
    std::shared_ptr<semkv::runtime::Bundle const> bundle;
    semkv::runtime::RuntimeOptions options;
};

struct semkv_session
{
    semkv::runtime::Session session;
};

namespace semkv::runtime
{
// Returned where there is no memory for an error either; never freed.
extern semkv_error gNoMemory;

template <class Code>
semkv_error* guarded(Code const& code) noexcept
{
    try
    {
        try
        {
            code();
            return nullptr;
        }
        catch (Error const& error)
        {
            return new semkv_error{error.code(), error.what()};
        }
        catch (std::bad_alloc const&)
        {
            return &gNoMemory;
        }
        catch (std::exception const& error)
        {
            return new semkv_error{SEMKV_RUNTIME, error.what()};
        }
    }
    catch (...)
    {
        return &gNoMemory;
    }
}

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
