// Merges the splits of a query row. The number of splits is up to 128 and each is one float4 of a thread, so what counts is
// how many loads are on their way at a time.
#include "nexus_attention_finish.cuh"
#include "nexus_attention_launch.cuh"

namespace semkv::nexus
{
namespace
{
constexpr int kInFlight = 4;
static_assert(kThreads >= kMostSplits);

// Over the threads of a block; `shared` holds kWarps floats.
template <typename Combine>
__device__ __forceinline__ float overBlock(float value, float* shared, Combine const& combine)
{
    SEMKV_UNROLL
    for (int offset = 16; offset > 0; offset /= 2)
    {
        value = combine(value, __shfl_xor_sync(kFullWarp, value, offset));
    }
    if (threadIdx.x % 32 == 0)
    {
        shared[threadIdx.x / 32] = value;
    }
    __syncthreads();
    value = shared[0];
    SEMKV_UNROLL
    for (int warp = 1; warp < kWarps; ++warp)
    {
        value = combine(value, shared[warp]);
    }
    __syncthreads();
    return value;
}

// Grid: rows of one KV head, KV heads, batch. A thread has one split's maximum and weight; then the block is cut into
// parts, each of which sums every parts-th split, four dimensions a thread.
__global__ void __launch_bounds__(kThreads) mergeKernel(Plan const plan)
{
    SEMKV_SHARED_BYTES(bytes);
    float* const shrinks = reinterpret_cast<float*>(bytes);
    float* const sums = shrinks + kThreads;

    NexusAttentionParams const& call = plan.call;
    int const thread = static_cast<int>(threadIdx.x);
    int const row = static_cast<int>(blockIdx.x);
    int64_t const head = static_cast<int64_t>(blockIdx.z) * call.kvHeads + blockIdx.y;
    int64_t const given = call.length[blockIdx.z];
    if (!lengthFits(plan, given))
    {
        return;
    }
    int const active = slotRange(plan, static_cast<int>(given), row / plan.rowTile, 0).active;
    if (active == 1)
    {
        return;
    }
    int64_t const outputRow = head * plan.queries + row;
    float const* const scales = partialScales(plan, outputRow);
    float const maximum = thread < active ? scales[2 * thread] : minusInfinity();
    float const weight = thread < active ? scales[2 * thread + 1] : 0.0F;
    float const highest = overBlock(maximum, sums, [](float a, float b) { return fmaxf(a, b); });
    // With nothing but -inf this is NaN, as softmax over nothing is.
    float const shrink = exp2f(maximum - highest);
    shrinks[thread] = shrink;
    float const all = overBlock(weight * shrink, sums, [](float a, float b) { return a + b; });

    int const pieces = call.headSize / 4;
    int const parts = kThreads / pieces;
    int const part = thread / pieces;
    int const piece = thread % pieces;
    if (part < parts)
    {
        float4 const* const source = reinterpret_cast<float4 const*>(partialSums(plan, outputRow)) + piece;
        float4 total{0.0F, 0.0F, 0.0F, 0.0F};
        for (int split = part; split < active; split += parts * kInFlight)
        {
            float4 v[kInFlight];
            SEMKV_UNROLL
            for (int i = 0; i < kInFlight; ++i)
            {
                int const s = split + i * parts;
                v[i] = s < active ? source[s * pieces] : float4{0.0F, 0.0F, 0.0F, 0.0F};
            }
            SEMKV_UNROLL
            for (int i = 0; i < kInFlight; ++i)
            {
                int const s = split + i * parts;
                total = plusScaled(total, v[i], s < active ? shrinks[s] : 0.0F);
            }
        }
        reinterpret_cast<float4*>(sums)[thread] = total;
    }
    __syncthreads();
    if (thread < pieces)
    {
        float4 total = reinterpret_cast<float4 const*>(sums)[thread];
        for (int p = 1; p < parts; ++p)
        {
            total = plusScaled(total, reinterpret_cast<float4 const*>(sums)[p * pieces + thread], 1.0F);
        }
        storeFour(call, outputRow * call.headSize + thread * 4, scaled(total, 1.0F / all));
    }
    if (thread == 0)
    {
        keepStatistics(plan, outputRow, highest, all);
    }
}
} // namespace

cudaError_t launchMerge(Plan const& plan, cudaStream_t stream)
{
    dim3 const grid(static_cast<unsigned>(plan.queries), static_cast<unsigned>(plan.call.kvHeads),
        static_cast<unsigned>(plan.call.batch));
    size_t const sharedBytes = kThreads * (sizeof(float) + sizeof(float4));
    SEMKV_LAUNCH(grid, dim3(kThreads), sharedBytes, stream, (mergeKernel), plan);
    return cudaGetLastError();
}
} // namespace semkv::nexus
