// What a user did wrong, or what went wrong: one sentence of what, where, expected, got, and what to do.
#pragma once

#include "semkv/semkv.h"

#include <stdexcept>
#include <string>

namespace semkv::runtime
{
class Error : public std::exception
{
public:
    Error(semkv_code code, std::string what)
        : mCode(code)
        , mWhat(std::move(what))
        , mText(mWhat + ".")
    {
    }

    Error& where(std::string text);
    Error& expected(std::string text);
    Error& got(std::string text);
    Error& fix(std::string text);

    semkv_code code() const noexcept
    {
        return mCode;
    }

    char const* what() const noexcept override
    {
        return mText.c_str();
    }

private:
    Error& written();

    semkv_code mCode;
    std::string mWhat, mWhere, mExpected, mGot, mFix, mText;
};

// "[1, 2]", as Python prints a list.
template <class Numbers>
std::string listed(Numbers const& numbers)
{
    std::string text;
    for (auto const& number : numbers)
    {
        text += (text.empty() ? "" : ", ") + std::to_string(number);
    }
    return "[" + text + "]";
}
} // namespace semkv::runtime
