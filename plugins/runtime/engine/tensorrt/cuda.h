// CUDA's runtime from a library that is loaded at run time: memory of a GPU, and a stream of work on it.
#pragma once

#include "common/tensor.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace semkv::runtime
{
// The calling thread's current device as it is when this is made; `use` makes it the calling thread's.
class Cuda
{
public:
    // Loads libcudart: from the caller's path, else $SEMKV_CUDART, else as the loader finds it; never unloaded. Throws
    // SEMKV_NO_TARGET where there is none, and where it finds no GPU.
    static std::shared_ptr<Cuda const> load(std::string const& path, std::string const& target);
    ~Cuda();

    void use() const;

    // 86 for 8.6.
    int64_t computeCapability() const
    {
        return mCapability;
    }

    void* stream() const
    {
        return mStream;
    }

    // In the stream, from and to host memory that stays until `wait` returns.
    void copyIn(void* device, void const* host, size_t bytes) const;
    void copyOut(void* host, void const* device, size_t bytes) const;
    void clear(void* device, size_t bytes) const;
    void wait() const;

    void* allocate(size_t bytes) const;
    void release(void* device) const;

private:
    Cuda() = default;
    void check(int code, char const* what) const;

    struct Functions
    {
        int (*getDeviceCount)(int*);
        int (*getDevice)(int*);
        int (*setDevice)(int);
        int (*deviceGetAttribute)(int*, int, int);
        char const* (*getErrorString)(int);
        int (*streamCreate)(void**);
        int (*streamDestroy)(void*);
        int (*streamSynchronize)(void*);
        int (*malloc)(void**, size_t);
        int (*free)(void*);
        int (*memcpyAsync)(void*, void const*, size_t, int, void*);
        int (*memsetAsync)(void*, int, size_t, void*);
    };

    Functions mCall{};
    int mDevice = 0;
    int64_t mCapability = 0;
    void* mStream = nullptr;
};

// Zeroed memory of the GPU, freed with its owner.
class DeviceMemory
{
public:
    DeviceMemory() = default;
    DeviceMemory(std::shared_ptr<Cuda const> cuda, size_t bytes);
    DeviceMemory(DeviceMemory const&) = delete;
    DeviceMemory& operator=(DeviceMemory const&) = delete;
    DeviceMemory(DeviceMemory&& other) noexcept;
    DeviceMemory& operator=(DeviceMemory&& other) noexcept;
    ~DeviceMemory();

    char* data() const
    {
        return mData;
    }

    size_t bytes() const
    {
        return mBytes;
    }

private:
    std::shared_ptr<Cuda const> mCuda;
    char* mData = nullptr;
    size_t mBytes = 0;
};
} // namespace semkv::runtime
