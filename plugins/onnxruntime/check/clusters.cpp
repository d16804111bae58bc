// SemanticCluster against plain loops: the same sources, lengths and levels, and rows within the type's rounding.
#include "check.h"
#include "semantic_cluster/semantic_cluster.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <map>

namespace semkv::native
{
namespace
{
struct ClusterCase
{
    Element element;
    int64_t heads, groups, size, capacity, span;
    bool turned, seedKeys;
};

// Inputs and outputs of a call, each as large as it has to be.
struct Buffers
{
    Bytes keys, values, keysOut, valuesOut, scales, keyScalesOut, scalesOut, bias, biasOut, position, frequency, length, chunk,
        thresholds, target, lengthOut, source, level;

    Buffers(ClusterCase const& c, int64_t batch, int64_t levels)
        : keys(rows(c, batch))
        , values(rows(c, batch))
        , keysOut(rows(c, batch))
        , valuesOut(rows(c, batch))
        , scales(slots(c, batch) * 4)
        , keyScalesOut(slots(c, batch) * 4)
        , scalesOut(slots(c, batch) * 4)
        , bias(slots(c, batch) * 4)
        , biasOut(slots(c, batch) * 4)
        , position(slots(c, batch) * 8)
        , frequency(static_cast<size_t>(c.size / 2) * 4)
        , length(static_cast<size_t>(batch) * 8)
        , chunk(static_cast<size_t>(batch * c.groups * levels * c.capacity) * 8)
        , thresholds(static_cast<size_t>(levels) * 4)
        , target(static_cast<size_t>(batch) * 8)
        , lengthOut(static_cast<size_t>(batch) * 8)
        , source(static_cast<size_t>(batch * c.groups * c.capacity) * 8)
        , level(static_cast<size_t>(batch) * 8)
    {
    }

    static size_t slots(ClusterCase const& c, int64_t batch) { return static_cast<size_t>(batch * c.heads * c.capacity); }
    static size_t rows(ClusterCase const& c, int64_t batch)
    {
        return slots(c, batch) * static_cast<size_t>(c.size) * elementBytes(c.element);
    }
};

// One group of a batch row, in double.
class Plain
{
public:
    Plain(ClusterCase const& c, SemanticClusterCall const& call, Buffers const& buffers, int64_t b, int64_t g)
        : mCase(c)
        , mCall(call)
        , mBuffers(buffers)
        , mB(b)
        , mG(g)
    {
    }

    double element(Bytes const& cache, int64_t h, int64_t slot, int64_t d) const
    {
        int64_t const row = (mB * mCase.heads + h) * mCase.capacity + slot;
        double const scale = mCase.element == Element::kInt8 ? mBuffers.scales.as<float>()[row] : 1.0;
        return scale * read(cache, static_cast<size_t>(row * mCase.size + d), mCase.element);
    }

    // A key as it is compared.
    std::vector<double> key(int64_t h, int64_t slot) const
    {
        std::vector<double> row(static_cast<size_t>(mCase.size));
        for (int64_t d = 0; d < mCase.size; ++d)
        {
            row[static_cast<size_t>(d)] = element(mBuffers.keys, h, slot, d);
        }
        auto const half = static_cast<size_t>(mCase.turned ? mCall.frequencies : 0);
        for (size_t i = 0; i < half; ++i)
        {
            float const angle = static_cast<float>(mCall.position[(mB * mCase.groups + mG) * mCase.capacity + slot])
                * mCall.frequency[i];
            double const first = row[i], second = row[half + i], cosine = std::cos(double{angle}),
                         sine = std::sin(double{angle});
            row[i] = first * cosine + second * sine;
            row[half + i] = second * cosine - first * sine;
        }
        return row;
    }

    double similarity(int64_t one, int64_t other) const
    {
        double sum = 0;
        int64_t const count = mCall.perGroup();
        for (int64_t h = mG * count; h < (mG + 1) * count; ++h)
        {
            std::vector<double> const a = key(h, one), b = key(h, other);
            double dot = 0, ofA = 0, ofB = 0;
            for (size_t d = 0; d < a.size(); ++d)
            {
                dot += a[d] * b[d];
                ofA += a[d] * a[d];
                ofB += b[d] * b[d];
            }
            sum += dot / std::max(std::sqrt(ofA), 1e-12) / std::max(std::sqrt(ofB), 1e-12);
        }
        return sum / static_cast<double>(count);
    }

    // Seeds and their members.
    std::map<int64_t, std::vector<int64_t>> clusters(int64_t level) const
    {
        float const* bias = mCall.bias + (mB * mCase.heads + mG) * mCase.capacity;
        int64_t const* chunk
            = mCall.chunk + ((mB * mCase.groups + mG) * mCall.levels + level) * mCase.capacity;
        std::map<int64_t, std::vector<int64_t>> found;
        for (int64_t slot = 0; slot < mCall.length[mB]; ++slot)
        {
            if (!(bias[slot] > -std::numeric_limits<float>::infinity()))
            {
                continue;
            }
            int64_t owner = slot;
            for (auto const& [seed, members] : found)
            {
                if (chunk[slot] >= 0 && chunk[seed] == chunk[slot] && slot - seed < mCase.span
                    && similarity(seed, slot) > mCall.thresholds[level])
                {
                    owner = seed;
                    break;
                }
            }
            found[owner].push_back(slot);
        }
        return found;
    }

private:
    ClusterCase const& mCase;
    SemanticClusterCall const& mCall;
    Buffers const& mBuffers;
    int64_t mB, mG;
};

// What is wrong with a batch row's outputs; empty: nothing.
char const* wrong(ClusterCase const& c, SemanticClusterCall const& call, Buffers const& buffers, int64_t b)
{
    if (call.length[b] <= call.target[b])
    {
        return call.level[b] == -1 && call.lengthOut[b] == call.length[b] ? nullptr : "a row that fits";
    }
    for (int64_t g = 0; g < c.groups; ++g)
    {
        Plain const plain(c, call, buffers, b, g);
        auto const found = plain.clusters(call.level[b]);
        int64_t to = 0;
        for (auto const& [seed, members] : found)
        {
            if (call.source[(b * c.groups + g) * c.capacity + to] != seed)
            {
                return "the sources";
            }
            double const allowed = c.element == Element::kFloat32 ? 1e-5 : 4e-2;
            for (int64_t h = g * call.perGroup(); h < (g + 1) * call.perGroup(); ++h)
            {
                double total = 0;
                int64_t const at = (b * c.heads + h) * c.capacity + to;
                for (int64_t slot : members)
                {
                    total += std::exp(call.bias[(b * c.heads + g) * c.capacity + slot]);
                }
                if (std::abs(call.biasOut[at] - std::log(total)) > 1e-5)
                {
                    return "the biases";
                }
                bool const codes = c.element == Element::kInt8;
                double const scale = codes ? buffers.scalesOut.as<float>()[at] : 1.0;
                double const keyScale = codes ? buffers.keyScalesOut.as<float>()[at] : 1.0;
                for (int64_t d = 0; d < c.size; ++d)
                {
                    double mean = 0;
                    for (int64_t slot : members)
                    {
                        double const weight = std::exp(call.bias[(b * c.heads + g) * c.capacity + slot]);
                        mean += weight / total * plain.element(buffers.values, h, slot, d);
                    }
                    auto const i = static_cast<size_t>(at * c.size + d);
                    if (std::abs(scale * read(buffers.valuesOut, i, c.element) - mean) > allowed)
                    {
                        return "the values";
                    }
                    double const key = keyScale * read(buffers.keysOut, i, c.element);
                    if (c.seedKeys && std::abs(key - plain.element(buffers.keys, h, seed, d)) > 1e-5)
                    {
                        return "the keys";
                    }
                }
            }
            ++to;
        }
        if (to > call.lengthOut[b] || (c.groups == 1 && to != call.lengthOut[b]))
        {
            return "the length";
        }
    }
    return nullptr;
}

char const* run(ClusterCase const& c, std::mt19937& random)
{
    int64_t const batch = 3, levels = 3;
    Buffers buffers(c, batch, levels);
    size_t const slots = Buffers::slots(c, batch), elements = slots * static_cast<size_t>(c.size);
    fill(buffers.keys, elements, c.element, random);
    fill(buffers.values, elements, c.element, random);
    for (size_t i = 0; i < slots; ++i)
    {
        buffers.scales.as<float>()[i] = 0.25f;
        buffers.bias.as<float>()[i] = 0.5f * static_cast<float>(i % static_cast<size_t>(c.capacity) % 3);
        buffers.position.as<int64_t>()[i] = static_cast<int64_t>(7 * i % 5000);
    }
    for (int64_t i = 0; i < c.size / 2; ++i)
    {
        buffers.frequency.as<float>()[i] = std::pow(0.1f, static_cast<float>(i) / 2);
    }
    for (int64_t i = 0; i < batch * c.groups * levels * c.capacity; ++i)
    {
        int64_t const slot = i % c.capacity;
        buffers.chunk.as<int64_t>()[i] = slot < 3 || slot > c.capacity - 9 || random() % 8 == 0 ? -1 : slot / 23;
    }
    std::copy_n(std::vector<float>{0.6137f, 0.3071f, 0.0513f}.data(), levels, buffers.thresholds.as<float>());
    for (int64_t b = 0; b < batch; ++b)
    {
        buffers.length.as<int64_t>()[b] = c.capacity - 5 * b;
        buffers.target.as<int64_t>()[b] = b == 1 ? c.capacity : c.capacity * (3 + b) / 6;
    }
    bool const codes = c.element == Element::kInt8;
    float const* scales = codes ? buffers.scales.as<float>() : nullptr;
    SemanticClusterCall const call{
        {buffers.keys.data.get(), buffers.keysOut.data.get(), scales, codes ? buffers.keyScalesOut.as<float>() : nullptr},
        {buffers.values.data.get(), buffers.valuesOut.data.get(), scales,
            codes ? buffers.scalesOut.as<float>() : nullptr},
        buffers.bias.as<float>(), buffers.biasOut.as<float>(), buffers.length.as<int64_t>(),
        buffers.chunk.as<int64_t>(), buffers.thresholds.as<float>(), buffers.target.as<int64_t>(),
        c.turned ? buffers.position.as<int64_t>() : nullptr, buffers.frequency.as<float>(),
        buffers.lengthOut.as<int64_t>(), buffers.source.as<int64_t>(), buffers.level.as<int64_t>(), batch, c.heads,
        c.capacity, c.size, c.groups, levels, c.turned ? c.size / 2 : 0, c.span, c.seedKeys, c.element};
    semanticCluster(call, kThreads);
    for (int64_t b = 0; b < batch; ++b)
    {
        if (char const* const what = wrong(c, call, buffers, b))
        {
            return what;
        }
    }
    return nullptr;
}
} // namespace

void checkClusters(int& cases, int& failed)
{
    std::mt19937 random(2);
    for (Element element : {Element::kFloat32, Element::kFloat16, Element::kBfloat16, Element::kInt8})
    {
        for (auto const& [heads, groups, size] : {std::tuple(3, 1, 6), std::tuple(2, 2, 20), std::tuple(1, 1, 64)})
        {
            for (bool turned : {false, true})
            {
                ClusterCase const c{element, heads, groups, size, 96, size == 20 ? 32 : 16, turned, heads != 2};
                char const* const what = run(c, random);
                ++cases;
                if (what != nullptr)
                {
                    ++failed;
                    std::printf("clusters of type %d, %d heads of %d in %d groups, %s: wrong: %s\n",
                        static_cast<int>(element), heads, size, groups, turned ? "rotated" : "as they lie", what);
                }
            }
        }
    }
}
} // namespace semkv::native
