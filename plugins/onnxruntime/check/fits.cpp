// Attention Matching's fit against plain loops in double, with the same number of steps.
#include "check.h"
#include "compact_cache/fit.h"

#include <algorithm>
#include <cstdio>
#include <numeric>

namespace semkv::native
{
namespace
{
using Table = std::vector<std::vector<double>>;

// x with (m m^T + ridge) x = wanted, column by column, m [queries,slots].
Table solve(Table const& m, Table const& wanted)
{
    size_t const queries = m.size(), width = wanted[0].size();
    Table gram(queries, std::vector<double>(queries)), solution(queries, std::vector<double>(width));
    double trace = 0;
    for (size_t r = 0; r < queries; ++r)
    {
        for (size_t s = 0; s < queries; ++s)
        {
            gram[r][s] = std::inner_product(m[r].begin(), m[r].end(), m[s].begin(), 0.0);
        }
        trace += gram[r][r];
    }
    double const ridge = 0.05 * trace / static_cast<double>(queries);
    for (size_t column = 0; column < width; ++column)
    {
        std::vector<double> residual(queries), direction(queries), image(queries);
        for (size_t r = 0; r < queries; ++r)
        {
            residual[r] = direction[r] = wanted[r][column];
        }
        double square = std::inner_product(residual.begin(), residual.end(), residual.begin(), 0.0);
        for (int step = 0; step < 40; ++step)
        {
            for (size_t r = 0; r < queries; ++r)
            {
                image[r] = std::inner_product(gram[r].begin(), gram[r].end(), direction.begin(), ridge * direction[r]);
            }
            double const length = square
                / std::max(std::inner_product(direction.begin(), direction.end(), image.begin(), 0.0), 1e-20);
            for (size_t r = 0; r < queries; ++r)
            {
                solution[r][column] += length * direction[r];
                residual[r] -= length * image[r];
            }
            double const next = std::inner_product(residual.begin(), residual.end(), residual.begin(), 0.0);
            for (size_t r = 0; r < queries; ++r)
            {
                direction[r] = residual[r] + next / std::max(square, 1e-20) * direction[r];
            }
            square = next;
        }
    }
    return solution;
}

double worstOf(Element element, int64_t size, int64_t queryCount, std::mt19937& random)
{
    int64_t const length = 90, first = 3;
    auto const rows = static_cast<size_t>(first + length), width = static_cast<size_t>(size);
    size_t const bytes = elementBytes(element);
    Bytes keys(rows * width * bytes), values(rows * width * bytes), out(rows * width * bytes), scales(rows * 4);
    Bytes scalesOut(rows * 4), bias(static_cast<size_t>(length) * 4), biasOut(static_cast<size_t>(length) * 4);
    Bytes queries(static_cast<size_t>(queryCount) * width * 4);
    fill(keys, rows * width, element, random);
    fill(values, rows * width, element, random);
    bool const codes = element == Element::kInt8;
    std::vector<int64_t> kept, used;
    for (int64_t slot = 0; slot < length; ++slot)
    {
        bias.as<float>()[slot] = 0.25f * static_cast<float>(slot % 3);
        if (slot % 3 != 1)
        {
            biasOut.as<float>()[kept.size()] = bias.as<float>()[slot];
            kept.push_back(slot);
        }
    }
    for (size_t row = 0; row < rows; ++row)
    {
        scales.as<float>()[row] = 0.5f;
    }
    for (int64_t r = 0; r < queryCount; ++r)
    {
        for (int64_t d = 0; d < size && r % 5 != 2; ++d)
        {
            queries.as<float>()[r * size + d] = static_cast<float>(random() % 2001) / 4000.0f - 0.25f;
        }
        if (r % 5 != 2)
        {
            used.push_back(r);
        }
    }
    fitKernels().fit({element, size, first, length, keys.data.get(), values.data.get(),
        codes ? scales.as<float>() : nullptr, codes ? scales.as<float>() : nullptr, bias.as<float>(), kept.data(),
        static_cast<int64_t>(kept.size()), queries.as<float>(), queryCount, true, out.data.get(),
        codes ? scalesOut.as<float>() : nullptr, biasOut.as<float>()});

    auto const elementOf = [&](Bytes const& cache, int64_t row, int64_t d, double scale) {
        return scale * read(cache, static_cast<size_t>((first + row) * size + d), element);
    };
    double const scale = codes ? 0.5 : 1.0;
    auto const live = static_cast<size_t>(length);
    Table whole(used.size(), std::vector<double>(live)), shares(used.size()), lost(used.size(), {1.0});
    for (size_t r = 0; r < used.size(); ++r)
    {
        double total = 0;
        for (int64_t slot = 0; slot < length; ++slot)
        {
            double logit = bias.as<float>()[slot];
            for (int64_t d = 0; d < size; ++d)
            {
                logit += queries.as<float>()[used[r] * size + d] * elementOf(keys, slot, d, scale);
            }
            total += whole[r][static_cast<size_t>(slot)] = std::exp(logit);
        }
        for (double& each : whole[r])
        {
            each /= total;
        }
        for (int64_t slot : kept)
        {
            shares[r].push_back(whole[r][static_cast<size_t>(slot)]);
            lost[r][0] -= shares[r].back();
        }
    }
    double worst = 0;
    Table const more = solve(shares, lost);
    std::vector<double> counted(kept.size(), 1.0);
    for (size_t j = 0; j < kept.size(); ++j)
    {
        for (size_t r = 0; r < used.size(); ++r)
        {
            counted[j] += shares[r][j] * more[r][0];
        }
        counted[j] = std::min(std::max(counted[j], std::exp(-3.0)), std::exp(3.0));
        double const grown = std::exp(biasOut.as<float>()[j] - bias.as<float>()[kept[j]]);
        worst = std::max(worst, std::abs(grown - counted[j]));
    }
    Table missing(used.size(), std::vector<double>(width));
    for (size_t r = 0; r < used.size(); ++r)
    {
        double total = 0;
        for (size_t j = 0; j < kept.size(); ++j)
        {
            total += shares[r][j] *= counted[j];
        }
        for (size_t j = 0; j < kept.size(); ++j)
        {
            shares[r][j] /= total;
            whole[r][static_cast<size_t>(kept[j])] -= shares[r][j];
        }
        for (int64_t slot = 0; slot < length; ++slot)
        {
            for (int64_t d = 0; d < size; ++d)
            {
                missing[r][static_cast<size_t>(d)]
                    += whole[r][static_cast<size_t>(slot)] * elementOf(values, slot, d, scale);
            }
        }
    }
    Table const change = solve(shares, missing);
    for (size_t j = 0; j < kept.size(); ++j)
    {
        double const outScale = codes ? scalesOut.as<float>()[static_cast<size_t>(first) + j] : 1.0;
        for (int64_t d = 0; d < size; ++d)
        {
            double value = elementOf(values, kept[j], d, scale);
            for (size_t r = 0; r < used.size(); ++r)
            {
                value += shares[r][j] * change[r][static_cast<size_t>(d)];
            }
            worst = std::max(worst, std::abs(elementOf(out, static_cast<int64_t>(j), d, outScale) - value));
        }
    }
    return worst;
}
} // namespace

void checkFits(int& cases, int& failed)
{
    std::mt19937 random(3);
    // Steps carry rounding along: as much in float32 as the types that are narrower round.
    double const allowed = 2e-2;
    for (Element element : {Element::kFloat32, Element::kFloat16, Element::kBfloat16, Element::kInt8})
    {
        for (auto const& [size, queries] : {std::pair(20, 37), std::pair(64, 128), std::pair(6, 1)})
        {
            double const worst = worstOf(element, size, queries, random);
            ++cases;
            if (!(worst <= allowed))
            {
                ++failed;
                std::printf("fit of type %d, heads of %d, %d queries: off by %g\n", static_cast<int>(element), size,
                    queries, worst);
            }
        }
    }
}
} // namespace semkv::native
