#include "operator.h"

#include "../simd/dot.h"

#include <algorithm>
#include <limits>

namespace semkv::native
{
namespace
{
char const* const kWhere = "semkv SemanticBlockSelect";

// A block that may be chosen, by rank: pinned ones first, block 0 before all and the newest of the others; then by score.
struct Candidate
{
    float score;
    int64_t number;
    bool pinned;

    // Whether the other comes first.
    bool operator<(Candidate const& other) const
    {
        if (pinned != other.pinned)
        {
            return other.pinned;
        }
        if (pinned)
        {
            return number != 0 && (other.number == 0 || number < other.number);
        }
        return score != other.score ? score < other.score : number > other.number;
    }
};

struct Call
{
    int64_t kvHeads, group, rows, blocks, vectors, longest, headSize, width;
    bool largest;
    float const* query;
    float const* representatives;
    int64_t const* slots;
    int64_t const* count;
    int64_t const* pinned;
    int64_t* index;
};

// The queries of a KV head as vectors to multiply representatives with: one each, or their sum.
std::vector<float> queryParts(Call const& call, float const* query)
{
    int64_t const queries = call.group * call.rows, stride = call.vectors * call.headSize;
    std::vector<float> parts(static_cast<size_t>((call.largest ? queries : 1) * stride));
    for (int64_t q = 0; q < queries; ++q)
    {
        float* to = parts.data() + (call.largest ? q * stride : 0);
        for (int64_t d = 0; d < call.headSize; ++d)
        {
            float const x = query[q * call.headSize + d];
            if (call.vectors == 1)
            {
                to[d] += x;
            }
            else
            {
                to[d] += std::min(x, 0.0f);
                to[call.headSize + d] += std::max(x, 0.0f);
            }
        }
    }
    return parts;
}

void select(Call const& call, std::vector<int64_t> const& lengths, int64_t b, int64_t h)
{
    int64_t const head = b * call.kvHeads + h, stride = call.vectors * call.headSize;
    auto const parts = queryParts(call, call.query + head * call.group * call.rows * call.headSize);
    auto const many = static_cast<int64_t>(parts.size()) / stride;
    float const* table = call.representatives + head * call.blocks * stride;
    Dot const dot = dotProduct();
    std::vector<Candidate> heap;
    heap.reserve(static_cast<size_t>(call.count[b]));
    for (int64_t n = 0; n < call.count[b]; ++n)
    {
        if (lengths[static_cast<size_t>(n)] == 0)
        {
            continue;
        }
        bool const pinned = call.pinned[b * call.blocks + n] != 0;
        float score = pinned ? 0.0f : -std::numeric_limits<float>::infinity();
        for (int64_t q = 0; q < many && !pinned; ++q)
        {
            score = std::max(score, dot(parts.data() + q * stride, table + n * stride, static_cast<size_t>(stride)));
        }
        heap.push_back({score, n, pinned});
    }
    std::make_heap(heap.begin(), heap.end());
    std::vector<std::pair<int64_t, int64_t>> taken;
    int64_t left = call.width;
    while (left > 0 && !heap.empty())
    {
        std::pop_heap(heap.begin(), heap.end());
        int64_t const n = heap.back().number, length = std::min(lengths[static_cast<size_t>(n)], left);
        heap.pop_back();
        taken.emplace_back(n, length);
        left -= length;
    }
    std::sort(taken.begin(), taken.end());
    int64_t* to = call.index + head * call.width;
    for (auto const& [n, length] : taken)
    {
        to = std::copy_n(call.slots + (b * call.blocks + n) * call.longest, length, to);
    }
    std::fill(to, call.index + (head + 1) * call.width, int64_t{-1});
}

class SemanticBlockSelectKernel
{
public:
    SemanticBlockSelectKernel(int64_t, OrtKernelInfo const* info)
        : mWidth(attribute(info, "width", int64_t{1024}))
        , mLargest(attribute(info, "reduce_max", int64_t{0}) > 0)
    {
    }

    void run(Run const& run) const
    {
        Tensor const query = run.input(0), representatives = run.input(1), slots = run.input(2), count = run.input(3);
        Tensor const pinned = run.input(4);
        Sizes sizes(kWhere);
        sizes.add("query", "B,Hq,S,D", query.shape);
        sizes.add("representatives", "B,Hkv,N,R,D", representatives.shape);
        sizes.add("block_slots", "B,N,L", slots.shape);
        sizes.add("block_count", "B", count.shape);
        sizes.add("pinned", "B,N", pinned.shape);
        int64_t const batch = sizes["B"], kvHeads = sizes["Hkv"], blocks = sizes["N"], longest = sizes["L"];
        if (kvHeads == 0 || sizes["Hq"] % kvHeads != 0)
        {
            reject(kWhere, "query heads", "a multiple of " + std::to_string(kvHeads) + " KV heads",
                std::to_string(sizes["Hq"]));
        }
        if (sizes["R"] != 1 && sizes["R"] != 2)
        {
            reject(kWhere, "representatives of a block", "1 or 2", std::to_string(sizes["R"]));
        }
        for (int64_t b = 0; b < batch; ++b)
        {
            int64_t const used = count.as<int64_t>()[b];
            if (used < 0 || used > blocks)
            {
                reject(kWhere, "block_count of batch row " + std::to_string(b), "0 to " + std::to_string(blocks),
                    std::to_string(used));
            }
        }
        int64_t* index = run.output(0, {batch, kvHeads, mWidth}).as<int64_t>();
        Call const call{kvHeads, sizes["Hq"] / kvHeads, sizes["S"], blocks, sizes["R"], longest, sizes["D"], mWidth,
            mLargest, query.as<float>(), representatives.as<float>(), slots.as<int64_t>(), count.as<int64_t>(),
            pinned.as<int64_t>(), index};
        std::vector<std::vector<int64_t>> lengths(static_cast<size_t>(batch));
        for (int64_t b = 0; b < batch; ++b)
        {
            // Slots of a block come first, then -1.
            for (int64_t n = 0; n < call.count[b]; ++n)
            {
                int64_t const* first = call.slots + (b * blocks + n) * longest;
                lengths[static_cast<size_t>(b)].push_back(
                    std::partition_point(first, first + longest, [](int64_t slot) { return slot >= 0; }) - first);
            }
        }
        // Where heads have blocks of their own, each is a batch row with one head.
        run.parallel()(static_cast<size_t>(batch * kvHeads), [&](size_t i) {
            int64_t const head = static_cast<int64_t>(i);
            select(call, lengths[static_cast<size_t>(head / kvHeads)], head / kvHeads, head % kvHeads);
        });
    }

private:
    int64_t mWidth;
    bool mLargest;
};
} // namespace

std::vector<std::unique_ptr<Operator>> semanticBlockSelectOperators()
{
    constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    constexpr auto kLong = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    std::vector<std::unique_ptr<Operator>> operators;
    operators.push_back(makeOperator<SemanticBlockSelectKernel>(
        "SemanticBlockSelect", {kFloat, kFloat, kLong, kLong, kLong}, {kLong}, 0));
    return operators;
}
} // namespace semkv::native
