#include "operator.h"

#include "../nexus_attention/kernels.h"
#include "../ort/rows.h"
#include "clusters.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace semkv::native
{
namespace
{
char const* const kWhere = "semkv SemanticCluster";

// Everything of one call.
struct Work
{
    Element element;
    int64_t heads, capacity, size, groups, levels, span;
    Rows const& keys;
    Rows const& values;
    Rows const& bias;
    int64_t const* chunks;
    float const* thresholds;
    int64_t* source;

    int64_t perGroup() const { return heads / groups; }

    // A row of keys or values as float32.
    void widen(Rows const& rows, int64_t row, float* to) const
    {
        nexusAttentionKernels().append(rows.from(row), element, 1, size, to, Element::kFloat32, nullptr);
    }

    float const* biasOf(int64_t head) const { return static_cast<float const*>(bias.from(head * capacity)); }
};

// Keys of a group's heads side by side, each of length 1.
std::vector<float> unitKeys(Work const& work, int64_t b, int64_t g, int64_t used)
{
    int64_t const width = work.perGroup() * work.size;
    std::vector<float> unit(static_cast<size_t>(used * width));
    Dot const dot = dotProduct();
    for (int64_t slot = 0; slot < used; ++slot)
    {
        for (int64_t h = 0; h < work.perGroup(); ++h)
        {
            float* key = unit.data() + slot * width + h * work.size;
            work.widen(work.keys, (b * work.heads + g * work.perGroup() + h) * work.capacity + slot, key);
            float const norm = std::sqrt(dot(key, key, static_cast<size_t>(work.size)));
            float const floored = std::max(norm, 1e-12f);
            std::transform(key, key + work.size, key, [=](float each) { return each / floored; });
        }
    }
    return unit;
}

// The weighted mean of a cluster's rows.
void mean(Work const& work, Rows const& rows, int64_t head, Cluster const& members, std::vector<float> const& weights,
    int64_t to)
{
    std::vector<float> row(static_cast<size_t>(work.size)), sum(row.size(), 0.0f);
    float total = 0.0f;
    for (size_t m = 0; m < members.size(); ++m)
    {
        work.widen(rows, head * work.capacity + members[m], row.data());
        total += weights[m];
        for (size_t d = 0; d < row.size(); ++d)
        {
            sum[d] += weights[m] * row[d];
        }
    }
    std::transform(sum.begin(), sum.end(), sum.begin(), [=](float each) { return each / total; });
    nexusAttentionKernels().append(
        sum.data(), Element::kFloat32, 1, work.size, rows.to(head * work.capacity + to), work.element, nullptr);
}

void writeGroup(Work const& work, int64_t b, int64_t g, std::vector<Cluster> const& clusters, int64_t length)
{
    float const* groupBias = work.biasOf(b * work.heads + g * (work.groups > 1 ? 1 : 0));
    int64_t* source = work.source + (b * work.groups + g) * work.capacity;
    auto const count = static_cast<int64_t>(clusters.size());
    std::fill(source, source + work.capacity, -1);
    for (int64_t to = 0; to < count; ++to)
    {
        Cluster const& members = clusters[static_cast<size_t>(to)];
        source[to] = members.front();
        std::vector<float> weights;
        float total = 0.0f;
        for (int64_t slot : members)
        {
            weights.push_back(std::exp(groupBias[slot]));
            total += weights.back();
        }
        for (int64_t h = g * work.perGroup(); h < (g + 1) * work.perGroup(); ++h)
        {
            int64_t const head = b * work.heads + h, row = head * work.capacity;
            auto* bias = static_cast<float*>(work.bias.to(row));
            if (members.size() == 1)
            {
                work.keys.copy(row + to, row + members[0]);
                work.values.copy(row + to, row + members[0]);
                bias[to] = groupBias[members[0]];
                continue;
            }
            mean(work, work.keys, head, members, weights, to);
            mean(work, work.values, head, members, weights, to);
            bias[to] = std::log(total);
        }
    }
    for (int64_t h = g * work.perGroup(); h < (g + 1) * work.perGroup(); ++h)
    {
        int64_t const row = (b * work.heads + h) * work.capacity;
        work.keys.clear(row + count, work.capacity - count);
        work.values.clear(row + count, work.capacity - count);
        auto* bias = static_cast<float*>(work.bias.to(row));
        std::fill(bias + count, bias + length, -std::numeric_limits<float>::infinity());
        std::fill(bias + length, bias + work.capacity, 0.0f);
    }
}

// A row of the batch that fits: everything comes out as it went in.
void copyRow(Work const& work, int64_t b, int64_t used)
{
    int64_t const first = b * work.heads * work.capacity, count = work.heads * work.capacity;
    work.keys.copy(first, first, count);
    work.values.copy(first, first, count);
    work.bias.copy(first, first, count);
    for (int64_t at = 0; at < work.groups * work.capacity; ++at)
    {
        int64_t const slot = at % work.capacity;
        work.source[b * work.groups * work.capacity + at] = slot < used ? slot : -1;
    }
}

class SemanticClusterKernel
{
public:
    SemanticClusterKernel(int64_t element, OrtKernelInfo const* info)
        : mElement(static_cast<Element>(element))
        , mSpan(attribute(info, "span", int64_t{64}))
    {
    }

    void run(Run const& run) const
    {
        Tensor const keys = run.input(0), values = run.input(1), bias = run.input(2), length = run.input(3);
        Tensor const chunks = run.input(4), thresholds = run.input(5), target = run.input(6);
        Sizes sizes(kWhere);
        sizes.add("key_cache", "B,H,C,D", keys.shape);
        sizes.add("value_cache", "B,H,C,D", values.shape);
        sizes.add("slot_bias", "B,H,C", bias.shape);
        sizes.add("length", "B", length.shape);
        sizes.add("chunk_id", "B,G,L,C", chunks.shape);
        sizes.add("thresholds", "L", thresholds.shape);
        sizes.add("target", "B", target.shape);
        int64_t const batch = sizes["B"], heads = sizes["H"], capacity = sizes["C"], groups = sizes["G"];
        if (groups != 1 && groups != heads)
        {
            reject(kWhere, "groups of chunk_id", "1 or " + std::to_string(heads), std::to_string(groups));
        }
        if (mSpan < 1 || capacity % mSpan != 0)
        {
            reject(kWhere, "the capacity", "a multiple of span " + std::to_string(mSpan), std::to_string(capacity));
        }
        for (int64_t b = 0; b < batch; ++b)
        {
            int64_t const used = length.as<int64_t>()[b];
            if (used < 0 || used > capacity)
            {
                reject(kWhere, "length of batch row " + std::to_string(b), "0 to " + std::to_string(capacity),
                    std::to_string(used));
            }
        }
        Rows const keysOut(run, 0, keys, elementBytes(mElement)), valuesOut(run, 1, values, elementBytes(mElement));
        Rows const biasOut(run, 2, bias, sizeof(float));
        int64_t* lengthOut = run.output(3, {batch}).as<int64_t>();
        int64_t* source = run.output(4, {batch, groups, capacity}).as<int64_t>();
        int64_t* level = run.output(5, {batch}).as<int64_t>();
        Work const work{mElement, heads, capacity, sizes["D"], groups, sizes["L"], mSpan, keysOut, valuesOut, biasOut,
            chunks.as<int64_t>(), thresholds.as<float>(), source};
        for (int64_t b = 0; b < batch; ++b)
        {
            int64_t const used = length.as<int64_t>()[b], wanted = target.as<int64_t>()[b];
            level[b] = -1;
            lengthOut[b] = used;
            if (used <= std::max<int64_t>(wanted, 0) || work.levels == 0)
            {
                copyRow(work, b, used);
                continue;
            }
            cluster(work, b, used, wanted, lengthOut[b], level[b], run.parallel());
        }
    }

private:
    static void cluster(Work const& work, int64_t b, int64_t used, int64_t wanted, int64_t& length, int64_t& level,
        Parallel const& parallel)
    {
        std::vector<GroupSlots> slots;
        for (int64_t g = 0; g < work.groups; ++g)
        {
            float const* bias = work.biasOf(b * work.heads + g);
            slots.emplace_back(
                unitKeys(work, b, g, used), used, work.perGroup() * work.size, work.perGroup(), bias, work.span);
        }
        std::vector<std::vector<Cluster>> found(slots.size());
        for (level = 0; level < work.levels; ++level)
        {
            parallel(slots.size(), [&](size_t g) {
                int64_t const row = (b * work.groups + static_cast<int64_t>(g)) * work.levels + level;
                found[g] = slots[g].clusters(work.chunks + row * work.capacity, work.thresholds[level]);
            });
            length = 0;
            for (std::vector<Cluster> const& clusters : found)
            {
                length = std::max(length, static_cast<int64_t>(clusters.size()));
            }
            if (length <= wanted || level + 1 == work.levels)
            {
                break;
            }
        }
        parallel(slots.size(), [&](size_t g) { writeGroup(work, b, static_cast<int64_t>(g), found[g], length); });
    }

    Element mElement;
    int64_t mSpan;
};
} // namespace

std::vector<std::unique_ptr<Operator>> semanticClusterOperators()
{
    constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    constexpr auto kLong = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    std::vector<std::unique_ptr<Operator>> operators;
    for (auto const& [type, element] : {std::pair(kFloat, Element::kFloat32),
             std::pair(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, Element::kFloat16),
             std::pair(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, Element::kBfloat16)})
    {
        operators.push_back(makeOperator<SemanticClusterKernel>("SemanticCluster",
            {type, type, kFloat, kLong, kLong, kFloat, kLong}, {type, type, kFloat, kLong, kLong, kLong},
            static_cast<int64_t>(element)));
    }
    return operators;
}
} // namespace semkv::native
