#include "driver.h"

#include <algorithm>
#include <chrono>
#include <iostream>

namespace semkv::test
{
namespace
{
Ids likeliest(float const* logits, semkv_session_info const& info)
{
    Ids tokens;
    for (int32_t row = 0; row < info.batch; ++row, logits += info.vocab_size)
    {
        tokens.push_back(static_cast<int32_t>(std::max_element(logits, logits + info.vocab_size) - logits));
    }
    return tokens;
}
} // namespace

int runBench(Session& session, int32_t steps)
{
    Ids prompt;
    for (int32_t id = 0; std::cin >> id;)
    {
        prompt.push_back(id);
    }
    semkv_session_info const info = session.info();
    Ids tokens = likeliest(session.prefill(std::vector<Ids>(static_cast<size_t>(info.batch), prompt)), info);
    std::vector<double> times;
    Ids chosen;
    for (int32_t i = 0; i < steps; ++i)
    {
        chosen.push_back(tokens.front());
        auto const start = std::chrono::steady_clock::now();
        tokens = likeliest(session.step(tokens), info);
        times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
    }
    std::sort(times.begin(), times.end());
    std::cout << times[times.size() / 4];
    for (int32_t const token : chosen)
    {
        std::cout << ' ' << token;
    }
    std::cout << std::endl;
    return 0;
}
} // namespace semkv::test
