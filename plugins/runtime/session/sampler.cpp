#include "session/sampler.h"

#include "common/error.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace semkv::runtime
{
Sampler::Sampler(Sampling const& how)
    : mHow(how)
    , mRandom(how.seed)
{
    auto const reject = [](char const* where, char const* expected, double got) {
        throw Error(SEMKV_BAD_ARGUMENT, "out of range").where(where).expected(expected).got(std::to_string(got));
    };
    if (!(how.temperature >= 0) || !std::isfinite(how.temperature))
    {
        reject("temperature", "0 or more", how.temperature);
    }
    if (!(how.topP > 0) || how.topP > 1)
    {
        reject("top_p", "0 < top_p <= 1", how.topP);
    }
    if (how.topK < 0)
    {
        reject("top_k", "0 (all) or more", static_cast<double>(how.topK));
    }
}

void Sampler::skip()
{
    if (mHow.temperature > 0)
    {
        mRandom.uniform();
    }
}

int64_t Sampler::choose(float const* logits, int64_t vocab)
{
    float largest = logits[0];
    bool finite = true;
    for (int64_t i = 0; i < vocab; ++i)
    {
        finite = finite && !std::isnan(logits[i]);
        largest = std::max(largest, logits[i]);
    }
    if (!finite || !std::isfinite(largest))
    {
        throw Error(SEMKV_RUNTIME, "the model's logits are not finite numbers")
            .where("sampling")
            .fix("validate the bundle, or build it with other --weights or --dtype");
    }
    if (mHow.temperature == 0)
    {
        return std::max_element(logits, logits + vocab) - logits;
    }
    std::vector<double> probability(static_cast<size_t>(vocab));
    for (size_t i = 0; i < probability.size(); ++i)
    {
        probability[i] = (static_cast<double>(logits[i]) - static_cast<double>(largest)) / mHow.temperature;
    }
    std::vector<int64_t> order(probability.size());
    std::iota(order.begin(), order.end(), 0);
    auto const likelier = [&](int64_t a, int64_t b) {
        double const one = probability[static_cast<size_t>(a)], other = probability[static_cast<size_t>(b)];
        return one != other ? one > other : a < b;
    };
    if (mHow.topK > 0 && mHow.topK < vocab)
    {
        std::partial_sort(order.begin(), order.begin() + mHow.topK, order.end(), likelier);
        order.resize(static_cast<size_t>(mHow.topK));
    }
    else
    {
        std::sort(order.begin(), order.end(), likelier);
    }
    double total = 0;
    for (int64_t const token : order)
    {
        double& each = probability[static_cast<size_t>(token)];
        total += each = std::exp(each);
    }
    // The token that crosses top_p belongs to the nucleus.
    std::vector<double> cumulated;
    double mass = 0;
    for (int64_t const token : order)
    {
        mass += probability[static_cast<size_t>(token)] / total;
        cumulated.push_back(mass);
        if (mass >= mHow.topP)
        {
            break;
        }
    }
    double const drawn = mRandom.uniform() * mass;
    auto const chosen = std::upper_bound(cumulated.begin(), cumulated.end(), drawn);
    size_t const place = std::min(static_cast<size_t>(chosen - cumulated.begin()), cumulated.size() - 1);
    return order[place];
}
} // namespace semkv::runtime
