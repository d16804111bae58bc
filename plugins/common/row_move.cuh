// Moves cache rows to the front: a plain gather, or a weighted mean of up to 64 neighbouring rows for each new row.
//
// Works in place when the sources ascend. Then new row n comes from rows at or behind n, so a block that owns a column
// slice of one head and walks the new rows tile by tile, reading a whole tile into registers before it writes it, never
// reads a row it has overwritten: a later tile's sources lie behind every row written so far. Slices are 32 bytes wide,
// one sector of global memory, which makes enough blocks without reading anything twice.
#pragma once

#include "scratch.cuh"

namespace semkv
{
struct RowMove
{
    void const* from[2];      // [B,H,C,D] keys, values
    void* to[2];              // [B,H,C,D] each; may be its `from`
    void* staging;            // [B,H,C,D]; used in place of `to`, by one cache at a time, where rows do not ascend in place
    int32_t const* source;    // [B,G,C] row that each new row starts from
    uint64_t const* members;  // [B,G,C] bit d: row source + d belongs to the new row; null: the source row alone
    float const* weight;      // [B,H,C] share of each row in its new row; null with members
    int32_t const* count;     // [B,G] new rows; kKeepAll: leave the batch row as it is
    int32_t const* ascending; // [B,G] whether sources ascend strictly; null: they do
    int32_t heads;            // H
    int32_t groups;           // G, 1 or H
    int32_t capacity;         // C
    int32_t headSize;         // D
};

constexpr int32_t kKeepAll = -1;
constexpr int kMoveThreads = 512;
constexpr int kSlicePieces = 2;
constexpr int kMoveDepth = 4;
constexpr int kMembersAtOnce = 4;

// Chosen, not indexed: an index that is not a constant would put the kernel's argument into local memory.
__host__ __device__ __forceinline__ void const* fromOf(RowMove const& move, int cache)
{
    return cache == 0 ? move.from[0] : move.from[1];
}

__host__ __device__ __forceinline__ void* toOf(RowMove const& move, int cache)
{
    return cache == 0 ? move.to[0] : move.to[1];
}

__host__ __device__ __forceinline__ bool mayNeedStaging(RowMove const& move, int cache)
{
    return fromOf(move, cache) == toOf(move, cache) && move.ascending != nullptr;
}

__device__ __forceinline__ bool needsStaging(RowMove const& move, int cache, int64_t group)
{
    return mayNeedStaging(move, cache) && move.ascending[group] == 0 && move.count[group] != kKeepAll;
}

// The weighted sum of the rows `source` + (each bit of `members`), in order; four of them are on their way at a time.
template <typename T>
__device__ __forceinline__ Vector<T> meanRow(
    RowMove const& move, T const* rows, float const* weight, int source, uint64_t members)
{
    if (members == 1)
    {
        return loadVector(rows + static_cast<int64_t>(source) * move.headSize);
    }
    float sum[Vector<T>::kSize] = {};
    while (members != 0)
    {
        Vector<T> v[kMembersAtOnce];
        float w[kMembersAtOnce];
        bool there[kMembersAtOnce];
        SEMKV_UNROLL
        for (int m = 0; m < kMembersAtOnce; ++m)
        {
            there[m] = members != 0;
            int const slot = source + (there[m] ? __ffsll(static_cast<long long>(members)) - 1 : 0);
            members &= members - 1;
            v[m] = loadVector(rows + static_cast<int64_t>(slot) * move.headSize);
            w[m] = weight[slot];
        }
        SEMKV_UNROLL
        for (int m = 0; m < kMembersAtOnce; ++m)
        {
            SEMKV_UNROLL
            for (int i = 0; i < Vector<T>::kSize; ++i)
            {
                sum[i] = there[m] ? sum[i] + w[m] * elementOf(v[m], i) : sum[i];
            }
        }
    }
    return packVector<T>(sum);
}

// Moves the rows of both caches, but for values that need the staging buffer, which the keys may be in: these are left
// to a second launch, `stagedValues`. Grid: column slices of the keys, then of the values (of the values only), heads,
// batch.
template <typename T>
__global__ void __launch_bounds__(kMoveThreads) moveRowsKernel(RowMove const move, bool const stagedValues)
{
    constexpr int kRowsPerPass = kMoveThreads / kSlicePieces;
    int const slices = ceilDivide(move.headSize, Vector<T>::kSize * kSlicePieces);
    int const cache = stagedValues ? 1 : static_cast<int>(blockIdx.x) / slices;
    int64_t const batch = blockIdx.z;
    int64_t const head = batch * move.heads + blockIdx.y;
    int64_t const group = batch * move.groups + (move.groups == 1 ? 0 : blockIdx.y);
    int const column = (static_cast<int>(blockIdx.x) % slices * kSlicePieces
                           + static_cast<int>(threadIdx.x) % kSlicePieces)
        * Vector<T>::kSize;
    bool const inside = column < move.headSize;
    int const count = move.count[group];
    bool const keepAll = count == kKeepAll;
    bool const staged = needsStaging(move, cache, group);
    if ((keepAll && fromOf(move, cache) == toOf(move, cache)) || (staged && cache == 1) != stagedValues)
    {
        return;
    }
    int const rowsRead = keepAll ? move.capacity : count;
    int64_t const offset = head * move.capacity * move.headSize + column;
    T const* const from = static_cast<T const*>(fromOf(move, cache)) + offset;
    T* const to = static_cast<T*>(staged ? move.staging : toOf(move, cache)) + offset;
    int32_t const* const source = move.source + group * move.capacity;
    uint64_t const* const members = move.members != nullptr ? move.members + group * move.capacity : nullptr;
    float const* const weight = move.members != nullptr ? move.weight + head * move.capacity : nullptr;

    for (int base = 0; base < move.capacity; base += kRowsPerPass * kMoveDepth)
    {
        int const first = base + static_cast<int>(threadIdx.x) / kSlicePieces;
        int sources[kMoveDepth];
        uint64_t memberBits[kMoveDepth];
        SEMKV_UNROLL
        for (int i = 0; i < kMoveDepth; ++i)
        {
            int const row = first + i * kRowsPerPass;
            bool const read = inside && row < rowsRead;
            sources[i] = read && !keepAll ? source[row] : row;
            memberBits[i] = read && !keepAll && members != nullptr ? members[row] : uint64_t{1};
        }
        Vector<T> rows[kMoveDepth];
        SEMKV_UNROLL
        for (int i = 0; i < kMoveDepth; ++i)
        {
            rows[i] = inside && first + i * kRowsPerPass < rowsRead
                ? meanRow(move, from, weight, sources[i], memberBits[i])
                : zeroVector<T>();
        }
        __syncthreads();
        SEMKV_UNROLL
        for (int i = 0; i < kMoveDepth; ++i)
        {
            int const row = first + i * kRowsPerPass;
            if (inside && row < move.capacity)
            {
                storeVector(to + static_cast<int64_t>(row) * move.headSize, rows[i]);
            }
        }
    }
}

// Brings staged heads of one cache back. Grid: any number of blocks, heads, batch.
template <typename T>
__global__ void __launch_bounds__(kMoveThreads) unstageKernel(RowMove const move, int const cache)
{
    int64_t const batch = blockIdx.z;
    int64_t const group = batch * move.groups + (move.groups == 1 ? 0 : blockIdx.y);
    if (!needsStaging(move, cache, group))
    {
        return;
    }
    T* const to = static_cast<T*>(toOf(move, cache));
    int64_t const elements = static_cast<int64_t>(move.capacity) * move.headSize;
    int64_t const head = (batch * move.heads + blockIdx.y) * elements;
    int64_t const step = static_cast<int64_t>(gridDim.x) * kMoveThreads * Vector<T>::kSize;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kMoveThreads + threadIdx.x) * Vector<T>::kSize; i < elements;
         i += step)
    {
        storeVector(to + head + i, loadVector(static_cast<T const*>(move.staging) + head + i));
    }
}

template <typename T>
cudaError_t moveRows(RowMove const& move, int batch, cudaStream_t stream)
{
    unsigned const slices = static_cast<unsigned>(ceilDivide(move.headSize, Vector<T>::kSize * kSlicePieces));
    unsigned const heads = static_cast<unsigned>(move.heads);
    unsigned const batches = static_cast<unsigned>(batch);
    for (int cache = 0; cache < 2; ++cache)
    {
        if (cache == 0 || mayNeedStaging(move, cache))
        {
            SEMKV_LAUNCH(dim3(cache == 0 ? 2 * slices : slices, heads, batches), dim3(kMoveThreads), 0, stream,
                (moveRowsKernel<T>), move, cache == 1);
        }
        if (mayNeedStaging(move, cache))
        {
            SEMKV_LAUNCH(dim3(64, heads, batches), dim3(kMoveThreads), 0, stream, (unstageKernel<T>), move, cache);
        }
    }
    return cudaGetLastError();
}

// Both caches of a layer by one plan.
inline cudaError_t moveCaches(RowMove const& move, Element element, int batch, cudaStream_t stream)
{
    return forElement(element, [&](auto type) { return moveRows<decltype(type)>(move, batch, stream); });
}

// Copies new biases [B,H,C] out of the workspace: slot_bias may be read until all are known.
inline cudaError_t copyBias(float* to, float const* from, int batch, int heads, int capacity, cudaStream_t stream)
{
    size_t const slots = static_cast<size_t>(batch) * static_cast<size_t>(heads) * static_cast<size_t>(capacity);
    return cudaMemcpyAsync(to, from, sizeof(float) * slots, cudaMemcpyDeviceToDevice, stream);
}
} // namespace semkv
