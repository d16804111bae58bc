#include "operator.h"

#include "../ort/rows.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace semkv::native
{
namespace
{
char const* const kWhere = "semkv CompactCache";

class CompactCacheKernel
{
public:
    CompactCacheKernel(int64_t elementSize, OrtKernelInfo const*)
        : mElementSize(static_cast<size_t>(elementSize))
    {
    }

    void run(Run const& run) const
    {
        Tensor const keys = run.input(0), values = run.input(1), bias = run.input(2), index = run.input(3);
        Sizes sizes(kWhere);
        sizes.add("key_cache", "B,H,C,D", keys.shape);
        sizes.add("value_cache", "B,H,C,D", values.shape);
        sizes.add("slot_bias", "B,H,C", bias.shape);
        sizes.add("keep_index", "B,G,C", index.shape);
        int64_t const batch = sizes["B"], heads = sizes["H"], capacity = sizes["C"], groups = sizes["G"];
        if (groups != 1 && groups != heads)
        {
            reject(kWhere, "groups of keep_index", "1 or " + std::to_string(heads), std::to_string(groups));
        }
        int64_t const* keep = index.as<int64_t>();
        int64_t const* beyond
            = std::find_if(keep, keep + batch * groups * capacity, [=](int64_t slot) { return slot >= capacity; });
        if (beyond != keep + batch * groups * capacity)
        {
            reject(kWhere, "keep_index names a slot outside the cache", "below " + std::to_string(capacity),
                std::to_string(*beyond));
        }
        Rows const keysOut(run, 0, keys, mElementSize), valuesOut(run, 1, values, mElementSize);
        Rows const biasOut(run, 2, bias, sizeof(float));
        int64_t* length = run.output(3, {batch}).as<int64_t>();
        for (int64_t b = 0; b < batch; ++b)
        {
            length[b] = 0;
            for (int64_t g = 0; g < groups; ++g)
            {
                int64_t const* first = keep + (b * groups + g) * capacity;
                int64_t const kept = std::count_if(first, first + capacity, [](int64_t slot) { return slot >= 0; });
                length[b] = std::max(length[b], kept);
            }
        }
        run.parallel()(static_cast<size_t>(batch * heads), [&](size_t head) {
            int64_t const b = static_cast<int64_t>(head) / heads, h = static_cast<int64_t>(head) % heads;
            int64_t const* wanted = keep + (b * groups + h * groups / heads) * capacity;
            int64_t const row = static_cast<int64_t>(head) * capacity;
            int64_t to = 0;
            for (int64_t n = 0; n < capacity; ++n)
            {
                if (wanted[n] >= 0)
                {
                    keysOut.copy(row + to, row + wanted[n]);
                    valuesOut.copy(row + to, row + wanted[n]);
                    biasOut.copy(row + to, row + wanted[n]);
                    ++to;
                }
            }
            keysOut.clear(row + to, capacity - to);
            valuesOut.clear(row + to, capacity - to);
            auto* biases = static_cast<float*>(biasOut.to()) + row;
            std::fill(biases + to, biases + std::max(to, length[b]), -std::numeric_limits<float>::infinity());
            std::fill(biases + std::max(to, length[b]), biases + capacity, 0.0f);
        });
    }

private:
    size_t mElementSize;
};
} // namespace

std::vector<std::unique_ptr<Operator>> compactCacheOperators()
{
    constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    constexpr auto kLong = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    std::vector<std::unique_ptr<Operator>> operators;
    for (auto const& [type, bytes] : {std::pair(kFloat, 4), std::pair(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2),
             std::pair(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, 2)})
    {
        operators.push_back(makeOperator<CompactCacheKernel>(
            "CompactCache", {type, type, kFloat, kLong}, {type, type, kFloat, kLong}, bytes));
    }
    return operators;
}
} // namespace semkv::native
