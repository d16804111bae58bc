// How one warp of NexusAttention's tensor-core kernel works through its slots, sixteen query rows at a time.
//
// Both products take their operands as rows lie in memory, because the order of what is summed, and of the columns, is free
// as long as both sides agree. With g = lane / 4 and t = lane % 4:
//  * S = Q K^T: in a chunk of a row, lane (g, t) has the t-th piece of slot g of a tile of eight. Four elements of it are
//    the lane's part of b in one mma; q's fragments are gathered from the same dimensions.
//  * What mma leaves in the lane, rows g and g + 8 of slots 2t and 2t + 1, is its part of a for O = P V.
//  * O = P V: lane (g, t) has the g-th piece of slots 2t, 2t + 1, 2t + 8 and 2t + 9 of sixteen. Element j of these is its part
//    of b in the j-th mma of the chunk, whose columns 2t and 2t + 1 are element j of pieces 2t and 2t + 1.
#pragma once

#include "nexus_attention_tensor_rows.cuh"

namespace semkv::nexus
{
template <typename T, typename C, int kHeadSize>
struct TensorWarp : TensorRows<T, C, kHeadSize>
{
    using Rows = TensorRows<T, C, kHeadSize>;
    using S = typename Rows::S;
    static constexpr bool kCodes = kIsCode<C>;
    static constexpr float kUnit = kCodeFactor<C>;

    using Rows::end;
    using Rows::firstDim;
    using Rows::firstRow;
    using Rows::g;
    using Rows::head;
    using Rows::length;
    using Rows::plan;
    using Rows::t;

    unsigned query[S::kKeyChunks][S::kSteps][4];
    float sum[S::kValueChunks][S::kValuePiece][4];
    float maximum[2]; // of rows g and g + 8
    float weight[2];  // of this lane's slots
    float reference;  // what the values' scales are relative to, a power of two

    __device__ __forceinline__ TensorWarp(Plan const& plan_, int64_t head_, int length_, int end_, int firstRow_)
        : Rows(plan_, head_, length_, end_, firstRow_)
        , maximum{minusInfinity(), minusInfinity()}
        , weight{0.0F, 0.0F}
        , reference(0.0F)
    {
        SEMKV_UNROLL
        for (int c = 0; c < S::kKeyChunks; ++c)
        {
            SEMKV_UNROLL
            for (int half = 0; half < 2; ++half)
            {
                int const row = firstRow + g + 8 * half;
                int const d = (4 * c + t) * S::kKeyPiece;
                bool const exists = row < plan.queries && d < S::kDims;
                T const* const from
                    = static_cast<T const*>(plan.call.query) + (head * plan.queries + row) * kHeadSize + firstDim + d;
                SEMKV_UNROLL
                for (int eight = 0; eight < S::kKeyPiece / 8; ++eight)
                {
                    Piece<4> const v = exists ? loadPiece<4>(from + 8 * eight) : Piece<4>{};
                    SEMKV_UNROLL
                    for (int w = 0; w < 4; ++w)
                    {
                        query[c][2 * eight + w / 2][w % 2 * 2 + half] = v.word[w];
                    }
                }
            }
        }
        SEMKV_UNROLL
        for (int c = 0; c < S::kValueChunks; ++c)
        {
            SEMKV_UNROLL
            for (int j = 0; j < S::kValuePiece; ++j)
            {
                SEMKV_UNROLL
                for (int i = 0; i < 4; ++i)
                {
                    sum[c][j][i] = 0.0F;
                }
            }
        }
    }

    // q.k of rows g (elements 0, 1) and g + 8 (2, 3) and slots 2t and 2t + 1 of each tile of eight.
    __device__ __forceinline__ void dotProducts(
        typename S::KeyPiece const (&keys)[S::kTiles][S::kKeyChunks], float (&logits)[S::kTiles][4]) const
    {
        SEMKV_UNROLL
        for (int n = 0; n < S::kTiles; ++n)
        {
            SEMKV_UNROLL
            for (int i = 0; i < 4; ++i)
            {
                logits[n][i] = 0.0F;
            }
        }
        SEMKV_UNROLL
        for (int c = 0; c < S::kKeyChunks; ++c)
        {
            SEMKV_UNROLL
            for (int step = 0; step < S::kSteps; ++step)
            {
                SEMKV_UNROLL
                for (int n = 0; n < S::kTiles; ++n)
                {
                    mma16816<T>(logits[n], query[c][step], pairOf<T, C>(keys[n][c], 2 * step),
                        pairOf<T, C>(keys[n][c], 2 * step + 1));
                }
            }
        }
    }

    // Adds what the other warp of these slots has for its dimensions. `buffer` is of the whole block, another one each step.
    __device__ __forceinline__ void addSharers(float (&logits)[S::kTiles][4], float* buffer) const
    {
        float4* const all = reinterpret_cast<float4*>(buffer);
        SEMKV_UNROLL
        for (int n = 0; n < S::kTiles; ++n)
        {
            all[n * kThreads + threadIdx.x] = float4{logits[n][0], logits[n][1], logits[n][2], logits[n][3]};
        }
        __syncthreads();
        SEMKV_UNROLL
        for (int n = 0; n < S::kTiles; ++n)
        {
            float4 const other = all[n * kThreads + (threadIdx.x ^ 32U)];
            logits[n][0] += other.x;
            logits[n][1] += other.y;
            logits[n][2] += other.z;
            logits[n][3] += other.w;
        }
    }

    // For the attention mass: factor * q.k.
    __device__ __forceinline__ void keepProducts(float const (&products)[S::kTiles][4], int base) const
    {
        if (plan.products == nullptr || firstDim != 0)
        {
            return;
        }
        SEMKV_UNROLL
        for (int n = 0; n < S::kTiles; ++n)
        {
            SEMKV_UNROLL
            for (int i = 0; i < 4; ++i)
            {
                int const row = firstRow + g + i / 2 * 8;
                int const entry = base + 8 * n + 2 * t + i % 2;
                if (row < plan.queries && entry < end)
                {
                    plan.products[(head * plan.queries + row) * plan.entries + entry] = products[n][i];
                }
            }
        }
    }

    // Logits to weights, and the largest scale of a value to `reference`; rescales what was summed before.
    __device__ __forceinline__ void softmaxStep(
        float (&logits)[S::kTiles][4], int base, int slots, float const (&bias)[S::kSlots / 4], float largestScale)
    {
        NexusAttentionParams const& call = plan.call;
        if (plan.cap > 0.0F)
        {
            SEMKV_UNROLL
            for (int i = 0; i < S::kTiles * 4; ++i)
            {
                logits[i / 4][i % 4] = plan.cap * tanhf(logits[i / 4][i % 4]);
            }
        }
        // Old slots that no window ends in: every row sees them all.
        bool const open = this->plain(base) && (call.window <= 0 || length + call.rows - 1 - base < call.window);
        float shrink[2]{1.0F, 1.0F};
        SEMKV_UNROLL
        for (int half = 0; half < 2; ++half)
        {
            if (half == 1 && plan.queries - firstRow <= 8)
            {
                continue; // no such rows: their queries, and so their weights, are 0
            }
            int const position = length + (firstRow + g + 8 * half) % call.rows;
            float highest = maximum[half];
            SEMKV_UNROLL
            for (int i = 0; i < S::kSlots / 4; ++i)
            {
                float& x = logits[i / 2][2 * half + i % 2];
                x = open ? (bias[i] > minusInfinity() ? x + bias[i] * kLog2E : minusInfinity())
                         : masked(plan, x, position, this->slotAt(base, slots, this->ownOffset(i)), bias[i] * kLog2E);
                highest = fmaxf(highest, x);
            }
            highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, 2));
            // Nothing seen yet: any finite reference keeps -inf - reference from being NaN.
            float const from = highest > minusInfinity() ? highest : 0.0F;
            shrink[half] = fastExp2(maximum[half] - from);
            maximum[half] = highest;
            float total = 0.0F;
            SEMKV_UNROLL
            for (int i = 0; i < S::kSlots / 4; ++i)
            {
                float& x = logits[i / 2][2 * half + i % 2];
                x = fastExp2(x - from);
                total += x;
            }
            weight[half] = weight[half] * shrink[half] + total;
        }
        if constexpr (kIsCode<C>)
        {
            float const next = fmaxf(reference, largestScale);
            float const ratio = reference * inverse(next);
            shrink[0] *= ratio;
            shrink[1] *= ratio;
            reference = next;
        }
        if (shrink[0] != 1.0F || shrink[1] != 1.0F)
        {
            SEMKV_UNROLL
            for (int c = 0; c < S::kValueChunks; ++c)
            {
                SEMKV_UNROLL
                for (int j = 0; j < S::kValuePiece; ++j)
                {
                    SEMKV_UNROLL
                    for (int i = 0; i < 4; ++i)
                    {
                        sum[c][j][i] *= shrink[i / 2];
                    }
                }
            }
        }
    }

    // 1 / x of a power of two; finite for 0.
    __device__ __forceinline__ static float inverse(float x)
    {
        return __uint_as_float(0x7F000000U - __float_as_uint(x));
    }

    __device__ __forceinline__ void accumulate(typename S::ValuePiece const (&values)[S::kSlots / 4][S::kValueChunks],
        float const (&weights)[S::kTiles][4])
    {
        using Weight = typename S::Weight;
        SEMKV_UNROLL
        for (int m = 0; m < S::kGroups; ++m)
        {
            float const(&low)[4] = weights[2 * m];
            float const(&high)[4] = weights[2 * m + 1];
            unsigned const a[4]{packPair<Weight>(low[0], low[1]), packPair<Weight>(low[2], low[3]),
                packPair<Weight>(high[0], high[1]), packPair<Weight>(high[2], high[3])};
            SEMKV_UNROLL
            for (int c = 0; c < S::kValueChunks; ++c)
            {
                SEMKV_UNROLL
                for (int j = 0; j < S::kValuePiece; ++j)
                {
                    mma16816<Weight>(sum[c][j], a, pairAcross<Weight, C>(values[4 * m][c], values[4 * m + 1][c], j),
                        pairAcross<Weight, C>(values[4 * m + 2][c], values[4 * m + 3][c], j));
                }
            }
        }
    }

    // The warp's result to shared memory.
    __device__ __forceinline__ void publish(typename S::Merge const& results, int part)
    {
        float const unit = kIsCode<C> ? reference * kCodeFactor<C> : 1.0F;
        SEMKV_UNROLL
        for (int half = 0; half < 2; ++half)
        {
            int const row = g + 8 * half;
            weight[half] += __shfl_xor_sync(kFullWarp, weight[half], 1);
            weight[half] += __shfl_xor_sync(kFullWarp, weight[half], 2);
            if (t == 0 && firstDim == 0)
            {
                results.maximum(part, row) = maximum[half];
                results.weight(part, row) = weight[half];
            }
            SEMKV_UNROLL
            for (int c = 0; c < S::kValueChunks; ++c)
            {
                SEMKV_UNROLL
                for (int column = 0; column < 2; ++column)
                {
                    int const d = (8 * c + 2 * t + column) * S::kValuePiece;
                    SEMKV_UNROLL
                    for (int j = 0; d < S::kDims && j < S::kValuePiece; j += 4)
                    {
                        int const i = 2 * half + column;
                        float4 const v{sum[c][j][i], sum[c][j + 1][i], sum[c][j + 2][i], sum[c][j + 3][i]};
                        *reinterpret_cast<float4*>(results.sums(part, row) + firstDim + d + j) = scaled(v, unit);
                    }
                }
            }
        }
    }
};
} // namespace semkv::nexus
