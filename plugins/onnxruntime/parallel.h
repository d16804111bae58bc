// Runs numbered, independent pieces of work, on whatever threads the host has.
#pragma once

#include <cstddef>

namespace semkv::native
{
struct Parallel
{
    // Calls work(data, 0) … work(data, count - 1) and returns when all are done.
    void (*run)(void const* host, size_t count, void (*work)(void* data, size_t piece), void* data);
    void const* host;

    template <class Work>
    void operator()(size_t count, Work const& work) const
    {
        if (count == 1)
        {
            work(size_t{0});
        }
        else if (count > 1)
        {
            auto const call = [](void* data, size_t piece) { (*static_cast<Work const*>(data))(piece); };
            run(host, count, call, const_cast<void*>(static_cast<void const*>(&work)));
        }
    }
};
} // namespace semkv::native
