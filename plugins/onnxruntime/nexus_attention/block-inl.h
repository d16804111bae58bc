// A block of positions: which slots, which biases, who sees them. Compiled once for each instruction set.
#if defined(SEMKV_BLOCK_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef SEMKV_BLOCK_INL_H
#undef SEMKV_BLOCK_INL_H
#else
#define SEMKV_BLOCK_INL_H
#endif

#include "../simd/math-inl.h"
#include "kernels.h"

#include <algorithm>
#include <limits>

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
constexpr float kNever = -std::numeric_limits<float>::infinity();

// Slots below which and from which on row r sees nothing.
struct Visible
{
    int64_t first;
    int64_t end;
};

inline Visible visible(HeadView const& head, int64_t r)
{
    NexusAttentionCall const& call = *head.call;
    int64_t const place = head.length + r / head.group();
    int64_t const first = call.window > 0 ? std::max<int64_t>(0, place - call.window + 1) : 0;
    return {first, call.causal ? place + 1 : head.length + call.rows};
}

// Positions from..from+count-1. Behind them the block is padded: with the last slot, which is there to be read, and a
// bias under which nobody sees it.
struct Block
{
    HWY_ALIGN float bias[kBlock];
    HWY_ALIGN float keyScale[kBlock];
    HWY_ALIGN float valueScale[kBlock];
    HWY_ALIGN int32_t slot[kBlock];
    size_t row[kBlock]; // slot * D
    int64_t count;
    int32_t lowest;
    int32_t highest;

    void fill(HeadView const& head, int64_t from, int64_t end)
    {
        auto const size = static_cast<size_t>(head.call->headSize);
        count = std::min(kBlock, end - from);
        if (head.slots == nullptr && count == kBlock && from + kBlock <= head.length)
        {
            // What a long cache consists of.
            for (int64_t n = 0; n < kBlock; ++n)
            {
                slot[n] = static_cast<int32_t>(from + n);
                row[n] = static_cast<size_t>(from + n) * size;
            }
            std::copy_n(head.bias + from, kBlock, bias);
            if (head.keyScale != nullptr)
            {
                std::copy_n(head.keyScale + from, kBlock, keyScale);
                std::copy_n(head.valueScale + from, kBlock, valueScale);
            }
            lowest = slot[0];
            highest = slot[kBlock - 1];
            return;
        }
        lowest = std::numeric_limits<int32_t>::max();
        highest = 0;
        for (int64_t n = from + kBlock; head.slots != nullptr && n < std::min(from + 2 * kBlock, end); ++n)
        {
            int64_t const later = head.slots[n];
            hwy::Prefetch(head.bias + later);
            if (head.keyScale != nullptr)
            {
                hwy::Prefetch(head.keyScale + later);
                hwy::Prefetch(head.valueScale + later);
            }
        }
        for (int64_t n = 0; n < kBlock; ++n)
        {
            int64_t const at = head.slot(from + std::min(n, count - 1));
            slot[n] = static_cast<int32_t>(at);
            row[n] = static_cast<size_t>(at) * size;
            lowest = std::min(lowest, slot[n]);
            highest = std::max(highest, slot[n]);
            bias[n] = n >= count ? kNever : at < head.length ? head.bias[at] : 0.0f;
            if (head.keyScale != nullptr)
            {
                keyScale[n] = head.keyScale[at];
                valueScale[n] = head.valueScale[at];
            }
        }
    }

    bool allSeenBy(Visible const& row) const { return row.first <= lowest && highest < row.end; }
};

// Logits from products: the soft cap, then the bias. A dead slot's product may be infinite or no number, so that its logit
// is replaced, not added to.
HWY_INLINE FloatVec logits(FloatVec products, FloatVec bias, float softcap)
{
    Floats const tag;
    if (softcap > 0.0f)
    {
        auto const cap = hn::Set(tag, softcap);
        products = hn::Mul(cap, hyperbolicTangent(hn::Div(products, cap)));
    }
    auto const never = hn::Set(tag, kNever);
    return hn::IfThenElse(hn::Gt(bias, never), hn::Add(products, bias), never);
}
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#endif
