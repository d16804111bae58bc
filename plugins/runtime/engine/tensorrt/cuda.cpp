#include "engine/tensorrt/cuda.h"

#include "common/error.h"
#include "common/load_first.h"

#include <algorithm>
#include <new>
#include <utility>
#include <vector>

#include <dlfcn.h>

namespace semkv::runtime
{
namespace
{
// Of cudaError_t, cudaDeviceAttr and cudaMemcpyKind.
constexpr int kOutOfMemory = 2;
constexpr int kMajor = 75, kMinor = 76;
constexpr int kHostToDevice = 1, kDeviceToHost = 2;

Error missing(std::string const& target, std::string const& what)
{
    return Error(SEMKV_NO_TARGET, what).where("target " + target);
}

void* opened(std::string const& given, std::string const& target)
{
    std::string errors;
    // Streams and memory are the driver's, so any runtime does, whichever TensorRT was built with.
    if (void* const handle
        = loadFirst(given, "SEMKV_CUDART", {"libcudart.so.13", "libcudart.so.12", "libcudart.so"}, errors))
    {
        return handle;
    }
    throw missing(target, "CUDA's runtime library does not load")
        .got(errors)
        .fix("give the path of libcudart.so.12 or libcudart.so.13, or set SEMKV_CUDART to it");
}
} // namespace

std::shared_ptr<Cuda const> Cuda::load(std::string const& path, std::string const& target)
{
    void* const handle = opened(path, target);
    std::shared_ptr<Cuda> const cuda(new Cuda());
    Functions& call = cuda->mCall;
    auto const take = [&](auto& function, char const* name) {
        function = reinterpret_cast<std::decay_t<decltype(function)>>(::dlsym(handle, name));
        if (function == nullptr)
        {
            throw missing(target, "the library is not CUDA's runtime")
                .expected(name)
                .got("a library without")
                .fix("give the path of libcudart.so.12 or libcudart.so.13, or set SEMKV_CUDART to it");
        }
    };
    take(call.getDeviceCount, "cudaGetDeviceCount");
    take(call.getDevice, "cudaGetDevice");
    take(call.setDevice, "cudaSetDevice");
    take(call.deviceGetAttribute, "cudaDeviceGetAttribute");
    take(call.getErrorString, "cudaGetErrorString");
    take(call.streamCreate, "cudaStreamCreate");
    take(call.streamDestroy, "cudaStreamDestroy");
    take(call.streamSynchronize, "cudaStreamSynchronize");
    take(call.malloc, "cudaMalloc");
    take(call.free, "cudaFree");
    take(call.memcpyAsync, "cudaMemcpyAsync");
    take(call.memsetAsync, "cudaMemsetAsync");
    int count = 0;
    int const code = call.getDeviceCount(&count);
    if (code != 0 || count < 1)
    {
        throw missing(target, "there is no GPU that CUDA can use here")
            .expected("an NVIDIA GPU and its driver")
            .got(code != 0 ? call.getErrorString(code) : "none")
            .fix("run where there is one, or build the bundle for onnxruntime-cpu");
    }
    int major = 0, minor = 0;
    cuda->check(call.getDevice(&cuda->mDevice), "give its device");
    cuda->check(call.deviceGetAttribute(&major, kMajor, cuda->mDevice), "tell its compute capability");
    cuda->check(call.deviceGetAttribute(&minor, kMinor, cuda->mDevice), "tell its compute capability");
    cuda->mCapability = 10 * major + minor;
    cuda->check(call.streamCreate(&cuda->mStream), "make a stream");
    return cuda;
}

Cuda::~Cuda()
{
    if (mStream != nullptr)
    {
        mCall.streamDestroy(mStream);
    }
}

void Cuda::check(int code, char const* what) const
{
    if (code == kOutOfMemory)
    {
        throw std::bad_alloc();
    }
    if (code != 0)
    {
        throw Error(SEMKV_RUNTIME, std::string("CUDA does not ") + what).got(mCall.getErrorString(code));
    }
}

void Cuda::use() const
{
    check(mCall.setDevice(mDevice), "take its device");
}

void Cuda::copyIn(void* device, void const* host, size_t bytes) const
{
    if (bytes > 0)
    {
        check(mCall.memcpyAsync(device, host, bytes, kHostToDevice, mStream), "copy to the GPU");
    }
}

void Cuda::copyOut(void* host, void const* device, size_t bytes) const
{
    if (bytes > 0)
    {
        check(mCall.memcpyAsync(host, device, bytes, kDeviceToHost, mStream), "copy from the GPU");
    }
}

void Cuda::clear(void* device, size_t bytes) const
{
    check(mCall.memsetAsync(device, 0, bytes, mStream), "clear memory of the GPU");
}

void Cuda::wait() const
{
    check(mCall.streamSynchronize(mStream), "end what it was given");
}

void* Cuda::allocate(size_t bytes) const
{
    void* memory = nullptr;
    check(mCall.malloc(&memory, bytes), "allocate memory of the GPU");
    return memory;
}

void Cuda::release(void* device) const
{
    mCall.free(device);
}

DeviceMemory::DeviceMemory(std::shared_ptr<Cuda const> cuda, size_t bytes)
    : mCuda(std::move(cuda))
    , mData(static_cast<char*>(mCuda->allocate(std::max<size_t>(bytes, 1))))
    , mBytes(bytes)
{
    try
    {
        mCuda->clear(mData, std::max<size_t>(bytes, 1));
    }
    catch (...)
    {
        mCuda->release(mData);
        throw;
    }
}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : mCuda(std::move(other.mCuda))
    , mData(std::exchange(other.mData, nullptr))
    , mBytes(std::exchange(other.mBytes, 0))
{
}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept
{
    std::swap(mCuda, other.mCuda);
    std::swap(mData, other.mData);
    std::swap(mBytes, other.mBytes);
    return *this;
}

DeviceMemory::~DeviceMemory()
{
    if (mData != nullptr)
    {
        mCuda->release(mData);
    }
}
} // namespace semkv::runtime
