#include "operator.h"

#include <algorithm>

namespace semkv::native
{
namespace
{
char const* const kWhere = "semkv SemanticBlockMap";

struct Call
{
    int64_t kvHeads, capacity, headSize, blocks, vectors;
    float const* key;
    int64_t const* start;
    int64_t const* length;
    float* representatives;
};

// What stands for the keys [length,D] of a block: their mean, or each channel's smallest and largest value.
void represent(float const* keys, int64_t length, int64_t headSize, int64_t vectors, float* to)
{
    float* const last = to + (vectors - 1) * headSize;
    std::copy_n(keys, headSize, to);
    std::copy_n(keys, headSize, last);
    for (int64_t n = 1; n < length; ++n)
    {
        float const* const row = keys + n * headSize;
        for (int64_t d = 0; d < headSize; ++d)
        {
            if (vectors == 1)
            {
                to[d] += row[d];
            }
            else
            {
                to[d] = std::min(to[d], row[d]);
                last[d] = std::max(last[d], row[d]);
            }
        }
    }
    for (int64_t d = 0; d < headSize && vectors == 1; ++d)
    {
        to[d] /= static_cast<float>(length);
    }
}

void mapHead(Call const& call, int64_t head)
{
    int64_t const row = head / call.kvHeads * call.blocks, stride = call.vectors * call.headSize;
    float const* const keys = call.key + head * call.capacity * call.headSize;
    for (int64_t n = 0; n < call.blocks; ++n)
    {
        float* const to = call.representatives + (head * call.blocks + n) * stride;
        int64_t const length = call.length[row + n];
        if (length == 0)
        {
            std::fill_n(to, stride, 0.0f);
        }
        else
        {
            represent(keys + call.start[row + n] * call.headSize, length, call.headSize, call.vectors, to);
        }
    }
}

class SemanticBlockMapKernel
{
public:
    SemanticBlockMapKernel(int64_t, OrtKernelInfo const* info)
        : mVectors(attribute(info, "vectors", int64_t{2}))
        , mLongest(attribute(info, "max_block_length", int64_t{40}))
    {
        if (mVectors != 1 && mVectors != 2)
        {
            reject(kWhere, "vectors", "1 or 2", std::to_string(mVectors));
        }
    }

    void run(Run const& run) const
    {
        Tensor const key = run.input(0), start = run.input(1), length = run.input(2);
        Sizes sizes(kWhere);
        sizes.add("key_cache", "B,Hkv,C,D", key.shape);
        sizes.add("block_start", "B,N", start.shape);
        sizes.add("block_length", "B,N", length.shape);
        int64_t const batch = sizes["B"], kvHeads = sizes["Hkv"], blocks = sizes["N"], headSize = sizes["D"];
        float* const representatives
            = run.output(0, {batch, kvHeads, blocks, mVectors, headSize}).as<float>();
        int64_t* slots = run.output(1, {batch, blocks, mLongest}).as<int64_t>();
        for (int64_t i = 0; i < batch * blocks; ++i)
        {
            int64_t const first = start.as<int64_t>()[i], count = length.as<int64_t>()[i];
            checkBlock(i % blocks, first, count, sizes["C"]);
            for (int64_t n = 0; n < mLongest; ++n)
            {
                *slots++ = n < count ? first + n : -1;
            }
        }
        Call const call{kvHeads, sizes["C"], headSize, blocks, mVectors, key.as<float>(), start.as<int64_t>(),
            length.as<int64_t>(), representatives};
        auto const heads = static_cast<size_t>(batch * kvHeads);
        auto const map = [&](size_t head) { mapHead(call, static_cast<int64_t>(head)); };
        if (blocks > 1)
        {
            run.parallel()(heads, map);
            return;
        }
        // One block, of a step: less work than waking a thread.
        for (size_t head = 0; head < heads; ++head)
        {
            map(head);
        }
    }

private:
    void checkBlock(int64_t number, int64_t first, int64_t count, int64_t capacity) const
    {
        std::string const where = "block " + std::to_string(number);
        if (count < 0 || count > mLongest)
        {
            reject(kWhere, where + " has a length out of range", "0 to " + std::to_string(mLongest),
                std::to_string(count));
        }
        if (count > 0 && (first < 0 || first > capacity - count))
        {
            reject(kWhere, where + " reaches outside the cache", "slots 0 to " + std::to_string(capacity - 1),
                std::to_string(first) + " to " + std::to_string(first + count - 1));
        }
    }

    int64_t mVectors, mLongest;
};
} // namespace

std::vector<std::unique_ptr<Operator>> semanticBlockMapOperators()
{
    constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    constexpr auto kLong = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    std::vector<std::unique_ptr<Operator>> operators;
    operators.push_back(makeOperator<SemanticBlockMapKernel>(
        "SemanticBlockMap", {kFloat, kLong, kLong}, {kFloat, kLong}, 0));
    return operators;
}
} // namespace semkv::native
