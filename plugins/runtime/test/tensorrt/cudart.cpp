// libcudart in host memory, for tests on machines without a GPU: as strict as a GPU, and of a compute capability that
// the environment says ($SEMKV_FAKE_GPU, 86 for 8.6; none: no GPU), with $SEMKV_FAKE_BYTES of memory. Fresh memory is
// NaN: nothing may rely on cleared one.
#include "fake.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace
{
constexpr int kInvalid = 1, kOutOfMemory = 2, kNoDevice = 100;

std::mutex gLock;
std::map<char const*, size_t> gBlocks;
size_t gBytes = 0;
int gStream = 0;

int number(char const* name, int otherwise)
{
    char const* const text = std::getenv(name);
    return text != nullptr ? std::atoi(text) : otherwise;
}
} // namespace

extern "C" {
bool fake_cuda_holds(void const* address, size_t bytes)
{
    std::lock_guard<std::mutex> const guard(gLock);
    auto const* const from = static_cast<char const*>(address);
    auto const after = gBlocks.upper_bound(from);
    return after != gBlocks.begin() && from + bytes <= std::prev(after)->first + std::prev(after)->second;
}

int cudaGetDeviceCount(int* count)
{
    *count = number("SEMKV_FAKE_GPU", 0) > 0;
    return *count > 0 ? 0 : kNoDevice;
}

int cudaGetDevice(int* device)
{
    *device = 0;
    return 0;
}

int cudaSetDevice(int device)
{
    return device == 0 ? 0 : kInvalid;
}

int cudaDeviceGetAttribute(int* value, int attribute, int device)
{
    int const capability = number("SEMKV_FAKE_GPU", 0);
    *value = attribute == 75 ? capability / 10 : capability % 10;
    return (attribute == 75 || attribute == 76) && device == 0 ? 0 : kInvalid;
}

char const* cudaGetErrorString(int code)
{
    return code == kNoDevice ? "no CUDA-capable device is detected" : "invalid argument";
}

int cudaStreamCreate(void** stream)
{
    *stream = &gStream;
    return 0;
}

int cudaStreamDestroy(void* stream)
{
    return stream == &gStream ? 0 : kInvalid;
}

int cudaStreamSynchronize(void* stream)
{
    return stream == &gStream ? 0 : kInvalid;
}

int cudaMalloc(void** memory, size_t bytes)
{
    std::lock_guard<std::mutex> const guard(gLock);
    size_t const most = static_cast<size_t>(number("SEMKV_FAKE_BYTES", 1 << 30));
    if (bytes == 0 || gBytes + bytes > most)
    {
        return bytes == 0 ? kInvalid : kOutOfMemory;
    }
    auto* const block = static_cast<char*>(std::malloc(bytes));
    std::memset(block, 0xFF, bytes);
    gBlocks[block] = bytes;
    gBytes += bytes;
    *memory = block;
    return 0;
}

int cudaFree(void* memory)
{
    std::lock_guard<std::mutex> const guard(gLock);
    auto const found = gBlocks.find(static_cast<char const*>(memory));
    if (found == gBlocks.end())
    {
        std::fprintf(stderr, "cudaFree of what was not allocated\n");
        std::abort();
    }
    gBytes -= found->second;
    gBlocks.erase(found);
    std::free(memory);
    return 0;
}

int cudaMemcpyAsync(void* to, void const* from, size_t bytes, int kind, void* stream)
{
    void const* const device = kind == 1 ? to : from;
    if ((kind != 1 && kind != 2) || stream != &gStream || !fake_cuda_holds(device, bytes))
    {
        return kInvalid;
    }
    std::memcpy(to, from, bytes);
    return 0;
}

int cudaMemsetAsync(void* memory, int value, size_t bytes, void* stream)
{
    if (stream != &gStream || !fake_cuda_holds(memory, bytes))
    {
        return kInvalid;
    }
    std::memset(memory, value, bytes);
    return 0;
}
}
