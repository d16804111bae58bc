// NexusAttention for decoding: split-KV flash attention on CUDA cores, append included.
//
// A thread block serves one KV head of one batch row, a tile of kRows of its query rows (GQA group x new rows) and one
// split of the slots to attend to: the live ones, or those that slotIndex names and the new ones. Every 16-byte piece of a
// key or value row is loaded once by one lane and used for all kRows rows. kLanes lanes share a slot; each lane group keeps
// kUnroll slots in flight, and turns its kUnroll x kRows partial dot products into one logit a lane by recursive halving
// (kUnroll - 1 shuffles instead of kUnroll * log2(kLanes)).
// Lane groups and warps run online softmax on their own and merge once, at the end of the split. With more than one split
// the unnormalised sums go to the workspace and a second kernel merges them.
#pragma once

#include "../common/mma.cuh"
#include "nexus_attention_walker.cuh"

namespace semkv::nexus
{
template <typename T, int kHeadSize, int kRows>
__device__ __forceinline__ void walkSplit(Plan const& plan, float* shared)
{
    using S = Shape<T, kHeadSize, kRows>;
    NexusAttentionParams const& call = plan.call;
    Share share;
    if (!takeShare<T, kHeadSize, kRows>(plan, share))
    {
        return;
    }
    auto const [head, rowTileIndex, split, length, range] = share;

    int const warp = static_cast<int>(threadIdx.x) / 32;
    Walker<T, kHeadSize, kRows> walker(plan, head, length, range.end, rowTileIndex);
    float* const weights = shared + (warp * 2 * S::kGroups + walker.group) * S::kUnroll * kRows;
    constexpr int kBuffer = S::kWarpSlots * kRows;

    Vector<T> keys[S::kUnroll][S::kPerLane];
    Vector<T> values[S::kUnroll][S::kPerLane];
    int base = range.begin + warp * S::kWarpSlots;
    int slots = walker.slotsFrom(base);
    walker.load(keys, call.keyCache, call.key, base, slots);
    for (int step = 0; base < range.end; ++step, base += S::kSlotTile)
    {
        // Slots are looked up ahead of their rows, once. With eight query rows there is no register to keep them in.
        if constexpr (kRows >= 8)
        {
            slots = walker.slotsFrom(base);
        }
        walker.load(values, call.valueCache, call.value, base, slots);
        int const entry = base + walker.ownOffset();
        int const slot = walker.slotAt(base, slots, walker.ownOffset());
        float const bias = biasOfSlot(plan, head, length, slot);
        float const keyScale = walker.scaleOf(call.keyScale, slot);
        float const valueScale = walker.scaleOf(call.valueScale, slot);
        if constexpr (kRows < 8)
        {
            slots = walker.slotsFrom(base + S::kSlotTile);
        }
        float logit[kRows];
        walker.dotProducts(keys, logit);
        walker.keepProducts(logit, entry, keyScale);
        if constexpr (kRows >= 8)
        {
            slots = walker.slotsFrom(base + S::kSlotTile);
        }
        // The next keys travel while the softmax and the weighted sum are computed.
        walker.load(keys, call.keyCache, call.key, base + S::kSlotTile, slots);
        walker.softmaxStep(logit, slot, bias, keyScale);
        walker.accumulate(values, logit, valueScale, weights + (step & 1) * kBuffer);
    }
    walker.mergeGroups();

    typename S::Merge const results{shared};
    __syncthreads();
    walker.publish(results, warp);
    __syncthreads();
    results.finish(plan, head, rowTileIndex * kRows, split, range.active);
}

// Whether the architecture that is compiled for ever runs a kernel for this many rows: tensor cores take several of 16 bits.
template <typename T>
__host__ __device__ constexpr bool walks(int rows)
{
    return rows == 1 || sizeof(T) != 2 || kOtherBuild;
}

// Grid: KV heads x row tiles, splits, batch.
template <typename T, int kHeadSize, int kRows>
__global__ void __launch_bounds__(kThreads, (Shape<T, kHeadSize, kRows>::kBlocks)) decodeKernel(Plan const plan)
{
    if constexpr (walks<T>(kRows))
    {
        SEMKV_SHARED_BYTES(bytes);
        walkSplit<T, kHeadSize, kRows>(plan, reinterpret_cast<float*>(bytes));
    }
}

// Quantises the new rows of one KV head into the cache: one warp the key, one the value. A launch of its own, before the
// one that reads them. Grid: new rows, KV heads, batch.
template <typename T>
__global__ void __launch_bounds__(64) appendCodesKernel(Plan const plan)
{
    NexusAttentionParams const& call = plan.call;
    int64_t const head = static_cast<int64_t>(blockIdx.z) * call.kvHeads + blockIdx.y;
    int64_t const length = call.length[blockIdx.z];
    if (!lengthFits(plan, length))
    {
        return;
    }
    bool const isKey = threadIdx.x < 32;
    int const lane = static_cast<int>(threadIdx.x) % 32;
    void const* const source = isKey ? call.key : call.value;
    int64_t const from = (head * call.rows + blockIdx.x) * call.headSize;
    float largest = 0.0F;
    for (int d = lane; d < call.headSize; d += 32)
    {
        largest = fmaxf(largest, fabsf(loadElement(source, call.element, from + d)));
    }
    SEMKV_UNROLL
    for (int offset = 16; offset > 0; offset /= 2)
    {
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, offset));
    }
    float const scale = largest / kCodeLimit<T>;
    float const divisor = scale > 0.0F ? scale : 1.0F;
    int64_t const slot = head * call.capacity + length + blockIdx.x;
    T* const codes = static_cast<T*>(isKey ? call.keyCache : call.valueCache) + slot * call.headSize;
    for (int d = lane; d < call.headSize; d += 32)
    {
        codes[d] = encode<T>(loadElement(source, call.element, from + d) / divisor);
    }
    if (lane == 0)
    {
        (isKey ? call.keyScale : call.valueScale)[slot] = scale;
    }
}
} // namespace semkv::nexus
