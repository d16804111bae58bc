#include "memory.h"

#include "harness.h"

#include <algorithm>
#include <cstdlib>

namespace harness
{
namespace
{
#if defined(SEMKV_EMULATED)
void* allocate(size_t bytes)
{
    void* memory = nullptr;
    CHECK(posix_memalign(&memory, 256, bytes) == 0);
    return memory;
}
#else
void* allocate(size_t bytes)
{
    void* memory = nullptr;
    CHECK(bytes == 0 || cudaMalloc(&memory, bytes) == cudaSuccess);
    return memory;
}
#endif
} // namespace

Memory::Memory(size_t bytes)
    : Memory(std::vector<unsigned char>(bytes, 0xFF))
{
}

Memory::Memory(std::vector<unsigned char> const& content)
    : mData(allocate(content.size()))
    , mBytes(content.size())
{
#if defined(SEMKV_EMULATED)
    std::copy(content.begin(), content.end(), static_cast<unsigned char*>(mData));
#else
    CHECK(mBytes == 0 || cudaMemcpy(mData, content.data(), mBytes, cudaMemcpyHostToDevice) == cudaSuccess);
    // The copy may have returned before its end, and streams of kernels do not wait for it.
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
#endif
}

Memory::Memory(Memory&& other) noexcept
    : mData(other.mData)
    , mBytes(other.mBytes)
{
    other.mData = nullptr;
}

Memory::~Memory()
{
#if defined(SEMKV_EMULATED)
    std::free(mData);
#else
    static_cast<void>(cudaFree(mData));
#endif
}

std::vector<unsigned char> Memory::content() const
{
    std::vector<unsigned char> bytes(mBytes);
#if defined(SEMKV_EMULATED)
    std::copy_n(static_cast<unsigned char const*>(mData), mBytes, bytes.begin());
#else
    CHECK(mBytes == 0 || cudaMemcpy(bytes.data(), mData, mBytes, cudaMemcpyDeviceToHost) == cudaSuccess);
#endif
    return bytes;
}

#if defined(SEMKV_EMULATED)
std::string noDevice()
{
    return "";
}

Stream::Stream() = default;
Stream::~Stream() = default;
void Stream::synchronise() const
{
}
#else
std::string noDevice()
{
    int count = 0;
    cudaError_t const error = cudaGetDeviceCount(&count);
    return error != cudaSuccess ? cudaGetErrorString(error) : count == 0 ? "no device" : "";
}

Stream::Stream()
{
    CHECK(cudaStreamCreateWithFlags(&mStream, cudaStreamNonBlocking) == cudaSuccess);
}

Stream::~Stream()
{
    static_cast<void>(cudaStreamDestroy(mStream));
}

void Stream::synchronise() const
{
    cudaError_t const error = cudaStreamSynchronize(mStream);
    if (error != cudaSuccess)
    {
        std::printf("CUDA: %s\n", cudaGetErrorString(error));
    }
    CHECK(error == cudaSuccess);
}
#endif
} // namespace harness
