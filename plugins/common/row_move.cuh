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
    void const* from;         // [B,H,C,D]
    void* to;                 // [B,H,C,D]; may be `from`
    void* staging;            // [B,H,C,D]; used in place of `to` where rows do not ascend in place
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
constexpr int kMoveThreads = 256;
constexpr int kSlicePieces = 2;
constexpr int kMoveDepth = 4;

__device__ __forceinline__ bool needsStaging(RowMove const& move, int64_t group)
{
    return move.from == move.to && move.ascending != nullptr && move.ascending[group] == 0;
}

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
        int const slot = source + __ffsll(static_cast<long long>(members)) - 1;
        members &= members - 1;
        Vector<T> const v = loadVector(rows + static_cast<int64_t>(slot) * move.headSize);
        float const w = weight[slot];
        SEMKV_UNROLL
        for (int i = 0; i < Vector<T>::kSize; ++i)
        {
            sum[i] += w * elementOf(v, i);
        }
    }
    return packVector<T>(sum);
}

// Grid: column slices, heads, batch.
template <typename T>
__global__ void __launch_bounds__(kMoveThreads) moveRowsKernel(RowMove const move)
{
    constexpr int kRowsPerPass = kMoveThreads / kSlicePieces;
    int64_t const batch = blockIdx.z;
    int64_t const head = batch * move.heads + blockIdx.y;
    int64_t const group = batch * move.groups + (move.groups == 1 ? 0 : blockIdx.y);
    int const column = (static_cast<int>(blockIdx.x) * kSlicePieces + static_cast<int>(threadIdx.x) % kSlicePieces)
        * Vector<T>::kSize;
    bool const inside = column < move.headSize;
    int const count = move.count[group];
    bool const keepAll = count == kKeepAll;
    if (keepAll && move.from == move.to)
    {
        return;
    }
    bool const staged = needsStaging(move, group);
    int64_t const offset = head * move.capacity * move.headSize + column;
    T const* const from = static_cast<T const*>(move.from) + offset;
    T* const to = static_cast<T*>(staged ? move.staging : move.to) + offset;
    int32_t const* const source = move.source + group * move.capacity;
    uint64_t const* const members = move.members != nullptr ? move.members + group * move.capacity : nullptr;
    float const* const weight = move.members != nullptr ? move.weight + head * move.capacity : nullptr;

    for (int base = 0; base < move.capacity; base += kRowsPerPass * kMoveDepth)
    {
        Vector<T> rows[kMoveDepth];
        SEMKV_UNROLL
        for (int i = 0; i < kMoveDepth; ++i)
        {
            int const row = base + i * kRowsPerPass + static_cast<int>(threadIdx.x) / kSlicePieces;
            rows[i] = zeroVector<T>();
            if (inside && row < (keepAll ? move.capacity : count))
            {
                rows[i] = meanRow(move, from, weight, keepAll ? row : source[row],
                    keepAll || members == nullptr ? uint64_t{1} : members[row]);
            }
        }
        __syncthreads();
        SEMKV_UNROLL
        for (int i = 0; i < kMoveDepth; ++i)
        {
            int const row = base + i * kRowsPerPass + static_cast<int>(threadIdx.x) / kSlicePieces;
            if (inside && row < move.capacity)
            {
                storeVector(to + static_cast<int64_t>(row) * move.headSize, rows[i]);
            }
        }
    }
}

// Brings staged heads back. Grid: any number of blocks, heads, batch.
template <typename T>
__global__ void __launch_bounds__(kMoveThreads) unstageKernel(RowMove const move)
{
    int64_t const batch = blockIdx.z;
    int64_t const group = batch * move.groups + (move.groups == 1 ? 0 : blockIdx.y);
    if (move.count[group] == kKeepAll || !needsStaging(move, group))
    {
        return;
    }
    int64_t const elements = static_cast<int64_t>(move.capacity) * move.headSize;
    int64_t const head = (batch * move.heads + blockIdx.y) * elements;
    int64_t const step = static_cast<int64_t>(gridDim.x) * kMoveThreads * Vector<T>::kSize;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kMoveThreads + threadIdx.x) * Vector<T>::kSize; i < elements;
         i += step)
    {
        storeVector(static_cast<T*>(move.to) + head + i, loadVector(static_cast<T const*>(move.staging) + head + i));
    }
}

template <typename T>
cudaError_t moveRows(RowMove const& move, int batch, cudaStream_t stream)
{
    dim3 const grid(static_cast<unsigned>(ceilDivide(move.headSize, Vector<T>::kSize * kSlicePieces)),
        static_cast<unsigned>(move.heads), static_cast<unsigned>(batch));
    SEMKV_LAUNCH(grid, dim3(kMoveThreads), 0, stream, (moveRowsKernel<T>), move);
    if (move.from == move.to && move.ascending != nullptr)
    {
        dim3 const backGrid(64, static_cast<unsigned>(move.heads), static_cast<unsigned>(batch));
        SEMKV_LAUNCH(backGrid, dim3(kMoveThreads), 0, stream, (unstageKernel<T>), move);
    }
    return cudaGetLastError();
}

// Both caches of a layer by one plan, `move`, which is that of the keys.
inline cudaError_t moveCaches(
    RowMove move, void const* values, void* valuesTo, Element element, int batch, cudaStream_t stream)
{
    return forElement(element, [&](auto type) {
        cudaError_t const error = moveRows<decltype(type)>(move, batch, stream);
        move.from = values;
        move.to = valuesTo;
        return error != cudaSuccess ? error : moveRows<decltype(type)>(move, batch, stream);
    });
}

// Copies new biases [B,H,C] out of the workspace: slot_bias may be read until all are known.
inline cudaError_t copyBias(float* to, float const* from, int batch, int heads, int capacity, cudaStream_t stream)
{
    size_t const slots = static_cast<size_t>(batch) * static_cast<size_t>(heads) * static_cast<size_t>(capacity);
    return cudaMemcpyAsync(to, from, sizeof(float) * slots, cudaMemcpyDeviceToDevice, stream);
}
} // namespace semkv
