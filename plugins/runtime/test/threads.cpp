#include "driver.h"

#include <atomic>
#include <chrono>
#include <iostream>
#include <thread>

namespace semkv::test
{
namespace
{
std::vector<Ids> prompts(int32_t rows, int32_t seed)
{
    std::vector<Ids> all(static_cast<size_t>(rows));
    for (int32_t row = 0; row < rows; ++row)
    {
        for (int32_t i = 0; i < 90; ++i)
        {
            all[static_cast<size_t>(row)].push_back(2 + (i * 7 + row * 31 + seed) % 500);
        }
    }
    return all;
}

GenerateOptions greedy(int32_t most)
{
    GenerateOptions options;
    options.maxNewTokens = most;
    options.bundleStops = false;
    return options;
}
} // namespace

int runThreads(Bundle const& bundle, int32_t rows)
{
    std::vector<Ids> const alone = bundle.session({0, rows, 1}).generate(prompts(rows, 1), greedy(24));
    std::atomic<bool> over{false};
    std::atomic<int> cancelled{0}, wrong{0};
    Session broken = bundle.session({0, rows, 1});
    std::thread steady([&] {
        Session session = bundle.session({0, rows, 1});
        for (int i = 0; i < 3; ++i)
        {
            wrong += session.generate(prompts(rows, 1), greedy(24)) != alone;
            session.endTurn();
            session.reset();
        }
    });
    std::thread other([&] {
        for (int i = 0; i < 3; ++i)
        {
            size_t given = 0;
            try
            {
                broken.reset();
                broken.generate(prompts(rows, 2), greedy(400), [&](int32_t row, int32_t) {
                    given += row == 0;
                    return true;
                });
            }
            catch (Error const& error)
            {
                cancelled += error.code() == SEMKV_CANCELLED;
                // What was given out is in the cache.
                wrong += given > 0 && broken.stats().position < static_cast<int64_t>(90 + given);
            }
        }
        over = true;
    });
    std::thread third([&] {
        while (!over)
        {
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            broken.cancel();
        }
    });
    steady.join();
    other.join();
    third.join();
    std::cout << "cancelled " << cancelled << ", wrong " << wrong << std::endl;
    return cancelled == 3 && wrong == 0 ? 0 : 1;
}
} // namespace semkv::test
