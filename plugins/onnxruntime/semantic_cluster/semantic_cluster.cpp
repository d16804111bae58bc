// How a call is divided: levels are tried for groups of heads side by side, then heads are written side by side. Pieces
// follow from sizes alone, so that results do not depend on the threads.
#include "semantic_cluster.h"

#include "group.h"
#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace semkv::native
{
namespace
{
// Tiles that are worth a piece of their own.
constexpr int64_t kTilesOfAPiece = 16;

// Copies rows, as many at once as lie one after the other where they come from and where they go.
class RowCopier
{
public:
    RowCopier(CacheRows const& rows, int64_t firstRow, size_t rowBytes)
        : mRows(rows)
        , mFirst(firstRow)
        , mBytes(rowBytes)
    {
    }
    RowCopier(RowCopier const&) = delete;
    RowCopier& operator=(RowCopier const&) = delete;
    ~RowCopier() { flush(); }

    void copy(int64_t to, int64_t from)
    {
        if (from != mFrom + mCount || to != mTo + mCount)
        {
            flush();
            mFrom = from;
            mTo = to;
        }
        ++mCount;
    }

private:
    void flush()
    {
        auto const to = static_cast<size_t>(mFirst + mTo), from = static_cast<size_t>(mFirst + mFrom);
        auto const count = static_cast<size_t>(mCount);
        std::memcpy(static_cast<char*>(mRows.to) + to * mBytes, static_cast<char const*>(mRows.from) + from * mBytes,
            count * mBytes);
        if (mRows.scaleFrom != nullptr)
        {
            std::memcpy(mRows.scaleTo + to, mRows.scaleFrom + from, count * sizeof(float));
        }
        mCount = 0;
    }

    CacheRows const& mRows;
    int64_t mFirst, mFrom = 0, mTo = 0, mCount = 0;
    size_t mBytes;
};

void clear(CacheRows const& rows, int64_t first, int64_t count, size_t rowBytes)
{
    auto const from = static_cast<size_t>(first), bytes = static_cast<size_t>(count);
    std::memset(static_cast<char*>(rows.to) + from * rowBytes, 0, bytes * rowBytes);
    if (rows.scaleTo != nullptr)
    {
        std::fill(rows.scaleTo + first, rows.scaleTo + first + count, 0.0f);
    }
}

void writeHead(SemanticClusterCall const& call, Group const& group, int64_t head, int64_t length)
{
    SemanticClusterKernels const& kernels = semanticClusterKernels();
    int64_t const row = head * call.capacity;
    auto const bytes = elementBytes(call.element) * static_cast<size_t>(call.size);
    auto const count = static_cast<int64_t>(group.clusters.size());
    float* const bias = call.biasOut + row;
    {
        RowCopier keys(call.keys, row, bytes), values(call.values, row, bytes);
        for (int64_t to = 0; to < count; ++to)
        {
            Group::Cluster const& cluster = group.clusters[static_cast<size_t>(to)];
            bias[to] = cluster.bias;
            // Rotated back and forth, a row would not be the same to the bit.
            bool const sameKey = cluster.alone || call.seedKeys
                || (call.position != nullptr && cluster.bias == group.bias[cluster.members.seed]);
            if (sameKey)
            {
                keys.copy(to, cluster.members.seed);
            }
            else
            {
                kernels.mean(call, call.keys, head, cluster.members, group.position, to);
            }
            if (cluster.alone)
            {
                values.copy(to, cluster.members.seed);
            }
            else
            {
                kernels.mean(call, call.values, head, cluster.members, nullptr, to);
            }
        }
    }
    clear(call.keys, row + count, call.capacity - count, bytes);
    clear(call.values, row + count, call.capacity - count, bytes);
    std::fill(bias + count, bias + length, -std::numeric_limits<float>::infinity());
    std::fill(bias + length, bias + call.capacity, 0.0f);
}

// A row of the batch that fits: everything comes out as it went in.
void copyRow(SemanticClusterCall const& call, int64_t b)
{
    int64_t const first = b * call.heads * call.capacity, count = call.heads * call.capacity;
    auto const bytes = elementBytes(call.element) * static_cast<size_t>(call.size);
    for (CacheRows const* rows : {&call.keys, &call.values})
    {
        RowCopier copier(*rows, first, bytes);
        for (int64_t slot = 0; slot < count; ++slot)
        {
            copier.copy(slot, slot);
        }
    }
    std::copy_n(call.bias + first, count, call.biasOut + first);
    for (int64_t at = 0; at < call.groups * call.capacity; ++at)
    {
        int64_t const slot = at % call.capacity;
        call.source[b * call.groups * call.capacity + at] = slot < call.length[b] ? slot : -1;
    }
    call.lengthOut[b] = call.length[b];
    call.level[b] = -1;
}

void mergeRow(SemanticClusterCall const& call, int64_t b, Parallel const& parallel)
{
    SemanticClusterKernels const& kernels = semanticClusterKernels();
    std::vector<Group> groups;
    groups.reserve(static_cast<size_t>(call.groups));
    struct Piece
    {
        size_t group;
        int64_t from, end; // tiles
    };
    std::vector<Piece> pieces;
    for (int64_t g = 0; g < call.groups; ++g)
    {
        groups.emplace_back(call, b, g);
        for (int64_t tile = 0; tile < groups.back().band.tiles; tile += kTilesOfAPiece)
        {
            pieces.push_back({static_cast<size_t>(g), tile, std::min(tile + kTilesOfAPiece, groups.back().band.tiles)});
        }
    }
    for (auto const step : {kernels.loadUnits, kernels.compare})
    {
        parallel(pieces.size(), [&](size_t i) {
            for (int64_t tile = pieces[i].from; tile < pieces[i].end; ++tile)
            {
                step(groups[pieces[i].group].band, tile);
            }
        });
    }
    int64_t length = 0, level = 0;
    for (;; ++level)
    {
        bool const last = level + 1 == call.levels;
        // Counting further than the target is of no use to a level that is not the last.
        int64_t const most = last ? call.capacity : call.target[b];
        parallel(groups.size(), [&](size_t g) { groups[g].findSeeds(level, most); });
        length = 0;
        for (Group const& group : groups)
        {
            length = std::max(length, group.count);
        }
        if (last || length <= call.target[b])
        {
            break;
        }
    }
    call.lengthOut[b] = length;
    call.level[b] = level;
    parallel(groups.size(), [&](size_t g) { groups[g].settle(); });
    parallel(static_cast<size_t>(call.heads), [&](size_t h) {
        int64_t const head = static_cast<int64_t>(h);
        writeHead(call, groups[h / static_cast<size_t>(call.perGroup())], b * call.heads + head, length);
    });
}
} // namespace

void semanticCluster(SemanticClusterCall const& call, Parallel const& parallel)
{
    for (int64_t b = 0; b < call.batch; ++b)
    {
        if (call.length[b] <= std::max<int64_t>(call.target[b], 0) || call.levels == 0)
        {
            copyRow(call, b);
        }
        else
        {
            mergeRow(call, b, parallel);
        }
    }
}
} // namespace semkv::native
