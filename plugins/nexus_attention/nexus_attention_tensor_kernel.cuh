// NexusAttention on tensor cores, append included: split-KV flash attention for two query rows a KV head or more.
//
// A thread block serves one KV head of one batch row, a tile of sixteen of its query rows (GQA group x new rows) and one split
// of the entries, as the kernel of nexus_attention.cuh does; its warps take turns at the split's slots and merge once, at the
// end. Keys and values go from memory to the fragments of mma without shared memory. Heads of more than 128 dimensions are
// shared by two warps, which add up their parts of the logits.
#pragma once

#include "nexus_attention.cuh"
#include "nexus_attention_tensor.cuh"

namespace semkv::nexus
{
// What a lane needs to know about its slots of one step.
template <typename W>
struct SlotFacts
{
    using S = typename W::S;
    static constexpr int kOwn = S::kSlots / 4;

    float bias[kOwn];
    float keyScale[kOwn];
    float valueScale[kOwn];

    __device__ __forceinline__ SlotFacts(W const& warp, int base, int slots)
    {
        NexusAttentionParams const& call = warp.plan.call;
        int64_t const first = warp.head * call.capacity;
        if (warp.plain(base))
        {
            int64_t const at = first + base + 2 * warp.t;
            SEMKV_UNROLL
            for (int i = 0; i < kOwn; ++i)
            {
                int const offset = i / 4 * 16 + i % 4 / 2 * 8 + i % 2;
                bias[i] = call.slotBias[at + offset];
                if constexpr (W::kCodes)
                {
                    keyScale[i] = call.keyScale[at + offset];
                    valueScale[i] = call.valueScale[at + offset];
                }
            }
            return;
        }
        SEMKV_UNROLL
        for (int i = 0; i < kOwn; ++i)
        {
            int const slot = warp.slotAt(base, slots, warp.ownOffset(i));
            bool const old = slot >= 0 && slot < warp.length;
            bias[i] = old ? call.slotBias[first + slot] : 0.0F;
            if constexpr (W::kCodes)
            {
                keyScale[i] = slot >= 0 ? call.keyScale[first + slot] : 0.0F;
                valueScale[i] = slot >= 0 ? call.valueScale[first + slot] : 0.0F;
            }
        }
    }

    // The largest scale of a value that has a weight, down to a power of two; of all the warp's slots.
    __device__ __forceinline__ float largestScale()
    {
        float largest = 0.0F;
        if constexpr (W::kCodes)
        {
            SEMKV_UNROLL
            for (int i = 0; i < kOwn; ++i)
            {
                valueScale[i] = bias[i] > minusInfinity() ? valueScale[i] : 0.0F;
                largest = fmaxf(largest, valueScale[i]);
            }
            largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
        }
        return __uint_as_float(__float_as_uint(largest) & 0x7F800000U);
    }
};

template <typename T, typename C, int kHeadSize>
__device__ __forceinline__ void tensorSplit(Plan const& plan, float* shared)
{
    using W = TensorWarp<T, C, kHeadSize>;
    using S = typename W::S;
    Share share;
    if (!takeShare<C, kHeadSize, S::kRows>(plan, share))
    {
        return;
    }
    auto const [head, rowTileIndex, split, length, range] = share;

    int const part = static_cast<int>(threadIdx.x) / 32 / S::kSharers;
    W warp(plan, head, length, range.end, rowTileIndex * S::kRows);
    typename S::KeyPiece keys[S::kTiles][S::kKeyChunks];
    int base = range.begin + part * S::kSlots;
    int slots = warp.slotsFrom(base, warp.namedFrom(base));
    int64_t named = warp.namedFrom(base + S::kSlotTile);
    warp.loadKeys(keys, base, slots);
    // Sharers meet once a step, so that all of their block's warps make as many.
    int const last = range.end + (S::kSharers > 1 ? part * S::kSlots : 0);
    for (int step = 0; base < last; ++step, base += S::kSlotTile)
    {
        typename S::ValuePiece values[S::kSlots / 4][S::kValueChunks];
        warp.loadValues(values, base, slots);
        SlotFacts<W> facts(warp, base, slots);
        int const next = warp.slotsFrom(base + S::kSlotTile, named);
        named = warp.namedFrom(base + 2 * S::kSlotTile);
        float logits[S::kTiles][4];
        warp.dotProducts(keys, logits);
        // The next keys travel while the softmax and the weighted sum are computed.
        warp.loadKeys(keys, base + S::kSlotTile, next);
        if constexpr (S::kSharers > 1)
        {
            warp.addSharers(logits, shared + step % 2 * S::kTiles * 4 * kThreads);
        }
        SEMKV_UNROLL
        for (int i = 0; i < S::kSlots / 4; ++i)
        {
            float const factor = kIsCode<C> ? plan.factor * W::kUnit * facts.keyScale[i] : plan.factor;
            logits[i / 2][i % 2] *= factor;
            logits[i / 2][2 + i % 2] *= factor;
        }
        warp.keepProducts(logits, base);
        warp.softmaxStep(logits, base, slots, facts.bias, facts.largestScale());
        if constexpr (kIsCode<C>)
        {
            SEMKV_UNROLL
            for (int i = 0; i < S::kSlots / 4; ++i)
            {
                float const factor = facts.valueScale[i] * W::inverse(warp.reference);
                logits[i / 2][i % 2] *= factor;
                logits[i / 2][2 + i % 2] *= factor;
            }
        }
        warp.accumulate(values, logits);
        slots = next;
    }

    typename S::Merge const results{shared};
    __syncthreads();
    warp.publish(results, part);
    __syncthreads();
    results.finish(plan, head, rowTileIndex * S::kRows, split, range.active);
}

// Grid: KV heads x row tiles, splits, batch.
template <typename T, typename C, int kHeadSize>
__global__ void __launch_bounds__(kThreads, (TensorShape<T, C, kHeadSize>::kBlocks)) tensorKernel(Plan const plan)
{
    if constexpr (kTensorCoreBuild)
    {
        SEMKV_SHARED_BYTES(bytes);
        tensorSplit<T, C, kHeadSize>(plan, reinterpret_cast<float*>(bytes));
    }
}
} // namespace semkv::nexus
