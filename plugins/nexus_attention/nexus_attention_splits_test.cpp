// How well the splits fill devices that no test machine has.
#include "../harness/harness.h"
#include "nexus_attention_splits.h"

using semkv::nexus::chooseSplits;
using semkv::nexus::Filling;

namespace
{
struct Case
{
    char const* what;
    Filling filling;
    double full;    // least efficiency of full rows
    double quarter; // of rows of a quarter of the capacity
};
} // namespace

PLUGIN_TEST(nexusAttentionSplitsFillTheDevice)
{
    // Tiles of 64 and of 128 slots; two and three blocks a multiprocessor; A100: 108 of these, H100: 132.
    std::vector<Case> const cases{
        {"A100, 32/8 heads, batch 32, 8192 slots", {32 * 8, 128, 216}, 0.9, 0.85},
        {"A100, 32/8 heads, batch 64, 8192 slots", {64 * 8, 128, 216}, 0.9, 0.85},
        {"A100, 32/8 heads, batch 8, 8192 slots", {8 * 8, 128, 216}, 0.9, 0.75},
        {"A100, 32/8 heads, batch 1, 8192 slots", {8, 128, 216}, 0.9, 0.55},
        {"H100, 32/8 heads, batch 1, 8192 slots", {8, 128, 264}, 0.9, 0.9},
        {"H100, 32/8 heads, batch 64, 8192 slots", {64 * 8, 128, 264}, 0.9, 0.9},
        {"H100, 9/3 heads, batch 64, 8192 slots", {64 * 3, 64, 264}, 0.9, 0.9},
        {"H100, 9/3 heads, batch 8, 8192 slots", {8 * 3, 64, 264}, 0.9, 0.7},
        {"H100, 9/3 heads, batch 8, 8192 slots, three blocks", {8 * 3, 128, 396}, 0.9, 0.9},
        {"H100, 9/3 heads, batch 1, 8192 slots, three blocks", {3, 128, 396}, 0.9, 0.2},
        // Fewer tiles than would fill it: 312 for 264 blocks at a time, and 192.
        {"H100, 9/3 heads, batch 8, 1638 slots", {8 * 3, 13, 264}, 0.59, 0.1},
        {"H100, 9/3 heads, batch 1, 8192 slots", {3, 64, 264}, 0.72, 0.1},
    };
    for (Case const& c : cases)
    {
        int64_t const most = std::min<int64_t>(128, (2048 + c.filling.blocksPerSplit - 1) / c.filling.blocksPerSplit);
        int64_t const splits = chooseSplits(c.filling, most, 0);
        double const full = c.filling.efficiency(c.filling.tiles, splits);
        double const quarter = c.filling.efficiency(std::max<int64_t>(1, c.filling.tiles / 4), splits);
        std::string const got = std::string(c.what) + ": " + std::to_string(splits) + " splits, " + std::to_string(full)
            + " full, " + std::to_string(quarter) + " a quarter";
        harness::check(full >= c.full && quarter >= c.quarter, got.c_str(), __FILE__, __LINE__);
    }
}

PLUGIN_TEST(nexusAttentionSplitsStayWithinTheirLimits)
{
    for (int64_t blocks : {1, 3, 100, 264, 265, 5000})
    {
        for (int64_t tiles : {1, 2, 13, 128, 4096})
        {
            Filling const filling{blocks, tiles, 264};
            int64_t const splits = chooseSplits(filling, 128, 0);
            int64_t const most = std::min<int64_t>(tiles, 128);
            CHECK(splits >= 1 && splits <= most);
            CHECK(splits == 1 || filling.waves(tiles, splits) <= 8);
            CHECK(chooseSplits(filling, 128, 2) == splits);
            CHECK(chooseSplits(filling, 128, 1) == std::max<int64_t>(1, splits / 2));
            CHECK(chooseSplits(filling, 128, 4) == std::min(most, 2 * splits));
        }
    }
}
