// A Triton request as a turn of the scheduler.
#pragma once

#include "scheduler/turn.h"
#include "text/texts.h"
#include "triton/api.h"

#include <optional>
#include <string>

namespace semkv::runtime
{
// What a request asks for. As semkv_deploy/serve/triton/inputs.py.
struct Asked
{
    std::string session;            // empty: the turn stands alone
    std::optional<Request> request; // none: only that the session ends
    bool stream = true;             // a response a token, or one
};

// Throws SEMKV_BAD_ARGUMENT naming the input that is wrong, and SEMKV_NO_TARGET for texts where there are none.
Asked readRequest(TRITONBACKEND_Request* request, text::Texts const& texts, int64_t mostTokens);

// Throws what an error of Triton's says, if it is one.
void checkTriton(TRITONSERVER_Error* error, char const* where);
} // namespace semkv::runtime
