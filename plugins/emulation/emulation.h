// A small emulation of the CUDA features that the semkv kernels use, so that the same .cu files compile with g++ and
// run on a CPU under the address and undefined-behaviour sanitizers.
//
// One block runs at a time, on the calling thread; each CUDA thread is a fiber. The order of blocks, warps and lanes is
// shuffled by a seed, so that code which needs a barrier that is not there fails for some seed. Shared memory starts as
// 0xFF (NaN). Warps advance in turns, from one collective to the next. A barrier that not all threads of the block (or
// lanes of the warp) reach, or that they meet at different places of the source, ends the process with a message; so
// does more shared memory than a kernel gets without asking.
// Not emulated: static __shared__ arrays, warp operations on part of a warp, concurrent blocks, streams (all calls are
// synchronous), textures. Of mma there is m16n8k16 with float32 accumulators (mma.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define SEMKV_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3
{
    unsigned x, y, z;
};
struct dim3
{
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1)
        : x(x_)
        , y(y_)
        , z(z_)
    {
    }
};
struct alignas(8) uint2
{
    unsigned x, y;
};
struct alignas(16) uint4
{
    unsigned x, y, z, w;
};
struct alignas(8) float2
{
    float x, y;
};
struct alignas(16) float4
{
    float x, y, z, w;
};

enum cudaError_t
{
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorNotSupported = 801,
};
struct CUstream_st;
struct CUevent_st;
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
enum cudaMemcpyKind
{
    cudaMemcpyDeviceToDevice = 3,
};
enum cudaDeviceAttr
{
    cudaDevAttrMultiProcessorCount = 16,
};

inline char const* cudaGetErrorString(cudaError_t error)
{
    return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "not supported";
}
inline cudaError_t cudaGetLastError()
{
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, void const* from, size_t bytes, cudaMemcpyKind, cudaStream_t)
{
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t)
{
    std::memset(to, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device)
{
    *device = 0;
    return cudaSuccess;
}
// A small odd number of multiprocessors, so that the tests see both one split and several.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int)
{
    *value = 7;
    return cudaSuccess;
}

namespace semkv::emulation
{
// Sets the seed that orders blocks, warps and lanes from here on (0: natural order).
void setSchedule(uint64_t seed);

// The architecture that kernels claim to be built for, as in __CUDA_ARCH__ / 10.
inline int& architecture()
{
    static int value = 80;
    return value;
}

void launch(dim3 grid, dim3 block, size_t sharedBytes, std::function<void()> const& kernel);
// Grids of the launches since the last call.
std::vector<dim3> takeGrids();

struct Coordinates
{
    uint3 thread;
    uint3 block;
    dim3 blockDim;
    dim3 gridDim;
};
Coordinates const& here();
unsigned char* sharedMemory();
// A line of a kernel. As a default argument, that of the call.
struct Place
{
    char const* file;
    int line;
    static constexpr Place here(char const* file = __builtin_FILE(), int line = __builtin_LINE())
    {
        return {file, line};
    }
};
// The collective that the running thread enters: all that wait at one barrier must have come by the same.
void enter(Place place);
void blockBarrier();
int blockBarrierOr(int predicate);
void warpBarrier();
// Each lane gives words and sees those of all lanes, until its exchange after the next.
struct LaneWords
{
    uint32_t word[6];
};
LaneWords const* warpShare(LaneWords const& own);
unsigned warpBallot(bool predicate);

template <typename T>
T shuffle(T value, int source)
{
    static_assert(sizeof(T) <= 8);
    LaneWords words{};
    std::memcpy(words.word, &value, sizeof(T));
    std::memcpy(&value, warpShare(words)[source].word, sizeof(T));
    return value;
}
inline int lane()
{
    return static_cast<int>(here().thread.x & 31U);
}
inline void fullMaskOnly(unsigned mask)
{
    if (mask != 0xFFFFFFFFU)
    {
        std::fprintf(stderr, "emulation: warp operations on part of a warp are not supported (mask %08x)\n", mask);
        std::abort();
    }
}
} // namespace semkv::emulation

struct cudaFuncAttributes
{
    int ptxVersion;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*)
{
    attributes->ptxVersion = semkv::emulation::architecture();
    return cudaSuccess;
}

#define threadIdx (::semkv::emulation::here().thread)
#define blockIdx (::semkv::emulation::here().block)
#define blockDim (::semkv::emulation::here().blockDim)
#define gridDim (::semkv::emulation::here().gridDim)

inline void __syncthreads(semkv::emulation::Place place = semkv::emulation::Place::here())
{
    semkv::emulation::enter(place);
    semkv::emulation::blockBarrier();
}
inline int __syncthreads_or(int predicate, semkv::emulation::Place place = semkv::emulation::Place::here())
{
    semkv::emulation::enter(place);
    return semkv::emulation::blockBarrierOr(predicate);
}
inline void __syncwarp(
    unsigned mask = 0xFFFFFFFFU, semkv::emulation::Place place = semkv::emulation::Place::here())
{
    semkv::emulation::enter(place);
    semkv::emulation::fullMaskOnly(mask);
    semkv::emulation::warpBarrier();
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int laneMask, semkv::emulation::Place place = semkv::emulation::Place::here())
{
    semkv::emulation::enter(place);
    semkv::emulation::fullMaskOnly(mask);
    return semkv::emulation::shuffle(value, semkv::emulation::lane() ^ laneMask);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, semkv::emulation::Place place = semkv::emulation::Place::here())
{
    semkv::emulation::enter(place);
    semkv::emulation::fullMaskOnly(mask);
    return semkv::emulation::shuffle(value, source & 31);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, semkv::emulation::Place place = semkv::emulation::Place::here())
{
    semkv::emulation::enter(place);
    semkv::emulation::fullMaskOnly(mask);
    int const source = semkv::emulation::lane() - delta;
    T const got = semkv::emulation::shuffle(value, source < 0 ? semkv::emulation::lane() : source);
    return got;
}
inline unsigned __ballot_sync(
    unsigned mask, int predicate, semkv::emulation::Place place = semkv::emulation::Place::here())
{
    semkv::emulation::enter(place);
    semkv::emulation::fullMaskOnly(mask);
    return semkv::emulation::warpBallot(predicate != 0);
}

inline int __popcll(unsigned long long v)
{
    return __builtin_popcountll(v);
}
inline int __clzll(long long v)
{
    return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v));
}
inline unsigned long long __brevll(unsigned long long v)
{
    unsigned long long reversed = 0;
    for (int bit = 0; bit < 64; ++bit)
    {
        reversed |= (v >> bit & 1ULL) << (63 - bit);
    }
    return reversed;
}
inline int __ffsll(long long v)
{
    return __builtin_ffsll(v);
}
inline int atomicAdd(int* address, int value)
{
    int const old = *address;
    *address = old + value;
    return old;
}
inline float atomicAdd(float* address, float value)
{
    float const old = *address;
    *address = old + value;
    return old;
}
// Each of the selector's four low nibbles names the byte of (y, x) that goes there.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector)
{
    uint64_t const bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned out = 0;
    for (unsigned i = 0; i < 4; ++i)
    {
        unsigned const from = selector >> 4 * i & 7U;
        out |= static_cast<unsigned>(bytes >> 8 * from & 0xFFU) << 8 * i;
    }
    return out;
}
inline float __int_as_float(int v)
{
    float f;
    std::memcpy(&f, &v, 4);
    return f;
}
inline float __uint_as_float(unsigned v)
{
    float f;
    std::memcpy(&f, &v, 4);
    return f;
}
inline unsigned __float_as_uint(float v)
{
    unsigned u;
    std::memcpy(&u, &v, 4);
    return u;
}
using std::max;
using std::min;
