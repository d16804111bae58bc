#include "triton/responses.h"

#include "triton/request.h"

#include <cstring>
#include <string>

namespace semkv::runtime
{
namespace
{
uint64_t nanoseconds()
{
    return static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count());
}

// Responses are sent from the scheduler's thread, which no client's trouble may end.
bool succeeded(TRITONSERVER_Error* error) noexcept
{
    if (error != nullptr)
    {
        TRITONSERVER_LogMessage(kTritonLogError, __FILE__, __LINE__, TRITONSERVER_ErrorMessage(error));
        TRITONSERVER_ErrorDelete(error);
    }
    return error == nullptr;
}

void add(TRITONBACKEND_Response* response, char const* name, TritonDataType type, std::vector<int64_t> const& shape,
    void const* data, size_t bytes)
{
    TRITONBACKEND_Output* output = nullptr;
    checkTriton(TRITONBACKEND_ResponseOutput(
                    response, &output, name, type, shape.data(), static_cast<uint32_t>(shape.size())),
        name);
    void* buffer = nullptr;
    TritonMemory memory = kTritonCpu;
    int64_t memoryId = 0;
    checkTriton(TRITONBACKEND_OutputBuffer(output, &buffer, bytes, &memory, &memoryId), name);
    if (bytes > 0 && (memory != kTritonCpu && memory != kTritonCpu + 1))
    {
        throw Error(SEMKV_RUNTIME, "the output is wanted in the memory of a GPU").where(name).expected("host memory");
    }
    if (bytes > 0)
    {
        std::memcpy(buffer, data, bytes);
    }
}

void addText(TRITONBACKEND_Response* response, char const* name, std::string const& text)
{
    uint32_t const length = static_cast<uint32_t>(text.size());
    std::string bytes(reinterpret_cast<char const*>(&length), sizeof(length));
    bytes += text;
    add(response, name, kTritonBytes, {1}, bytes.data(), bytes.size());
}

TritonCode codeOf(Fault fault)
{
    return fault == Fault::kInvalid   ? kTritonInvalid
        : fault == Fault::kUnknown    ? kTritonNotFound
        : fault == Fault::kUnavailable ? kTritonUnavailable
                                      : kTritonInternal;
}
} // namespace

Responses::Responses(TRITONBACKEND_ModelInstance* instance, TRITONBACKEND_Request* request)
    : mInstance(instance)
    , mRequest(request)
    , mStart(nanoseconds())
{
    checkTriton(TRITONBACKEND_ResponseFactoryNew(&mFactory, request), "request");
}

Responses::~Responses()
{
    if (mRequest != nullptr && mFactory != nullptr)
    {
        // Nobody may wait for ever, whatever became of its turn.
        Finished const lost{Reason::kError, 0, 0, Failure{Fault::kFailed, "the turn was lost."}};
        finished(lost);
    }
}

void Responses::piece(Ids const& ids, std::string const& text) noexcept
{
    mIds.insert(mIds.end(), ids.begin(), ids.end());
    mText += text;
    if (mStream)
    {
        send(nullptr, nullptr, nullptr);
    }
}

void Responses::finished(Finished const& end) noexcept
{
    if (end.reason == Reason::kCancelled)
    {
        send("", &end, TRITONSERVER_ErrorNew(kTritonCancelled, "cancelled"));
    }
    else if (end.reason == Reason::kError)
    {
        bool const known = end.failure.has_value();
        send("", &end,
            TRITONSERVER_ErrorNew(known ? codeOf(end.failure->fault) : kTritonInternal,
                known ? end.failure->text.c_str() : "the turn failed."));
    }
    else
    {
        send(end.reason == Reason::kStop ? "stop" : "length", &end, nullptr);
    }
    close(end.reason == Reason::kStop || end.reason == Reason::kLength);
}

void Responses::ended() noexcept
{
    Finished const end{Reason::kStop, 0, 0, std::nullopt};
    send("ended", &end, nullptr);
    close(true);
}

bool Responses::gone() noexcept
{
    bool cancelled = false;
    return mBroken || (succeeded(TRITONBACKEND_ResponseFactoryIsCancelled(mFactory, &cancelled)) && cancelled);
}

// Sends what was not sent; with an end the last response, or the error in its place.
void Responses::send(char const* reason, Finished const* end, TRITONSERVER_Error* error) noexcept
{
    TRITONBACKEND_Response* response = nullptr;
    uint32_t const flags = end != nullptr ? kTritonFinal : 0;
    bool const made = succeeded(TRITONBACKEND_ResponseNewFromFactory(&response, mFactory));
    try
    {
        if (made && error == nullptr)
        {
            add(response, "output_ids", kTritonInt64, {static_cast<int64_t>(mIds.size())}, mIds.data(),
                mIds.size() * sizeof(int64_t));
            addText(response, "text_output", mText);
            if (end != nullptr)
            {
                addText(response, "finish_reason", reason);
                add(response, "prompt_tokens", kTritonInt64, {1}, &end->promptTokens, sizeof(int64_t));
                add(response, "cached_tokens", kTritonInt64, {1}, &end->cachedTokens, sizeof(int64_t));
            }
        }
    }
    catch (std::exception const& failure)
    {
        error = TRITONSERVER_ErrorNew(kTritonInternal, failure.what());
        mBroken = true;
    }
    mIds.clear();
    mText.clear();
    mBroken = !made || !succeeded(TRITONBACKEND_ResponseSend(response, flags, error)) || mBroken;
    if (error != nullptr)
    {
        TRITONSERVER_ErrorDelete(error);
    }
}

void Responses::close(bool success) noexcept
{
    uint64_t const now = nanoseconds();
    succeeded(TRITONBACKEND_ModelInstanceReportStatistics(mInstance, mRequest, success, mStart, mStart, now, now));
    succeeded(TRITONBACKEND_ResponseFactoryDelete(mFactory));
    succeeded(TRITONBACKEND_RequestRelease(mRequest, kTritonReleaseAll));
    mFactory = nullptr;
    mRequest = nullptr;
}
} // namespace semkv::runtime
