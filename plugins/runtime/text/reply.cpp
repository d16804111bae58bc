#include "text/reply.h"

#include <algorithm>

namespace semkv::text
{
std::string StopFilter::push(std::string const& text)
{
    if (mStopped)
    {
        return "";
    }
    mHeld += text;
    size_t found = std::string::npos, keep = 0;
    for (std::string const& stop : mStop)
    {
        found = std::min(found, mHeld.find(stop));
        keep = std::max(keep, overlap(stop));
    }
    mStopped = found != std::string::npos;
    std::string const shown = mHeld.substr(0, mStopped ? found : mHeld.size() - keep);
    mHeld.erase(0, mStopped ? mHeld.size() : shown.size());
    return shown;
}

std::string StopFilter::flush()
{
    std::string shown;
    shown.swap(mHeld);
    return shown;
}

// Length of the longest beginning of `stop`, and not all of it, with which the held text ends.
size_t StopFilter::overlap(std::string const& stop) const
{
    for (size_t length = std::min(stop.size() - 1, mHeld.size()); length > 0; --length)
    {
        if (mHeld.compare(mHeld.size() - length, length, stop, 0, length) == 0)
        {
            return length;
        }
    }
    return 0;
}

ReplyBuilder::ReplyBuilder(
    Detokenizer const* detokenizer, std::vector<int64_t> stopIds, std::vector<std::string> const& stop)
    : mDetokenizer(detokenizer)
    , mEnds(std::move(stopIds))
    , mShown(stop)
{
    for (std::string const& text : stop)
    {
        // A special token has no text that would show.
        if (auto const id = detokenizer != nullptr ? detokenizer->added(text) : std::nullopt)
        {
            mEnds.push_back(*id);
        }
    }
}

bool ReplyBuilder::ends(int64_t token) const
{
    return std::find(mEnds.begin(), mEnds.end(), token) != mEnds.end();
}

std::string ReplyBuilder::push(int64_t token)
{
    if (mDetokenizer == nullptr)
    {
        return "";
    }
    std::string const piece = mStream.push(mDetokenizer->bytes(static_cast<int32_t>(token)));
    mDecoded += piece;
    return shown(mShown.push(piece));
}

std::string ReplyBuilder::flush()
{
    std::string const rest = mStream.flush();
    mDecoded += rest;
    std::string const before = mShown.push(rest);
    std::string const text = shown(before + mShown.flush());
    if (!stopped())
    {
        mAppended = mDecoded.size();
    }
    return text;
}

std::string ReplyBuilder::shown(std::string const& piece)
{
    mText += piece;
    return piece;
}
} // namespace semkv::text
