// The responses of one request: a turn's listener.
#pragma once

#include "scheduler/turn.h"
#include "triton/api.h"

#include <chrono>
#include <string>

namespace semkv::runtime
{
class Responses : public Listener
{
public:
    // Takes the request over: it is released after its last response.
    Responses(TRITONBACKEND_ModelInstance* instance, TRITONBACKEND_Request* request);
    ~Responses() override;

    void piece(Ids const& ids, std::string const& text) noexcept override;
    void finished(Finished const& end) noexcept override;
    bool gone() noexcept override;

    void stream(bool each)
    {
        mStream = each;
    }

    // The only response of a request that ends a session and asks for nothing else.
    void ended() noexcept;

private:
    void send(char const* reason, Finished const* end, TRITONSERVER_Error* error) noexcept;
    void close(bool success) noexcept;

    TRITONBACKEND_ModelInstance* mInstance;
    TRITONBACKEND_Request* mRequest;
    TRITONBACKEND_ResponseFactory* mFactory = nullptr;
    bool mStream = true, mBroken = false;
    Ids mIds; // chosen, and not sent
    std::string mText;
    uint64_t mStart;
};
} // namespace semkv::runtime
