// semkv_text.h for C++17: handles that close themselves, and errors as exceptions. Header only.
#pragma once

#include "semkv/semkv.hpp"
#include "semkv/semkv_text.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace semkv
{
struct TextOptions
{
    std::string genai;       // libonnxruntime-genai's path; empty: $SEMKV_GENAI, else the loader's
    std::string onnxruntime; // libonnxruntime's path; empty: $SEMKV_ONNXRUNTIME, else the loader's
};

struct Message
{
    std::string role, content;
};

using Messages = std::vector<Message>;

// A reply's text as its tokens come, whole characters all.
class TextStream
{
public:
    explicit TextStream(semkv_text_stream* stream)
        : mStream(stream, semkv_text_stream_close)
    {
    }

    // What has become certain with the token: often nothing.
    std::string push(int32_t token)
    {
        char const* piece = nullptr;
        size_t bytes = 0;
        check(semkv_text_stream_push(mStream.get(), token, &piece, &bytes));
        return {piece, bytes};
    }

    // The rest at the reply's end. The stream is then as new.
    std::string flush()
    {
        char const* piece = nullptr;
        size_t bytes = 0;
        check(semkv_text_stream_flush(mStream.get(), &piece, &bytes));
        return {piece, bytes};
    }

private:
    std::unique_ptr<semkv_text_stream, void (*)(semkv_text_stream*)> mStream;
};

// A bundle's tokenizer and chat template. Copies share it; threads may.
class Text
{
public:
    explicit Text(Bundle const& bundle, TextOptions const& options = {})
        : mText(nullptr, semkv_text_close)
    {
        semkv_text_options given{};
        given.size = sizeof(given);
        given.genai = options.genai.empty() ? nullptr : options.genai.c_str();
        given.onnxruntime = options.onnxruntime.empty() ? nullptr : options.onnxruntime.c_str();
        semkv_text* opened = nullptr;
        check(semkv_text_open(bundle.get(), &given, &opened));
        mText.reset(opened, semkv_text_close);
    }

    Ids encode(std::string const& text) const
    {
        return taken([&](int32_t** ids, size_t* count) {
            return semkv_text_encode(mText.get(), whole(text), ids, count);
        });
    }

    std::string decode(Ids const& ids) const
    {
        return written([&](char** text, size_t* bytes) {
            return semkv_text_decode(mText.get(), ids.data(), ids.size(), text, bytes);
        });
    }

    Ids stopIds() const
    {
        return taken([&](int32_t** ids, size_t* count) { return semkv_text_stop_ids(mText.get(), ids, count); });
    }

    TextStream stream() const
    {
        semkv_text_stream* opened = nullptr;
        check(semkv_text_stream_open(mText.get(), &opened));
        return TextStream(opened);
    }

    std::string render(Messages const& messages, bool prompt) const
    {
        auto const views = viewed(messages);
        return written([&](char** text, size_t* bytes) {
            return semkv_text_render(mText.get(), views.data(), views.size(), prompt ? 1 : 0, text, bytes);
        });
    }

    // Ids to append before the first reply.
    Ids opening(Messages const& messages) const
    {
        auto const views = viewed(messages);
        return taken([&](int32_t** ids, size_t* count) {
            return semkv_text_opening(mText.get(), views.data(), views.size(), ids, count);
        });
    }

    // Ids to append before the next reply: behind the assistant's last message, which the cache has.
    Ids following(Messages const& messages) const
    {
        auto const views = viewed(messages);
        return taken([&](int32_t** ids, size_t* count) {
            return semkv_text_following(mText.get(), views.data(), views.size(), ids, count);
        });
    }

private:
    // C's strings end at a 0: cut off there, a text would be another one.
    static char const* whole(std::string const& text)
    {
        if (text.find('\0') != std::string::npos)
        {
            throw Error(SEMKV_BAD_ARGUMENT, "text: a wrong argument (expected no character 0, got one).");
        }
        return text.c_str();
    }

    static std::vector<semkv_message> viewed(Messages const& messages)
    {
        std::vector<semkv_message> views;
        for (Message const& message : messages)
        {
            views.push_back({whole(message.role), whole(message.content)});
        }
        return views;
    }

    template <class Call>
    static Ids taken(Call const& call)
    {
        int32_t* ids = nullptr;
        size_t count = 0;
        check(call(&ids, &count));
        std::unique_ptr<int32_t, void (*)(void*)> const owned(ids, semkv_text_free);
        return Ids(ids, ids + count);
    }

    template <class Call>
    static std::string written(Call const& call)
    {
        char* text = nullptr;
        size_t bytes = 0;
        check(call(&text, &bytes));
        std::unique_ptr<char, void (*)(void*)> const owned(text, semkv_text_free);
        return {text, bytes};
    }

    std::shared_ptr<semkv_text> mText;
};
} // namespace semkv
