#include "engine/tensorrt/log.h"

#include <utility>

namespace semkv::runtime
{
namespace
{
constexpr int32_t kError = 1; // ILogger::Severity::kERROR; kINTERNAL_ERROR is 0, warnings are above
constexpr int kMost = 2;      // the first errors say what happened; what follows says that nothing else works then
} // namespace

TrtLog::TrtLog()
{
    mPlain.log_ = this;
    mVersioned.log_ = this;
}

void TrtLog::Plain::log(int32_t severity, char const* text) noexcept
{
    log_->add(severity, text);
}

int32_t TrtLog::Versioned::getAPILanguage() const noexcept
{
    return 0; // APILanguage::kCPP
}

TrtLog::InterfaceInfo TrtLog::Versioned::getInterfaceInfo() const noexcept
{
    return {"ILogger", 1, 0};
}

void TrtLog::Versioned::log(int32_t severity, char const* text) noexcept
{
    log_->add(severity, text);
}

void TrtLog::add(int32_t severity, char const* text) noexcept
{
    if (severity > kError || text == nullptr)
    {
        return;
    }
    try
    {
        std::lock_guard<std::mutex> const guard(mLock);
        if (mCount++ < kMost)
        {
            mErrors += (mErrors.empty() ? "" : "; ") + std::string(text);
        }
    }
    catch (...) // no memory for it: it is lost
    {
    }
}

std::string TrtLog::taken(std::string const& otherwise)
{
    std::lock_guard<std::mutex> const guard(mLock);
    mCount = 0;
    std::string text = std::exchange(mErrors, "");
    while (!text.empty() && (text.back() == '\n' || text.back() == ' ' || text.back() == '.'))
    {
        text.pop_back();
    }
    return text.empty() ? otherwise : text;
}
} // namespace semkv::runtime
