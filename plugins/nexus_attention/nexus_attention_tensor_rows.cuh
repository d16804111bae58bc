// How one warp of NexusAttention's tensor-core kernel finds its slots and loads their rows: the pieces of a row are what
// nexus_attention_tensor.cuh says the lanes need, 16 or 8 bytes each, the lanes of a row side by side.
#pragma once

#include "code_pairs.cuh"
#include "nexus_attention_finish.cuh"

namespace semkv::nexus
{
// T: query, new rows, output. C: cache, T or a code.
template <typename T, typename C, int kHeadSize>
struct TensorShape
{
    static constexpr int kRows = 16;
    static constexpr int kSharers = kHeadSize > 128 ? 2 : 1; // warps that share the dimensions of a slot
    static constexpr int kParts = kWarps / kSharers;         // warps that share a split's slots
    static constexpr int kDims = kHeadSize / kSharers;
    static constexpr int kKeyPiece = kIsCode<C> && kDims % 64 == 0 ? 16 : 8;
    static constexpr int kKeyChunks = ceilDivide(kDims, 4 * kKeyPiece);
    static constexpr int kSteps = kKeyPiece / 4; // mma of a chunk and tile
    static constexpr int kValuePiece = kIsCode<C> && kDims % 128 == 0 ? 16 : 8;
    static constexpr int kValueChunks = ceilDivide(kDims, 8 * kValuePiece);
    // Of a warp's step: as many as registers take, for bytes are on their way while a step is computed. (16 slots of codes
    // instead of 32 take a quarter longer on an H200: gpu_check/results, h200_first.json and h200.json.)
    static constexpr int kSlots = kIsCode<C> || kDims * static_cast<int>(sizeof(C)) <= 64 ? 32 : 16;
    static constexpr int kTiles = kSlots / 8;
    static constexpr int kGroups = kSlots / 16;
    static constexpr int kSlotTile = kParts * kSlots;
    // What weights and values meet in: codes are exact in float16, too, and weights more exact than in bfloat16.
    using Weight = std::conditional_t<kIsCode<C>, __half, T>;
    using KeyPiece = Piece<kKeyPiece * static_cast<int>(sizeof(C)) / 4>;
    using ValuePiece = Piece<kValuePiece * static_cast<int>(sizeof(C)) / 4>;
    using Merge = Results<kHeadSize, kRows, kParts>;
    // Partial logits that sharers exchange, twice.
    static constexpr size_t kExchangeBytes = kSharers == 1 ? 0 : sizeof(float) * 2 * kThreads * kTiles * 4;
    static constexpr size_t kSharedBytes = kExchangeBytes > Merge::kBytes ? kExchangeBytes : Merge::kBytes;
    static_assert(kSharedBytes <= 48 * 1024);
    // Thread blocks that registers leave room for on one multiprocessor.
    static constexpr int kBlocks = kSlots == 16 && kDims <= 64 ? 3 : 2;
};

template <typename T, typename C, int kHeadSize>
struct TensorRows
{
    using S = TensorShape<T, C, kHeadSize>;

    Plan const& plan;
    int64_t head; // batch row * kvHeads + KV head
    int length;
    int end;      // one past the split's last entry
    int firstRow; // of the tile
    int g;
    int t;
    int firstDim; // of the warp

    __device__ __forceinline__ TensorRows(Plan const& plan_, int64_t head_, int length_, int end_, int firstRow_)
        : plan(plan_)
        , head(head_)
        , length(length_)
        , end(end_)
        , firstRow(firstRow_)
        , g(static_cast<int>(threadIdx.x) % 32 / 4)
        , t(static_cast<int>(threadIdx.x) % 4)
        , firstDim(static_cast<int>(threadIdx.x) / 32 % S::kSharers * S::kDims)
    {
    }

    // Whether all slots from entry `base` on are old ones in their order.
    __device__ __forceinline__ bool plain(int base) const
    {
        return plan.call.slotIndex == nullptr && base + S::kSlots <= min(end, length);
    }

    // With slotIndex: what it holds for the lane's own entry from `base` on; a load that nothing waits for yet.
    __device__ __forceinline__ int64_t namedFrom(int base) const
    {
        int const offset = static_cast<int>(threadIdx.x) % 32;
        int const entry = base + offset;
        bool const named = plan.call.slotIndex != nullptr && offset < S::kSlots && entry < min(end, plan.call.indexWidth);
        return named ? plan.call.slotIndex[head * plan.call.indexWidth + entry] : -1;
    }

    // The slot that this makes.
    __device__ __forceinline__ int slotsFrom(int base, int64_t named) const
    {
        int const offset = static_cast<int>(threadIdx.x) % 32;
        int const entry = base + offset;
        if (entry >= plan.call.indexWidth)
        {
            return offset < S::kSlots && entry < end ? length + entry - plan.call.indexWidth : -1;
        }
        return named < 0 ? -1 : named < length ? static_cast<int>(named) : kImpossibleSlot;
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

    // Which of a step's slots the lane's i-th logit column and value row are.
    __device__ __forceinline__ int ownOffset(int i) const
    {
        return i / 4 * 16 + i % 4 / 2 * 8 + 2 * t + i % 2;
    }

    // Row of a slot's keys or values. Slots below `length` are in the cache; new ones are read from the call's own rows,
    // because another block may be writing them to the cache at this moment (a quantised cache has them already).
    __device__ __forceinline__ C const* rowOf(void const* cache, void const* fresh, int slot) const
    {
        bool const old = kIsCode<C> || slot < length;
        int64_t const row = old ? head * plan.call.capacity + slot : head * plan.call.rows + slot - length;
        return static_cast<C const*>(old ? cache : fresh) + row * kHeadSize + firstDim;
    }
    __device__ __forceinline__ C const* oldRow(void const* cache, int slot) const
    {
        return static_cast<C const*>(cache) + (head * plan.call.capacity + slot) * kHeadSize + firstDim;
    }

    __device__ __forceinline__ void loadKeys(
        typename S::KeyPiece (&keys)[S::kTiles][S::kKeyChunks], int base, int slots) const
    {
        constexpr int kWords = S::kKeyPiece * static_cast<int>(sizeof(C)) / 4;
        if (plain(base))
        {
            // One address and constant distances from it, as nearly always.
            C const* const first = oldRow(plan.call.keyCache, base + g) + t * S::kKeyPiece;
            SEMKV_UNROLL
            for (int n = 0; n < S::kTiles; ++n)
            {
                SEMKV_UNROLL
                for (int c = 0; c < S::kKeyChunks; ++c)
                {
                    keys[n][c] = (4 * c + t) * S::kKeyPiece < S::kDims
                        ? loadPiece<kWords>(first + n * 8 * kHeadSize + c * 4 * S::kKeyPiece)
                        : typename S::KeyPiece{};
                }
            }
            return;
        }
        SEMKV_UNROLL
        for (int n = 0; n < S::kTiles; ++n)
        {
            int const slot = slotAt(base, slots, 8 * n + g);
            C const* const row = rowOf(plan.call.keyCache, plan.call.key, slot) + t * S::kKeyPiece;
            SEMKV_UNROLL
            for (int c = 0; c < S::kKeyChunks; ++c)
            {
                keys[n][c] = slot >= 0 && (4 * c + t) * S::kKeyPiece < S::kDims
                    ? loadPiece<kWords>(row + c * 4 * S::kKeyPiece)
                    : typename S::KeyPiece{};
            }
        }
    }

    __device__ __forceinline__ void loadValues(
        typename S::ValuePiece (&values)[S::kSlots / 4][S::kValueChunks], int base, int slots) const
    {
        constexpr int kWords = S::kValuePiece * static_cast<int>(sizeof(C)) / 4;
        if (plain(base))
        {
            C const* const first = oldRow(plan.call.valueCache, base + 2 * t) + g * S::kValuePiece;
            SEMKV_UNROLL
            for (int i = 0; i < S::kSlots / 4; ++i)
            {
                SEMKV_UNROLL
                for (int c = 0; c < S::kValueChunks; ++c)
                {
                    values[i][c] = (8 * c + g) * S::kValuePiece < S::kDims
                        ? loadPiece<kWords>(
                            first + (i / 4 * 16 + i % 4 / 2 * 8 + i % 2) * kHeadSize + c * 8 * S::kValuePiece)
                        : typename S::ValuePiece{};
                }
            }
            return;
        }
        SEMKV_UNROLL
        for (int i = 0; i < S::kSlots / 4; ++i)
        {
            int const slot = slotAt(base, slots, ownOffset(i));
            C const* const row = rowOf(plan.call.valueCache, plan.call.value, slot) + g * S::kValuePiece;
            SEMKV_UNROLL
            for (int c = 0; c < S::kValueChunks; ++c)
            {
                values[i][c] = slot >= 0 && (8 * c + g) * S::kValuePiece < S::kDims
                    ? loadPiece<kWords>(row + c * 8 * S::kValuePiece)
                    : typename S::ValuePiece{};
            }
        }
    }
};
} // namespace semkv::nexus
