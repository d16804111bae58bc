#include "text/turns.h"

#include "common/error.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <random>

namespace semkv::text
{
using runtime::Error;

namespace
{
// What stands around the unknown reply: some templates want thinking in it.
char const* const kBefore[] = {"", "<think>\n\n</think>\n\n"};

// Digits that occur in none of the texts: no template turns them to capitals or trims them.
std::string mark(Messages const& messages)
{
    static thread_local std::mt19937_64 random{std::random_device{}()};
    std::uniform_int_distribution<int64_t> numbers(1'000'000'000'000'000, 9'999'999'999'999'999);
    for (;;)
    {
        std::string const made = std::to_string(numbers(random));
        if (std::none_of(messages.begin(), messages.end(),
                [&](Message const& each) { return each.content.find(made) != std::string::npos; }))
        {
            return made;
        }
    }
}

// The text that follows a reply between these messages.
std::string behindReply(Tokenizer const& tokenizer, Messages const& before, Messages const& after, bool prompt)
{
    Messages all = before;
    all.push_back({"assistant", ""});
    all.insert(all.end(), after.begin(), after.end());
    std::string const made = mark(all);
    std::optional<Error> failure;
    for (char const* form : kBefore)
    {
        all[before.size()].content = form + made;
        try
        {
            std::string text = tokenizer.render(all, prompt);
            if (size_t at = text.find(made); at != std::string::npos)
            {
                text.erase(0, at + made.size());
                for (at = text.find(made); at != std::string::npos; at = text.find(made))
                {
                    text.erase(at, made.size());
                }
                return text;
            }
        }
        catch (Error const& error)
        {
            failure = failure ? failure : error;
        }
    }
    throw failure.value_or(
        Error(SEMKV_BAD_ARGUMENT, "the chat template does not show replies, so a chat cannot go on").where("messages"));
}

// Whether the template writes these messages.
bool takes(Tokenizer const& tokenizer, Messages const& messages)
{
    try
    {
        tokenizer.render(messages, true);
        return true;
    }
    catch (Error const&)
    {
        return false;
    }
}
} // namespace

Ids opening(Tokenizer const& tokenizer, Messages const& messages)
{
    std::string text;
    try
    {
        text = tokenizer.render(messages, true);
    }
    catch (Error const&)
    {
        Messages others;
        std::copy_if(messages.begin(), messages.end(), std::back_inserter(others),
            [](Message const& each) { return each.role != "system"; });
        if (others.empty() || others.size() == messages.size() || !takes(tokenizer, others))
        {
            throw;
        }
        throw Error(SEMKV_BAD_ARGUMENT, "the model's chat template takes no system message")
            .where("system")
            .fix("leave it out, and say it in the prompt");
    }
    return tokenizer.encode(text);
}

std::string beforeUser(Tokenizer const& tokenizer, Messages const& messages)
{
    try
    {
        return messages.empty() ? "" : tokenizer.render(messages, false);
    }
    catch (Error const&)
    {
        // Some templates want a user's message.
        return "";
    }
}

std::string afterReply(Tokenizer const& tokenizer, Messages const& before, Messages const& after)
{
    return behindReply(tokenizer, before, after, true);
}

Ids encodeFollowing(Tokenizer const& tokenizer, std::string const& text)
{
    std::string const before = "x";
    Ids const head = tokenizer.encode(before);
    Ids whole = tokenizer.encode(before + text);
    if (whole.size() >= head.size() && std::equal(head.begin(), head.end(), whole.begin()))
    {
        whole.erase(whole.begin(), whole.begin() + static_cast<ptrdiff_t>(head.size()));
        return whole;
    }
    return tokenizer.encode(text);
}

Ids following(Tokenizer const& tokenizer, Messages const& messages)
{
    auto const last = std::find_if(
        messages.rbegin(), messages.rend(), [](Message const& each) { return each.role == "assistant"; });
    if (last == messages.rend() || last == messages.rbegin())
    {
        throw Error(SEMKV_BAD_ARGUMENT, "no turn that goes on")
            .where("messages")
            .expected("a message of the assistant's, and one after it")
            .got(last == messages.rend() ? "none of the assistant's" : "nothing after it")
            .fix("ask for an opening where there was no reply yet");
    }
    auto const after = last.base();
    return encodeFollowing(tokenizer,
        afterReply(tokenizer, Messages(messages.begin(), after - 1), Messages(after, messages.end())));
}

Ids endIds(Tokenizer const& tokenizer, Detokenizer const& detokenizer)
{
    Messages const asked{{"user", "Hello"}};
    std::string const other = mark({});
    Ids found;
    for (Messages const& after : {Messages{}, Messages{{"user", other}}})
    {
        try
        {
            std::string const text = behindReply(tokenizer, asked, after, false);
            Ids const ids = tokenizer.encode(text.substr(0, text.find(other)));
            auto const end
                = std::find_if(ids.begin(), ids.end(), [&](int32_t id) { return detokenizer.isMarkup(id); });
            if (end != ids.end() && std::find(found.begin(), found.end(), *end) == found.end())
            {
                found.push_back(*end);
            }
        }
        catch (Error const&)
        {
            // Such a conversation the template does not write; the bundle's own ids are there.
        }
    }
    return found;
}
} // namespace semkv::text
