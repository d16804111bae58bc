#include "triton/request.h"

#include "text/utf8.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <vector>

namespace semkv::runtime
{
namespace
{
constexpr int64_t kDefaultTokens = 256;

struct Tensor
{
    TritonDataType type;
    int64_t count;
    std::string bytes;
};

// The inputs of a request, copied: a buffer may come in pieces.
class Inputs
{
public:
    explicit Inputs(TRITONBACKEND_Request* request)
    {
        uint32_t inputs = 0;
        checkTriton(TRITONBACKEND_RequestInputCount(request, &inputs), "request");
        for (uint32_t i = 0; i < inputs; ++i)
        {
            TRITONBACKEND_Input* input = nullptr;
            checkTriton(TRITONBACKEND_RequestInputByIndex(request, i, &input), "request");
            char const* name = nullptr;
            int64_t const* shape = nullptr;
            uint32_t dimensions = 0, buffers = 0;
            uint64_t bytes = 0;
            Tensor tensor{0, 1, ""};
            checkTriton(
                TRITONBACKEND_InputProperties(input, &name, &tensor.type, &shape, &dimensions, &bytes, &buffers),
                "request");
            for (uint32_t d = 0; d < dimensions; ++d)
            {
                tensor.count *= shape[d];
            }
            for (uint32_t b = 0; b < buffers; ++b)
            {
                void const* data = nullptr;
                uint64_t part = 0;
                TritonMemory memory = kTritonCpu;
                int64_t memoryId = 0;
                checkTriton(TRITONBACKEND_InputBuffer(input, b, &data, &part, &memory, &memoryId), name);
                if (memory != kTritonCpu && memory != kTritonCpu + 1)
                {
                    throw Error(SEMKV_BAD_ARGUMENT, "the input lies in the memory of a GPU")
                        .where(name)
                        .expected("host memory");
                }
                tensor.bytes.append(static_cast<char const*>(data), part);
            }
            mGiven[name] = std::move(tensor);
        }
    }

    bool has(char const* name) const
    {
        return mGiven.count(name) > 0;
    }

    // All elements of an input; none where it is not given.
    template <class Element>
    std::vector<Element> several(char const* name, TritonDataType type) const
    {
        auto const found = mGiven.find(name);
        if (found == mGiven.end())
        {
            return {};
        }
        Tensor const& tensor = found->second;
        if (tensor.type != type || tensor.count < 0
            || tensor.bytes.size() != static_cast<size_t>(tensor.count) * sizeof(Element))
        {
            throw Error(SEMKV_BAD_ARGUMENT, "another type or size than config.pbtxt says").where(name);
        }
        std::vector<Element> elements(static_cast<size_t>(tensor.count));
        std::memcpy(elements.data(), tensor.bytes.data(), tensor.bytes.size());
        return elements;
    }

    // The one element, or none where the input is not given.
    template <class Element>
    std::optional<Element> one(char const* name, TritonDataType type) const
    {
        std::vector<Element> const elements = several<Element>(name, type);
        return checkedOne(name, elements);
    }

    // All strings of an input, UTF-8; they come as their lengths and bytes.
    std::vector<std::string> texts(char const* name) const
    {
        std::vector<std::string> texts;
        std::string const bytes = has(name) ? mGiven.at(name).bytes : "";
        for (size_t at = 0; at < bytes.size();)
        {
            uint32_t length = 0;
            if (bytes.size() - at >= sizeof(length))
            {
                std::memcpy(&length, bytes.data() + at, sizeof(length));
            }
            if (bytes.size() - at < sizeof(length) || bytes.size() - at - sizeof(length) < length)
            {
                throw Error(SEMKV_BAD_ARGUMENT, "not a list of strings").where(name);
            }
            texts.push_back(bytes.substr(at + sizeof(length), length));
            text::requireUtf8(texts.back(), name);
            at += sizeof(length) + length;
        }
        return texts;
    }

    std::optional<std::string> text(char const* name) const
    {
        return checkedOne(name, texts(name));
    }

private:
    template <class Element>
    std::optional<Element> checkedOne(char const* name, std::vector<Element> const& elements) const
    {
        if (has(name) && elements.size() != 1)
        {
            throw Error(SEMKV_BAD_ARGUMENT, "not one element")
                .where(name)
                .expected("1")
                .got(std::to_string(elements.size()));
        }
        return elements.empty() ? std::nullopt : std::optional<Element>(elements.front());
    }

    std::map<std::string, Tensor> mGiven;
};

// The sequence that a request is in, by number or by name; empty: none.
std::string sequenceOf(TRITONBACKEND_Request* request)
{
    uint64_t number = 0;
    TRITONSERVER_Error* const error = TRITONBACKEND_RequestCorrelationId(request, &number);
    if (error == nullptr)
    {
        return number != 0 ? "sequence " + std::to_string(number) : "";
    }
    TRITONSERVER_ErrorDelete(error); // a name, then
    char const* name = nullptr;
    checkTriton(TRITONBACKEND_RequestCorrelationIdString(request, &name), "correlation id");
    return name != nullptr && *name != '\0' ? std::string("sequence ") + name : "";
}

// A text, or messages where it is one of a chat.
void setText(
    Request& turn, std::string text, std::optional<std::string> const& system, bool raw, text::Texts const& texts)
{
    if (!text.empty() || system)
    {
        texts.tokenizer(); // that there is one
    }
    bool const chat = !text.empty() && !raw && texts.hasTemplate();
    if (system && !chat)
    {
        throw Error(SEMKV_BAD_ARGUMENT, "only a chat has a system message")
            .where("system")
            .fix("give text_input, without raw");
    }
    if (!chat)
    {
        turn.text = std::move(text);
        return;
    }
    if (system)
    {
        turn.messages.push_back({"system", *system});
    }
    turn.messages.push_back({"user", std::move(text)});
}

uint64_t anySeed()
{
    std::random_device device;
    return static_cast<uint64_t>(device()) << 32 | device();
}
} // namespace

void checkTriton(TRITONSERVER_Error* error, char const* where)
{
    if (error != nullptr)
    {
        std::string const text = TRITONSERVER_ErrorMessage(error);
        TRITONSERVER_ErrorDelete(error);
        throw Error(SEMKV_RUNTIME, "Triton: " + text).where(where);
    }
}

Asked readRequest(TRITONBACKEND_Request* request, text::Texts const& texts, int64_t mostTokens)
{
    Inputs const inputs(request);
    uint32_t flags = 0;
    checkTriton(TRITONBACKEND_RequestFlags(request, &flags), "request");
    Asked asked;
    std::string const name = inputs.text("session_id").value_or("");
    asked.session = !name.empty() ? name : sequenceOf(request);
    auto const flag = [&](char const* input, bool otherwise) {
        return inputs.one<uint8_t>(input, kTritonBool).value_or(otherwise) != 0;
    };
    bool const start = flag("start_session", (flags & kTritonSequenceStart) != 0);
    bool const end = flag("end_session", (flags & kTritonSequenceEnd) != 0);
    if (asked.session.empty() && (start || end))
    {
        throw Error(SEMKV_BAD_ARGUMENT, "a session begins or ends, and has no name")
            .where("session_id")
            .fix("give session_id, or a correlation id");
    }
    asked.stream = flag("stream", true);
    Ids ids = inputs.several<int64_t>("input_ids", kTritonInt64);
    std::string text = inputs.text("text_input").value_or("");
    if (end && !start && ids.empty() && text.empty())
    {
        return asked;
    }
    if (ids.empty() == text.empty())
    {
        throw Error(SEMKV_BAD_ARGUMENT, "a turn has a text or tokens")
            .where("text_input, input_ids")
            .expected("one of them")
            .got(ids.empty() ? "none" : "both");
    }
    Request turn;
    turn.ids = std::move(ids);
    setText(turn, std::move(text), inputs.text("system"), flag("raw", false), texts);
    auto const most = inputs.one<int32_t>("max_tokens", kTritonInt32);
    turn.maxNewTokens = most ? *most : std::min(kDefaultTokens, mostTokens);
    turn.sampling.temperature = inputs.one<float>("temperature", kTritonFp32).value_or(0);
    turn.sampling.topP = inputs.one<float>("top_p", kTritonFp32).value_or(1);
    turn.sampling.topK = inputs.one<int32_t>("top_k", kTritonInt32).value_or(0);
    auto const seed = inputs.one<uint64_t>("seed", kTritonUint64);
    turn.sampling.seed = seed ? *seed : anySeed();
    turn.stop = inputs.texts("stop");
    turn.stopIds = inputs.several<int64_t>("stop_ids", kTritonInt64);
    turn.start = asked.session.empty() ? std::nullopt : std::optional<bool>(start);
    turn.endSession = end || asked.session.empty();
    asked.request = std::move(turn);
    return asked;
}
} // namespace semkv::runtime
