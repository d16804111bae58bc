#include "error.h"

#include <cctype>

namespace semkv::runtime
{
Error& Error::where(std::string text)
{
    mWhere = std::move(text);
    return written();
}

Error& Error::expected(std::string text)
{
    mExpected = std::move(text);
    return written();
}

Error& Error::got(std::string text)
{
    mGot = std::move(text);
    return written();
}

Error& Error::fix(std::string text)
{
    mFix = std::move(text);
    return written();
}

// As SemkvError in semkv_deploy/errors.py.
Error& Error::written()
{
    mText = mWhere.empty() ? mWhat : mWhere + ": " + mWhat;
    std::string details = mExpected.empty() ? "" : "expected " + mExpected;
    if (!mGot.empty())
    {
        details += (details.empty() ? "got " : ", got ") + mGot;
    }
    if (!details.empty())
    {
        mText += " (" + details + ")";
    }
    if (!mFix.empty())
    {
        mText += ". " + mFix;
        char& first = mText[mText.size() - mFix.size()];
        first = static_cast<char>(std::toupper(static_cast<unsigned char>(first)));
    }
    mText += ".";
    return *this;
}
} // namespace semkv::runtime
