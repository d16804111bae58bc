// What kernels with a workspace share: a prefix sum over a block of threads, and the parts of a workspace.
#pragma once

#include "device.cuh"

namespace semkv
{
// Exclusive prefix sum over a block of kBlock threads; `total` gets the sum. `shared` holds kBlock / 32 + 1 ints.
template <int kBlock>
__device__ __forceinline__ int blockScan(int value, int* shared, int& total)
{
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const warp = static_cast<int>(threadIdx.x) / 32;
    int sum = value;
    SEMKV_UNROLL
    for (int delta = 1; delta < 32; delta *= 2)
    {
        int const other = __shfl_up_sync(kFullWarp, sum, delta);
        sum += lane >= delta ? other : 0;
    }
    if (lane == 31)
    {
        shared[warp] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0)
    {
        int running = 0;
        for (int w = 0; w < kBlock / 32; ++w)
        {
            int const own = shared[w];
            shared[w] = running;
            running += own;
        }
        shared[kBlock / 32] = running;
    }
    __syncthreads();
    int const before = shared[warp] + sum - value;
    total = shared[kBlock / 32];
    __syncthreads();
    return before;
}

// Byte offsets of a workspace's parts, each 256-byte aligned.
class Carver
{
public:
    explicit Carver(void* base)
        : mBase(static_cast<unsigned char*>(base))
    {
    }
    template <typename T>
    T* take(size_t elements)
    {
        size_t const at = mUsed;
        mUsed += (elements * sizeof(T) + 255) / 256 * 256;
        return mBase == nullptr ? nullptr : reinterpret_cast<T*>(mBase + at);
    }
    size_t used() const
    {
        return mUsed;
    }

private:
    unsigned char* mBase;
    size_t mUsed{0};
};
} // namespace semkv
