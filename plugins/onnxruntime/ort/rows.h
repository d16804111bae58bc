// Rows that move from an input to an output of its shape, which may be one buffer.
#pragma once

#include "../element.h"
#include "api.h"

#include <cstring>
#include <memory>

namespace semkv::native
{
class Rows
{
public:
    // A row is the last axis of a tensor of rank 4, an element of one of rank 3. Where the output is the input's buffer,
    // rows are read from a copy: they may be wanted in any order.
    Rows(Run const& run, size_t output, Tensor const& input, size_t elementBytes)
        : mBytes(elementBytes * (input.shape.size() == 4 ? static_cast<size_t>(input.shape[3]) : 1))
        , mFrom(static_cast<char const*>(input.data))
        , mTo(static_cast<char*>(run.output(output, input.shape).data))
    {
        if (mTo == mFrom)
        {
            size_t const count = mBytes * static_cast<size_t>(input.shape[0] * input.shape[1] * input.shape[2]);
            mCopy.reset(new char[count]);
            std::memcpy(mCopy.get(), mFrom, count);
            mFrom = mCopy.get();
        }
    }

    void copy(int64_t to, int64_t from, int64_t count = 1) const
    {
        std::memcpy(mTo + static_cast<size_t>(to) * mBytes, mFrom + static_cast<size_t>(from) * mBytes,
            static_cast<size_t>(count) * mBytes);
    }

    void clear(int64_t to, int64_t count) const
    {
        std::memset(mTo + static_cast<size_t>(to) * mBytes, 0, static_cast<size_t>(count) * mBytes);
    }

    void const* from(int64_t row = 0) const { return mFrom + static_cast<size_t>(row) * mBytes; }
    void* to(int64_t row = 0) const { return mTo + static_cast<size_t>(row) * mBytes; }

private:
    size_t mBytes;
    char const* mFrom;
    char* mTo;
    std::unique_ptr<char[]> mCopy;
};
} // namespace semkv::native
