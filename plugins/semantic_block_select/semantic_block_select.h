// Launch interface of the SemanticBlockSelect kernels: no TensorRT, no CUDA language features.
#pragma once

#include "../common/element.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace semkv
{
// Sizes and pointers of one call; letters as in the operator contract (semkv_deploy/ops/semantic_block_select.py).
struct SemanticBlockSelectParams
{
    void const* query;           // [B,Hq,S,D]
    void const* representatives; // [B,Hkv,N,R,D]
    int64_t const* blockSlots;   // [B,N,L]
    int64_t const* blockCount;   // [B]
    int64_t const* pinned;       // [B,N]
    int64_t* slotIndex;          // [B,Hkv,width]
    void* workspace;             // semanticBlockSelectWorkspaceBytes, 256-byte aligned
    int32_t batch;               // B
    int32_t queryHeads;          // Hq
    int32_t kvHeads;             // Hkv
    int32_t rows;                // S
    int32_t headSize;            // D
    int32_t blocks;              // N
    int32_t vectors;             // R, 1 or 2
    int32_t maxBlockLength;      // L
    int32_t width;
    int32_t reduceMax;           // 0 or 1
    Element element;
};

constexpr int32_t kSemanticBlockSelectMaxHeadSize = 1024;
constexpr int32_t kSemanticBlockSelectMaxBlocks = 1 << 22;
// What a batch row's slot_index is full of when its block_count is impossible.
constexpr int64_t kNoSuchSlot = 0x7FFFFFFF;

// Reads only the sizes.
size_t semanticBlockSelectWorkspaceBytes(SemanticBlockSelectParams const& params);

// Asynchronous on `stream`, no host synchronisation. A block_count below 0 or above N fills that batch row's slot_index
// with kNoSuchSlot. A score that is NaN comes before all others but pinned blocks, so that it is not lost.
cudaError_t semanticBlockSelect(SemanticBlockSelectParams const& params, cudaStream_t stream);
} // namespace semkv
