// How one warp of the NexusAttention kernel works through its slots.
#pragma once

#include "nexus_attention_finish.cuh"

namespace semkv::nexus
{
// The register tile of one warp.
template <typename T, int kHeadSize, int kRowTile>
struct Shape
{
    static constexpr int kRows = kRowTile;
    static constexpr int kVector = Vector<T>::kSize;
    static constexpr int kPieces = kHeadSize / kVector;
    static constexpr int kLanes = kPieces >= 32 ? 32 : nextPowerOfTwo(kPieces);
    static constexpr int kPerLane = ceilDivide(kPieces, kLanes);
    static constexpr int kGroups = 32 / kLanes;
    // Registers: keys and values in flight, query and accumulator, logits.
    static constexpr int registers(int unroll)
    {
        return 8 * unroll * kPerLane + 2 * kRows * kVector * kPerLane + unroll * kRows;
    }
    static constexpr int kUnroll = kPerLane == 1 && kLanes >= 8 && registers(8) <= 168 ? 8 : registers(4) <= 200 ? 4 : 2;
    static constexpr int kReplicas = kLanes / kUnroll;
    static constexpr int kWarpSlots = kGroups * kUnroll;
    static constexpr int kSlotTile = kWarps * kWarpSlots;
    static constexpr int kWeightFloats = kWarps * 2 * kWarpSlots * kRows;
    // Thread blocks that registers leave room for on one multiprocessor. Given to the compiler, which otherwise aims at one
    // more and spills for it, and used to fill whole waves.
    static constexpr int kBlocks = kRows >= 2 ? 2 : 3;
    using Merge = Results<kHeadSize, kRows, kWarps>;
    static constexpr size_t kWeightBytes = sizeof(float) * static_cast<size_t>(kWeightFloats);
    static constexpr size_t kSharedBytes = kWeightBytes > Merge::kBytes ? kWeightBytes : Merge::kBytes;
    static_assert(kHeadSize % kVector == 0 && kReplicas >= 1 && kWarpSlots <= 32);
};

// One warp's share of a split: its lane group's slots, one after the other.
template <typename T, int kHeadSize, int kRows>
struct Walker
{
    using S = Shape<T, kHeadSize, kRows>;

    Plan const& plan;
    int64_t head; // batch row * kvHeads + KV head
    int length;
    int end;   // one past the split's last entry
    int lane;  // within the lane group
    int group; // within the warp
    float query[kRows][S::kPerLane][S::kVector];
    float sum[kRows][S::kPerLane][S::kVector];
    float maximum[kRows];
    float weight[kRows]; // sum of the weights of this lane's slots
    int position[kRows]; // slot that the row sits at; -1: no such row

    __device__ __forceinline__ Walker(Plan const& plan_, int64_t head_, int length_, int end_, int rowTileIndex)
        : plan(plan_)
        , head(head_)
        , length(length_)
        , end(end_)
        , lane(static_cast<int>(threadIdx.x) % S::kLanes)
        , group(static_cast<int>(threadIdx.x) % 32 / S::kLanes)
    {
        NexusAttentionParams const& call = plan.call;
        SEMKV_UNROLL
        for (int r = 0; r < kRows; ++r)
        {
            int const row = rowTileIndex * kRows + r;
            bool const exists = row < plan.queries;
            position[r] = exists ? length + row % call.rows : -1;
            maximum[r] = minusInfinity();
            weight[r] = 0.0F;
            int64_t const source = (head * plan.queries + row) * kHeadSize;
            SEMKV_UNROLL
            for (int c = 0; c < S::kPerLane; ++c)
            {
                int const piece = lane + c * S::kLanes;
                loadQuery(query[r][c], source + piece * S::kVector, exists && piece < S::kPieces);
                SEMKV_UNROLL
                for (int i = 0; i < S::kVector; ++i)
                {
                    query[r][c][i] *= plan.factor;
                    sum[r][c][i] = 0.0F;
                }
            }
        }
    }

    __device__ __forceinline__ void loadQuery(float (&out)[S::kVector], int64_t at, bool exists) const
    {
        if constexpr (kIsCode<T>)
        {
            SEMKV_UNROLL
            for (int i = 0; i < S::kVector; ++i)
            {
                out[i] = exists ? loadElement(plan.call.query, plan.call.element, at + i) : 0.0F;
            }
        }
        else
        {
            Vector<T> const v = exists ? loadVector(static_cast<T const*>(plan.call.query) + at) : zeroVector<T>();
            SEMKV_UNROLL
            for (int i = 0; i < S::kVector; ++i)
            {
                out[i] = elementOf(v, i);
            }
        }
    }

    // With slotIndex: this lane's part of the slots of the warp's entries from `base` on, -1 where there is none. One lane
    // looks up one entry; the lanes that load its row get the slot from there.
    __device__ __forceinline__ int slotsFrom(int base) const
    {
        if (plan.call.slotIndex == nullptr)
        {
            return 0;
        }
        int const offset = static_cast<int>(threadIdx.x) % 32;
        return offset < S::kWarpSlots && base + offset < end ? slotOfEntry(plan, head, length, base + offset) : -1;
    }

    // Slot of the entry base + offset, negative where there is none. All lanes of the warp take part.
    __device__ __forceinline__ int slotAt(int base, int slots, int offset) const
    {
        if (plan.call.slotIndex != nullptr)
        {
            return __shfl_sync(kFullWarp, slots, offset);
        }
        return base + offset < end ? base + offset : -1;
    }

    // Slots below `length` are read from the cache; the new ones from the call's own rows, because another block may be
    // writing them to the cache at this moment (a quantised cache has them already). No slot reads nothing and gives
    // zeros.
    __device__ __forceinline__ void load(
        Vector<T> (&rows)[S::kUnroll][S::kPerLane], void const* cache, void const* fresh, int base, int slots) const
    {
        T const* old = static_cast<T const*>(cache) + head * plan.call.capacity * kHeadSize;
        T const* added
            = kIsCode<T> ? old : static_cast<T const*>(fresh) + (head * plan.call.rows - length) * kHeadSize;
        if (plan.call.slotIndex == nullptr && base + S::kWarpSlots <= min(end, length))
        {
            // One address and constant distances from it, as nearly always.
            T const* const first = old + static_cast<int64_t>(base + group) * kHeadSize + lane * S::kVector;
            SEMKV_UNROLL
            for (int u = 0; u < S::kUnroll; ++u)
            {
                SEMKV_UNROLL
                for (int c = 0; c < S::kPerLane; ++c)
                {
                    rows[u][c] = lane + c * S::kLanes < S::kPieces
                        ? loadVector(first + u * S::kGroups * kHeadSize + c * S::kLanes * S::kVector)
                        : zeroVector<T>();
                }
            }
            return;
        }
        SEMKV_UNROLL
        for (int u = 0; u < S::kUnroll; ++u)
        {
            int const slot = slotAt(base, slots, u * S::kGroups + group);
            T const* row = (slot < length ? old : added) + static_cast<int64_t>(slot) * kHeadSize;
            SEMKV_UNROLL
            for (int c = 0; c < S::kPerLane; ++c)
            {
                int const piece = lane + c * S::kLanes;
                rows[u][c]
                    = slot >= 0 && piece < S::kPieces ? loadVector(row + piece * S::kVector) : zeroVector<T>();
            }
        }
    }

    // The entry, from `base` on, whose logits this lane ends up with after `dotProducts`.
    __device__ __forceinline__ int ownOffset() const
    {
        return lane / S::kReplicas * S::kGroups + group;
    }

    __device__ __forceinline__ float scaleOf(float const* scales, int slot) const
    {
        if constexpr (kIsCode<T>)
        {
            return slot >= 0 ? scales[head * plan.call.capacity + slot] * kCodeFactor<T> : 0.0F;
        }
        static_cast<void>(scales);
        static_cast<void>(slot);
        return 1.0F;
    }

    __device__ __forceinline__ void dotProducts(
        Vector<T> const (&keys)[S::kUnroll][S::kPerLane], float (&logit)[kRows]) const
    {
        float part[kRows][S::kUnroll];
        SEMKV_UNROLL
        for (int u = 0; u < S::kUnroll; ++u)
        {
            SEMKV_UNROLL
            for (int r = 0; r < kRows; ++r)
            {
                part[r][u] = 0.0F;
            }
            SEMKV_UNROLL
            for (int c = 0; c < S::kPerLane; ++c)
            {
                SEMKV_UNROLL
                for (int i = 0; i < S::kVector; ++i)
                {
                    float const k = elementOf(keys[u][c], i);
                    SEMKV_UNROLL
                    for (int r = 0; r < kRows; ++r)
                    {
                        part[r][u] += query[r][c][i] * k;
                    }
                }
            }
        }
        SEMKV_UNROLL
        for (int r = 0; r < kRows; ++r)
        {
            SEMKV_UNROLL
            for (int offset = S::kLanes / 2, half = S::kUnroll / 2; offset > 0; offset /= 2, half /= 2)
            {
                if (half > 0)
                {
                    bool const upper = (lane & offset) != 0;
                    SEMKV_UNROLL
                    for (int u = 0; u < half; ++u)
                    {
                        float const keep = upper ? part[r][u + half] : part[r][u];
                        float const give = upper ? part[r][u] : part[r][u + half];
                        part[r][u] = keep + __shfl_xor_sync(kFullWarp, give, offset);
                    }
                }
                else
                {
                    part[r][0] += __shfl_xor_sync(kFullWarp, part[r][0], offset);
                }
            }
            logit[r] = part[r][0];
        }
    }

    // For the attention mass. Before masks and bias, because here there are registers for it; massKernel adds those.
    __device__ __forceinline__ void keepProducts(float const (&product)[kRows], int entry, float keyScale) const
    {
        if (plan.products == nullptr || lane % S::kReplicas != 0 || entry >= end)
        {
            return;
        }
        int const firstRow = static_cast<int>(blockIdx.x) % ceilDivide(plan.queries, kRows) * kRows;
        SEMKV_UNROLL
        for (int r = 0; r < kRows; ++r)
        {
            if (position[r] >= 0)
            {
                plan.products[(head * plan.queries + firstRow + r) * plan.entries + entry]
                    = kIsCode<T> ? product[r] * keyScale : product[r];
            }
        }
    }

    // Logits to weights; rescales what was summed before when a new maximum is found.
    __device__ __forceinline__ void softmaxStep(float (&logit)[kRows], int slot, float bias, float keyScale)
    {
        SEMKV_UNROLL
        for (int r = 0; r < kRows; ++r)
        {
            float const x = maskedLogit(plan, kIsCode<T> ? logit[r] * keyScale : logit[r], position[r], slot, bias);
            float highest = x;
            SEMKV_UNROLL
            for (int offset = S::kLanes / 2; offset >= S::kReplicas; offset /= 2)
            {
                highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, offset));
            }
            highest = fmaxf(highest, maximum[r]);
            // Nothing seen yet: any finite reference keeps -inf - reference from being NaN.
            float const reference = highest > minusInfinity() ? highest : 0.0F;
            logit[r] = exp2f(x - reference);
            if (highest > maximum[r])
            {
                float const shrink = exp2f(maximum[r] - reference);
                maximum[r] = highest;
                weight[r] *= shrink;
                SEMKV_UNROLL
                for (int c = 0; c < S::kPerLane; ++c)
                {
                    SEMKV_UNROLL
                    for (int i = 0; i < S::kVector; ++i)
                    {
                        sum[r][c][i] *= shrink;
                    }
                }
            }
            weight[r] += logit[r];
        }
    }

    // Hands each slot's weights to all lanes of the group. `shared` is the group's own part of shared memory.
    __device__ __forceinline__ void accumulate(
        Vector<T> const (&values)[S::kUnroll][S::kPerLane], float const (&own)[kRows], float valueScale, float* shared)
    {
        if (lane % S::kReplicas == 0)
        {
            SEMKV_UNROLL
            for (int r = 0; r < kRows; ++r)
            {
                shared[lane / S::kReplicas * kRows + r] = kIsCode<T> ? own[r] * valueScale : own[r];
            }
        }
        __syncwarp();
        SEMKV_UNROLL
        for (int u = 0; u < S::kUnroll; ++u)
        {
            float w[kRows];
            SEMKV_UNROLL
            for (int r = 0; r < kRows; ++r)
            {
                w[r] = shared[u * kRows + r];
            }
            SEMKV_UNROLL
            for (int c = 0; c < S::kPerLane; ++c)
            {
                SEMKV_UNROLL
                for (int i = 0; i < S::kVector; ++i)
                {
                    float const v = elementOf(values[u][c], i);
                    SEMKV_UNROLL
                    for (int r = 0; r < kRows; ++r)
                    {
                        sum[r][c][i] += w[r] * v;
                    }
                }
            }
        }
    }

    // Leaves the warp's total in every lane group.
    __device__ __forceinline__ void mergeGroups()
    {
        SEMKV_UNROLL
        for (int r = 0; r < kRows; ++r)
        {
            SEMKV_UNROLL
            for (int offset = S::kLanes / 2; offset >= S::kReplicas; offset /= 2)
            {
                weight[r] += __shfl_xor_sync(kFullWarp, weight[r], offset);
            }
            SEMKV_UNROLL
            for (int offset = S::kLanes; offset < 32; offset *= 2)
            {
                float const highest = fmaxf(maximum[r], __shfl_xor_sync(kFullWarp, maximum[r], offset));
                float const shrink = highest > minusInfinity() ? exp2f(maximum[r] - highest) : 0.0F;
                maximum[r] = highest;
                weight[r] *= shrink;
                weight[r] += __shfl_xor_sync(kFullWarp, weight[r], offset);
                SEMKV_UNROLL
                for (int c = 0; c < S::kPerLane; ++c)
                {
                    SEMKV_UNROLL
                    for (int i = 0; i < S::kVector; ++i)
                    {
                        sum[r][c][i] *= shrink;
                        sum[r][c][i] += __shfl_xor_sync(kFullWarp, sum[r][c][i], offset);
                    }
                }
            }
        }
    }

    // Warp totals to shared memory.
    __device__ __forceinline__ void publish(typename S::Merge const& results, int warp) const
    {
        SEMKV_UNROLL
        for (int r = 0; r < kRows; ++r)
        {
            if (group == 0)
            {
                SEMKV_UNROLL
                for (int c = 0; c < S::kPerLane; ++c)
                {
                    int const piece = lane + c * S::kLanes;
                    SEMKV_UNROLL
                    for (int i = 0; i < S::kVector; ++i)
                    {
                        if (piece < S::kPieces)
                        {
                            results.sums(warp, r)[piece * S::kVector + i] = sum[r][c][i];
                        }
                    }
                }
            }
            if (threadIdx.x % 32 == 0)
            {
                results.maximum(warp, r) = maximum[r];
                results.weight(warp, r) = weight[r];
            }
        }
    }
};
} // namespace semkv::nexus
