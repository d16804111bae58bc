// Memory that kernels work on: the host's in the emulated build, a GPU's in the other.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>
#include <vector>

namespace harness
{
// Empty when kernels can run here, else what is missing.
std::string noDevice();

// Exactly as many bytes as asked for, 256-byte aligned as TensorRT's are, so that a sanitizer sees an access past the end.
class Memory
{
public:
    // Filled with 0xFF (NaN).
    explicit Memory(size_t bytes);
    explicit Memory(std::vector<unsigned char> const& content);
    Memory(Memory&& other) noexcept;
    Memory(Memory const&) = delete;
    Memory& operator=(Memory const&) = delete;
    ~Memory();
    void* data() const
    {
        return mData;
    }
    std::vector<unsigned char> content() const;

private:
    void* mData;
    size_t mBytes;
};

class Stream
{
public:
    Stream();
    Stream(Stream const&) = delete;
    Stream& operator=(Stream const&) = delete;
    ~Stream();
    cudaStream_t get() const
    {
        return mStream;
    }
    void synchronise() const;

private:
    cudaStream_t mStream{nullptr};
};
} // namespace harness
