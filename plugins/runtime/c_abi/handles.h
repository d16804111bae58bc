// What the files of the C interface share: handles, and exceptions turned into errors.
#pragma once

#include "c_abi/arguments.h"
#include "semkv/semkv.h"
#include "session/session.h"

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
} // namespace semkv::runtime
