// Into how many splits a row's entries are cut. Arithmetic only, so that tests can ask it about devices that are not there.
#pragma once

#include <algorithm>
#include <cstdint>

namespace semkv::nexus
{
// What is launched, and what runs it at a time. A tile is what a thread block works through in one step.
struct Filling
{
    int64_t blocksPerSplit; // batch rows x KV heads x row tiles
    int64_t tiles;          // of a row with as many entries as there is room for
    int64_t slots;          // thread blocks that the device holds at a time

    // Of rows of `rowTiles` tiles: tiles of a split, splits that have any, waves of thread blocks.
    int64_t perSplit(int64_t rowTiles, int64_t splits) const
    {
        return (rowTiles + splits - 1) / splits;
    }
    int64_t active(int64_t rowTiles, int64_t splits) const
    {
        int64_t const each = perSplit(rowTiles, splits);
        return (rowTiles + each - 1) / each;
    }
    int64_t waves(int64_t rowTiles, int64_t splits) const
    {
        return (active(rowTiles, splits) * blocksPerSplit + slots - 1) / slots;
    }
    // Share of the device's time, counted in tiles, that is work.
    double efficiency(int64_t rowTiles, int64_t splits) const
    {
        return static_cast<double>(rowTiles * blocksPerSplit)
            / static_cast<double>(slots * waves(rowTiles, splits) * perSplit(rowTiles, splits));
    }
    // Time in tiles: a wave costs half a tile to start, merging splits one. Neither is measured.
    double time(int64_t rowTiles, int64_t splits) const
    {
        double const wave = static_cast<double>(perSplit(rowTiles, splits)) + 0.5;
        return static_cast<double>(waves(rowTiles, splits)) * wave + (active(rowTiles, splits) > 1 ? 1.0 : 0.0);
    }
};

// The quickest number of splits up to mostSplits, in two waves, and up to eight while a split has eight tiles or more.
// Lengths are on the device, so it is chosen for full rows; rows of a quarter of that decide between nearly equal ones.
// halves: how many halves of that number are wanted; 0: two, the number itself.
inline int64_t chooseSplits(Filling const& filling, int64_t mostSplits, int64_t halves)
{
    int64_t const most = std::min(mostSplits, filling.tiles);
    int64_t const quarter = std::max<int64_t>(1, filling.tiles / 4);
    int64_t best = 1;
    double bestTime = 0.0;
    for (int64_t splits = 1; splits <= most; ++splits)
    {
        int64_t const waves = filling.waves(filling.tiles, splits);
        if (splits > 1 && waves > (filling.perSplit(filling.tiles, splits) >= 8 ? 8 : 2))
        {
            continue;
        }
        double const time = filling.time(filling.tiles, splits) + filling.time(quarter, splits);
        if (splits == 1 || time < bestTime)
        {
            best = splits;
            bestTime = time;
        }
    }
    return halves > 0 ? std::clamp<int64_t>(best * halves / 2, 1, most) : best;
}
} // namespace semkv::nexus
