// How a call is divided among threads. Pieces follow from sizes alone, so that results do not depend on the threads.
#include "nexus_attention.h"

#include "../aligned.h"
#include "kernels.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace semkv::native
{
namespace
{
// Up to so many query rows of a KV head their slots are divided, above that the rows.
constexpr int64_t kFewRows = 24;
// Pieces of a call at most, where slots are divided: several for each of many cores.
constexpr int64_t kPieces = 64;
// Fewer positions are not worth a piece of their own.
constexpr int64_t kLeastPositions = 4 * kBlock;
// Where rows are divided: so many make packing their queries, and reading keys and values once for each of them, cheap.
constexpr int64_t kMostRows = 256;

// Memory of this thread that outlives the call: fresh pages for every call would cost more than some calls.
float* scratch(size_t count)
{
    thread_local AlignedFloats memory;
    thread_local size_t size = 0;
    if (size < count)
    {
        memory = alignedFloats(count);
        size = count;
    }
    return memory.get();
}

template <class T>
T* at(T* base, int64_t index, Element element)
{
    using Byte = std::conditional_t<std::is_const_v<T>, char const, char>;
    return reinterpret_cast<T*>(static_cast<Byte*>(base) + index * static_cast<int64_t>(elementBytes(element)));
}

void appendRows(NexusAttentionCall const& call, NexusAttentionKernels const& kernels, int64_t b, int64_t h)
{
    int64_t const head = b * call.kvHeads + h, from = head * call.rows * call.headSize;
    int64_t const slot = head * call.capacity + call.length[b], to = slot * call.headSize;
    auto const one = [&](void const* rows, void* cache, float* scale) {
        kernels.append(at(rows, from, call.element), call.element, call.rows, call.headSize,
            at(cache, to, call.cacheElement), call.cacheElement, scale == nullptr ? nullptr : scale + slot);
    };
    one(call.key, call.keyCache, call.keyScale);
    one(call.value, call.valueCache, call.valueScale);
}

// Named slots of all heads, new rows behind them.
std::vector<std::vector<int64_t>> namedSlots(NexusAttentionCall const& call)
{
    std::vector<std::vector<int64_t>> all;
    for (int64_t head = 0; call.slotIndex != nullptr && head < call.batch * call.kvHeads; ++head)
    {
        std::vector<int64_t> slots;
        slots.reserve(static_cast<size_t>(call.width + call.rows));
        int64_t const* index = call.slotIndex + head * call.width;
        std::copy_if(index, index + call.width, std::back_inserter(slots), [](int64_t slot) { return slot >= 0; });
        for (int64_t row = 0; row < call.rows; ++row)
        {
            slots.push_back(call.length[head / call.kvHeads] + row);
        }
        all.push_back(std::move(slots));
    }
    return all;
}

std::vector<HeadView> headViews(NexusAttentionCall const& call, std::vector<std::vector<int64_t>> const& named)
{
    std::vector<HeadView> views;
    for (int64_t b = 0; b < call.batch; ++b)
    {
        for (int64_t h = 0; h < call.kvHeads; ++h)
        {
            int64_t const head = b * call.kvHeads + h, slot = head * call.capacity;
            auto const* slots = named.empty() ? nullptr : &named[static_cast<size_t>(head)];
            views.push_back({&call, at<void const>(call.keyCache, slot * call.headSize, call.cacheElement),
                at<void const>(call.valueCache, slot * call.headSize, call.cacheElement),
                call.keyScale == nullptr ? nullptr : call.keyScale + slot,
                call.valueScale == nullptr ? nullptr : call.valueScale + slot, call.slotBias + slot,
                slots == nullptr ? nullptr : slots->data(), call.length[b],
                slots == nullptr ? call.length[b] + call.rows : static_cast<int64_t>(slots->size()), b, h});
        }
    }
    return views;
}

// Positions first..positions-1 of a head; those before `first` no row sees.
int64_t firstPosition(HeadView const& head)
{
    NexusAttentionCall const& call = *head.call;
    return head.slots == nullptr && call.window > 0 ? std::max<int64_t>(0, head.length - call.window + 1) : 0;
}

struct Piece
{
    size_t head;
    int64_t from;
    int64_t end;
};

std::vector<Piece> divide(std::vector<HeadView> const& heads)
{
    int64_t total = 0;
    for (HeadView const& head : heads)
    {
        total += head.positions - firstPosition(head);
    }
    int64_t const wanted = std::max(kLeastPositions, total / kPieces);
    std::vector<Piece> pieces;
    for (size_t h = 0; h < heads.size(); ++h)
    {
        int64_t const first = firstPosition(heads[h]), count = heads[h].positions - first;
        // Even parts of whole blocks.
        int64_t const parts = std::max<int64_t>(1, count / wanted);
        int64_t const size = ((count + parts - 1) / parts + kBlock - 1) / kBlock * kBlock;
        for (int64_t from = first; from < heads[h].positions; from += size)
        {
            pieces.push_back({h, from, std::min(from + size, heads[h].positions)});
        }
    }
    return pieces;
}

void attendFewRows(std::vector<HeadView> const& heads, NexusAttentionKernels const& kernels, Parallel const& parallel,
    float const* queries, RowState* states)
{
    int64_t const rows = heads[0].queryRows(), stride = kernels.paddedSize(heads[0].call->headSize);
    std::vector<Piece> const pieces = divide(heads);
    AlignedFloats const sums = alignedFloats(pieces.size() * static_cast<size_t>(rows * stride));
    std::vector<RowState> pieceStates(pieces.size() * static_cast<size_t>(rows));
    parallel(pieces.size(), [&](size_t p) {
        auto const [h, from, end] = pieces[p];
        int64_t const row = static_cast<int64_t>(p) * rows;
        kernels.attendPiece(heads[h], queries + static_cast<int64_t>(h) * rows * stride, from, end,
            sums.get() + row * stride, pieceStates.data() + row);
    });
    for (size_t p = 0; p < pieces.size();)
    {
        size_t const h = pieces[p].head, first = p;
        for (; p < pieces.size() && pieces[p].head == h; ++p)
        {
        }
        for (int64_t r = 0; r < rows; ++r)
        {
            int64_t const row = static_cast<int64_t>(first) * rows + r;
            states[static_cast<int64_t>(h) * rows + r] = kernels.merge(heads[h], r, static_cast<int64_t>(p - first),
                sums.get() + row * stride, rows * stride, pieceStates.data() + row, rows);
        }
    }
}

void attendManyRows(
    std::vector<HeadView> const& heads, NexusAttentionKernels const& kernels, Parallel const& parallel, RowState* states)
{
    int64_t const rows = heads[0].queryRows();
    // Even parts, at least a panel each; few of them where there are few heads, so that every core has some.
    int64_t const wanted = std::max<int64_t>((rows + kMostRows - 1) / kMostRows, 8 / static_cast<int64_t>(heads.size()));
    int64_t const panels = (rows + kernels.panelRows - 1) / kernels.panelRows;
    int64_t const parts = std::min(wanted, panels);
    int64_t const size = (panels + parts - 1) / parts * kernels.panelRows;
    int64_t const used = (rows + size - 1) / size;
    parallel(heads.size() * static_cast<size_t>(used), [&](size_t task) {
        // The last rows see most, so they come first.
        size_t const h = task % heads.size();
        int64_t const first = (used - 1 - static_cast<int64_t>(task / heads.size())) * size;
        int64_t const end = std::min(first + size, rows);
        float* memory = scratch(kernels.tilesScratch(heads[h].call->headSize, end - first));
        kernels.attendTiles(heads[h], first, end, states + static_cast<int64_t>(h) * rows, memory);
    });
}
} // namespace

void nexusAttention(NexusAttentionCall const& call, Parallel const& parallel)
{
    NexusAttentionKernels const& kernels = nexusAttentionKernels();
    std::vector<std::vector<int64_t>> const named = namedSlots(call);
    std::vector<HeadView> const heads = headViews(call, named);
    if (heads.empty() || call.rows == 0)
    {
        return;
    }
    int64_t const rows = heads[0].queryRows(), stride = kernels.paddedSize(call.headSize);
    bool const few = rows <= kFewRows;
    AlignedFloats const queries = few || call.mass != nullptr ? alignedFloats(heads.size() * static_cast<size_t>(rows * stride)) : nullptr;
    std::vector<RowState> states(heads.size() * static_cast<size_t>(rows));
    auto const prepare = [&](size_t h) {
        appendRows(call, kernels, heads[h].batchRow, heads[h].kvHead);
        if (queries != nullptr)
        {
            kernels.loadQueries(heads[h], queries.get() + static_cast<int64_t>(h) * rows * stride);
        }
    };
    if (few)
    {
        for (size_t h = 0; h < heads.size(); ++h)
        {
            prepare(h);
        }
        attendFewRows(heads, kernels, parallel, queries.get(), states.data());
    }
    else
    {
        parallel(heads.size(), prepare);
        attendManyRows(heads, kernels, parallel, states.data());
    }
    if (call.mass != nullptr)
    {
        parallel(heads.size(), [&](size_t h) {
            float* mass = call.mass + static_cast<int64_t>(h) * call.capacity;
            std::fill(mass, mass + call.capacity, 0.0f);
            kernels.addMass(heads[h], queries.get() + static_cast<int64_t>(h) * rows * stride,
                states.data() + static_cast<int64_t>(h) * rows, firstPosition(heads[h]), heads[h].positions, mass);
        });
    }
}
} // namespace semkv::native
