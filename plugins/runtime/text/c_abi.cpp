// The C interface of libsemkv_text: arguments checked, exceptions turned into libsemkv's errors.
#include "c_abi/arguments.h"
#include "semkv/semkv_text.h"
#include "text/texts.h"
#include "text/turns.h"
#include "text/utf8.h"

#include <nlohmann/json.hpp>

#include <cstdlib>
#include <new>

using namespace semkv::text;
using nlohmann::json;
using semkv::runtime::Error;
using semkv::runtime::notNull;
using semkv::runtime::taken;

namespace
{
struct Parts
{
    explicit Parts(std::map<std::string, std::string> files)
        : texts(std::move(files))
    {
    }

    Tokenizer const& tokenizer() const
    {
        return texts.tokenizer();
    }

    Detokenizer const& detokenizer() const
    {
        return *texts.detokenizer();
    }

    Texts texts;
    Ids stops;
};
} // namespace

struct semkv_text
{
    std::shared_ptr<Parts const> parts;
};

struct semkv_text_stream
{
    std::shared_ptr<Parts const> parts;
    Stream stream;
    std::string piece;
};

namespace
{
template <class Code>
semkv_error* guarded(Code const& code) noexcept
{
    try
    {
        code();
        return nullptr;
    }
    catch (Error const& error)
    {
        return semkv_error_new(error.code(), error.what());
    }
    catch (std::bad_alloc const&)
    {
        return semkv_error_new(SEMKV_OUT_OF_MEMORY, "out of memory.");
    }
    catch (std::exception const& error)
    {
        return semkv_error_new(SEMKV_RUNTIME, error.what());
    }
    catch (...)
    {
        return semkv_error_new(SEMKV_RUNTIME, "something was thrown that is no error.");
    }
}

void check(semkv_error* error)
{
    if (error != nullptr)
    {
        std::string message = semkv_error_message(error);
        message.erase(message.find_last_not_of('.') + 1); // Error writes one
        Error const thrown(semkv_error_code(error), message);
        semkv_error_free(error);
        throw thrown;
    }
}

// Memory of C's, which the caller frees.
template <class Element>
Element* copied(Element const* from, size_t count)
{
    void* const memory = std::malloc(std::max<size_t>(1, count * sizeof(Element)));
    if (memory == nullptr)
    {
        throw std::bad_alloc();
    }
    if (count > 0)
    {
        std::memcpy(memory, from, count * sizeof(Element));
    }
    return static_cast<Element*>(memory);
}

void give(Ids const& made, int32_t** ids, size_t* count)
{
    *ids = copied(made.data(), made.size());
    *count = made.size();
}

void give(std::string const& made, char** to, size_t* bytes)
{
    *to = copied(made.c_str(), made.size() + 1);
    *bytes = made.size();
}

std::vector<Message> listOf(semkv_message const* messages, size_t count)
{
    if (count > 0)
    {
        notNull(messages, "messages");
    }
    std::vector<Message> list;
    for (size_t i = 0; i < count; ++i)
    {
        notNull(messages[i].role, "messages[].role");
        notNull(messages[i].content, "messages[].content");
        list.push_back({messages[i].role, messages[i].content});
    }
    return list;
}

std::string readFrom(semkv_bundle const* bundle, std::string const& name)
{
    char const* data = nullptr;
    size_t bytes = 0;
    check(semkv_bundle_read(bundle, name.c_str(), &data, &bytes));
    return std::string(data, bytes);
}

// Ids that end a reply, of all contracts: they are the model's, and the same in each.
Ids stopsOf(json const& manifest)
{
    Ids stops;
    for (json const& target : manifest.at("targets"))
    {
        for (json const& budget : target.at("budgets"))
        {
            for (int32_t const id : budget.at("contract").at("stop_ids"))
            {
                if (std::find(stops.begin(), stops.end(), id) == stops.end())
                {
                    stops.push_back(id);
                }
            }
        }
    }
    return stops;
}
} // namespace

extern "C" {
semkv_error* semkv_text_open(semkv_bundle const* bundle, semkv_text_options const* given, semkv_text** out)
{
    return guarded([&] {
        notNull(bundle, "bundle");
        notNull(out, "out");
        semkv_text_options const options = taken(given, "options");
        char const* const manifest = semkv_bundle_manifest(bundle);
        auto parts = std::make_shared<Parts>(
            tokenizerFiles(manifest, [&](std::string const& name) { return readFrom(bundle, name); }));
        parts->texts.load(semkv::runtime::text(options.genai), semkv::runtime::text(options.onnxruntime));
        parts->stops = stopsOf(json::parse(manifest));
        for (int32_t const id : parts->texts.ends())
        {
            if (std::find(parts->stops.begin(), parts->stops.end(), id) == parts->stops.end())
            {
                parts->stops.push_back(id);
            }
        }
        *out = new semkv_text{std::move(parts)};
    });
}

void semkv_text_close(semkv_text* text)
{
    delete text;
}

void semkv_text_free(void* memory)
{
    std::free(memory);
}

semkv_error* semkv_text_encode(semkv_text const* text, char const* from, int32_t** ids, size_t* count)
{
    return guarded([&] {
        notNull(text, "text");
        notNull(from, "from");
        notNull(ids, "ids");
        notNull(count, "count");
        give(text->parts->tokenizer().encode(from), ids, count);
    });
}

semkv_error* semkv_text_decode(semkv_text const* text, int32_t const* ids, size_t count, char** to, size_t* bytes)
{
    return guarded([&] {
        notNull(text, "text");
        notNull(count > 0 ? ids : static_cast<void const*>(text), "ids");
        notNull(to, "to");
        notNull(bytes, "bytes");
        std::string all;
        for (size_t i = 0; i < count; ++i)
        {
            all += text->parts->detokenizer().bytes(ids[i]);
        }
        auto const characters = charactersOf(all);
        give(textOf(all, characters, characters.size()), to, bytes);
    });
}

semkv_error* semkv_text_stop_ids(semkv_text const* text, int32_t** ids, size_t* count)
{
    return guarded([&] {
        notNull(text, "text");
        notNull(ids, "ids");
        notNull(count, "count");
        give(text->parts->stops, ids, count);
    });
}

semkv_error* semkv_text_stream_open(semkv_text const* text, semkv_text_stream** out)
{
    return guarded([&] {
        notNull(text, "text");
        notNull(out, "out");
        *out = new semkv_text_stream{text->parts, {}, {}};
    });
}

void semkv_text_stream_close(semkv_text_stream* stream)
{
    delete stream;
}

semkv_error* semkv_text_stream_push(semkv_text_stream* stream, int32_t token, char const** piece, size_t* bytes)
{
    return guarded([&] {
        notNull(stream, "stream");
        notNull(piece, "piece");
        notNull(bytes, "bytes");
        stream->piece = stream->stream.push(stream->parts->detokenizer().bytes(token));
        *piece = stream->piece.c_str();
        *bytes = stream->piece.size();
    });
}

semkv_error* semkv_text_stream_flush(semkv_text_stream* stream, char const** piece, size_t* bytes)
{
    return guarded([&] {
        notNull(stream, "stream");
        notNull(piece, "piece");
        notNull(bytes, "bytes");
        stream->piece = stream->stream.flush();
        *piece = stream->piece.c_str();
        *bytes = stream->piece.size();
    });
}

semkv_error* semkv_text_render(semkv_text const* text, semkv_message const* messages, size_t count, int32_t prompt,
    char** to, size_t* bytes)
{
    return guarded([&] {
        notNull(text, "text");
        notNull(to, "to");
        notNull(bytes, "bytes");
        give(text->parts->tokenizer().render(listOf(messages, count), prompt != 0), to, bytes);
    });
}

semkv_error* semkv_text_opening(
    semkv_text const* text, semkv_message const* messages, size_t count, int32_t** ids, size_t* ids_count)
{
    return guarded([&] {
        notNull(text, "text");
        notNull(ids, "ids");
        notNull(ids_count, "ids_count");
        give(opening(text->parts->tokenizer(), listOf(messages, count)), ids, ids_count);
    });
}

semkv_error* semkv_text_following(
    semkv_text const* text, semkv_message const* messages, size_t count, int32_t** ids, size_t* ids_count)
{
    return guarded([&] {
        notNull(text, "text");
        notNull(ids, "ids");
        notNull(ids_count, "ids_count");
        give(following(text->parts->tokenizer(), listOf(messages, count)), ids, ids_count);
    });
}
}
