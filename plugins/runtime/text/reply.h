// A reply that is being generated: what is shown of each token, and what of it the cache holds. As
// semkv_deploy/runtime/reply.py.
#pragma once

#include "text/detokenizer.h"

#include <cstdint>
#include <string>
#include <vector>

namespace semkv::text
{
// Passes text on until one of the stop texts appears, and holds back what may be the beginning of one. Texts are whole
// characters of UTF-8, and so are the parts that are passed on.
class StopFilter
{
public:
    explicit StopFilter(std::vector<std::string> stop)
        : mStop(std::move(stop))
    {
    }

    // The part of the text so far that may be shown; nothing after a stop.
    std::string push(std::string const& text);

    // What was held back, at the text's end.
    std::string flush();

    bool stopped() const
    {
        return mStopped;
    }

private:
    size_t overlap(std::string const& stop) const;

    std::vector<std::string> mStop;
    std::string mHeld;
    bool mStopped = false;
};

// A generated text: without what stopped it; and that of the tokens that the cache holds, which may be less, or more by
// the beginning of a stop text.
struct Reply
{
    std::string text, cached;
};

// Turns chosen tokens into text, whole characters all, until an id or a text stops it.
class ReplyBuilder
{
public:
    // Args: ids and texts that end the reply, and are no part of it; a text that is an added token is its id. Without a
    // detokenizer replies have no text.
    ReplyBuilder(Detokenizer const* detokenizer, std::vector<int64_t> stopIds, std::vector<std::string> const& stop);

    bool ends(int64_t token) const;

    // Takes the next token, which does not end the text; returns what has become certain and may be shown.
    std::string push(int64_t token);

    // Notes that the cache holds what was pushed so far.
    void appended()
    {
        mAppended = mDecoded.size();
    }

    // Ends the text; returns the rest that may be shown.
    std::string flush();

    // Whether a stop text appeared; the token that completed it is not to be appended.
    bool stopped() const
    {
        return mShown.stopped();
    }

    // The text so far, after `flush`.
    Reply reply() const
    {
        return {mText, mDecoded.substr(0, mAppended)};
    }

private:
    std::string shown(std::string const& piece);

    Detokenizer const* mDetokenizer;
    std::vector<int64_t> mEnds;
    Stream mStream;
    StopFilter mShown;
    std::string mText, mDecoded;
    size_t mAppended = 0; // bytes of what was decoded that are of tokens in the cache
};
} // namespace semkv::text
