// Runs the kernels on threads of its own, with every buffer as large as it has to be and not a byte larger: what the
// sanitizers watch. Compares each result with a plain loop. Exit status 0: all cases agree.
#include "check.h"
#include "nexus_attention/nexus_attention.h"

#include <cstdio>

using namespace semkv::native;

namespace
{
struct Case
{
    Element element;
    Element cache;
    int64_t rows, heads, kvHeads, size, width;
    bool mass;
};

// The largest difference of an output from plain loops over what the caches hold after the call.
double difference(Case const& c, NexusAttentionCall const& call, Bytes const& query, Bytes const& keys, Bytes const& values,
    Bytes const& output)
{
    double worst = 0;
    int64_t const group = c.heads / c.kvHeads;
    for (int64_t row = 0; row < call.batch * c.heads * c.rows; ++row)
    {
        int64_t const s = row % c.rows, head = row / c.rows, b = head / c.heads, h = head % c.heads / group;
        int64_t const kv = b * c.kvHeads + h, length = call.length[b];
        std::vector<int64_t> slots;
        for (int64_t j = 0; j < (c.width ? c.width : length); ++j)
        {
            int64_t const slot = c.width ? call.slotIndex[kv * c.width + j] : j;
            if (slot >= 0)
            {
                slots.push_back(slot);
            }
        }
        for (int64_t j = 0; j <= s; ++j)
        {
            slots.push_back(length + j);
        }
        std::vector<double> sum(static_cast<size_t>(c.size));
        double total = 0;
        for (int64_t slot : slots)
        {
            auto const at = static_cast<size_t>((kv * call.capacity + slot) * c.size);
            size_t const scale = static_cast<size_t>(kv * call.capacity + slot);
            double logit = 0;
            for (int64_t d = 0; d < c.size; ++d)
            {
                auto const i = static_cast<size_t>(d);
                logit += read(query, static_cast<size_t>(row * c.size) + i, c.element) * read(keys, at + i, c.cache);
            }
            logit *= call.scale * (call.keyScale ? call.keyScale[scale] : 1.0f);
            double const weight = std::exp(logit + (slot < length ? call.slotBias[scale] : 0.0f));
            total += weight;
            for (int64_t d = 0; d < c.size; ++d)
            {
                sum[static_cast<size_t>(d)] += weight * read(values, at + static_cast<size_t>(d), c.cache)
                    * (call.valueScale ? call.valueScale[scale] : 1.0f);
            }
        }
        for (int64_t d = 0; d < c.size; ++d)
        {
            double const got = read(output, static_cast<size_t>(row * c.size + d), c.element);
            worst = std::max(worst, std::abs(got - sum[static_cast<size_t>(d)] / total));
        }
    }
    return worst;
}

double run(Case const& c, int64_t batch, int64_t capacity, std::mt19937& random)
{
    auto const cacheCount = static_cast<size_t>(batch * c.kvHeads * capacity * c.size);
    auto const queries = static_cast<size_t>(batch * c.heads * c.rows * c.size);
    auto const news = static_cast<size_t>(batch * c.kvHeads * c.rows * c.size);
    auto const slots = static_cast<size_t>(batch * c.kvHeads * capacity);
    size_t const element = elementBytes(c.element), cacheElement = elementBytes(c.cache);
    Bytes query(queries * element), key(news * element), value(news * element), output(queries * element);
    Bytes keys(cacheCount * cacheElement), values(cacheCount * cacheElement), bias(slots * 4), mass(slots * 4);
    Bytes keyScale(slots * 4), valueScale(slots * 4), length(static_cast<size_t>(batch) * 8);
    Bytes index(static_cast<size_t>(batch * c.kvHeads * c.width) * 8);
    fill(query, queries, c.element, random);
    fill(key, news, c.element, random);
    fill(value, news, c.element, random);
    fill(keys, cacheCount, c.cache, random);
    fill(values, cacheCount, c.cache, random);
    fill(bias, slots, Element::kFloat32, random);
    for (size_t i = 0; i < slots; ++i)
    {
        keyScale.as<float>()[i] = valueScale.as<float>()[i] = 0.25f;
    }
    for (int64_t b = 0; b < batch; ++b)
    {
        length.as<int64_t>()[b] = (capacity - c.rows) * b / (batch > 1 ? batch - 1 : 1);
        for (int64_t i = 0; i < c.kvHeads * c.width; ++i)
        {
            int64_t const used = length.as<int64_t>()[b];
            index.as<int64_t>()[b * c.kvHeads * c.width + i] = used && i % 4 ? static_cast<int64_t>(random()) % used : -1;
        }
    }
    bool const codes = c.cache == Element::kInt8;
    NexusAttentionCall const call{query.data.get(), key.data.get(), value.data.get(), keys.data.get(), values.data.get(),
        codes ? keyScale.as<float>() : nullptr, codes ? valueScale.as<float>() : nullptr, bias.as<float>(),
        length.as<int64_t>(), c.width ? index.as<int64_t>() : nullptr, output.data.get(),
        c.mass ? mass.as<float>() : nullptr, batch, c.heads, c.kvHeads, c.rows, capacity, c.size, c.width, 0.3f, 0.0f, 0,
        true, c.element, c.cache};
    nexusAttention(call, kThreads);
    double worst = difference(c, call, query, keys, values, output);
    for (int64_t head = 0; c.mass && head < batch * c.kvHeads; ++head)
    {
        double total = 0;
        for (int64_t slot = 0; slot < capacity; ++slot)
        {
            total += mass.as<float>()[head * capacity + slot];
        }
        worst = std::max(worst, std::abs(total / static_cast<double>(c.rows * c.heads / c.kvHeads) - 1.0));
    }
    return worst;
}
} // namespace

int main()
{
    std::mt19937 random(1);
    Element const f32 = Element::kFloat32, f16 = Element::kFloat16, bf16 = Element::kBfloat16, i8 = Element::kInt8;
    int cases = 0, failed = 0;
    for (auto const& [element, cache] : {std::pair(f32, f32), std::pair(f16, f16), std::pair(bf16, bf16),
             std::pair(f32, f16), std::pair(f32, bf16), std::pair(f32, i8), std::pair(f16, i8)})
    {
        for (int64_t rows : {1, 3, 37})
        {
            for (auto const& [heads, kvHeads, size, width] : {std::tuple(3, 1, 64, 0), std::tuple(4, 2, 20, 0),
                     std::tuple(6, 2, 80, 50), std::tuple(2, 2, 8, 3)})
            {
                Case const c{element, cache, rows, heads, kvHeads, size, width, rows != 3};
                double const worst = run(c, 3, 400, random);
                double const allowed = element == f32 ? 1e-4 : element == f16 ? 4e-3 : 2e-2;
                ++cases;
                if (!(worst <= allowed))
                {
                    ++failed;
                    std::printf("types %d and %d, %ld rows, %d of %d heads of %d, width %d: off by %g\n",
                        static_cast<int>(element), static_cast<int>(cache), static_cast<long>(rows), heads, kvHeads, size,
                        width, worst);
                }
            }
        }
    }
    checkClusters(cases, failed);
    checkFits(cases, failed);
    std::printf("%s: %d cases, %d failed\n", nexusAttentionTarget(), cases, failed);
    return failed != 0;
}
