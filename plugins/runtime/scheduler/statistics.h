// What a scheduler counts. As semkv_deploy/serve/statistics.py.
#pragma once

#include <cstdint>

namespace semkv::runtime
{
// Counters since the start, and what is held now, by the names that the Python fronts give them.
struct Statistics
{
    int64_t promptTokens = 0, newTokens = 0, turns = 0, cancelled = 0, failed = 0, refused = 0, evicted = 0;
    int64_t notSaved = 0; // how often an idle session could not be saved, and kept its row
    int64_t compressions = 0;
    double compressSeconds = 0, firstTokenSeconds = 0, betweenTokensSeconds = 0;
    int64_t firstTokens = 0, betweenTokens = 0;
    int64_t sessions = 0, rowsUsed = 0, rows = 0, running = 0, waiting = 0, cacheBytes = 0;
};
} // namespace semkv::runtime
