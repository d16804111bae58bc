// Launch interface of the SemanticBlockMap kernel: no TensorRT, no CUDA language features.
#pragma once

#include "../common/element.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace semkv
{
// Sizes and pointers of one call; letters as in the operator contract (semkv_deploy/ops/semantic_block_map.py).
struct SemanticBlockMapParams
{
    void const* keyCache;       // [B,Hkv,C,D]
    int64_t const* blockStart;  // [B,N]
    int64_t const* blockLength; // [B,N]
    void* representatives;      // [B,Hkv,N,R,D]
    int64_t* blockSlots;        // [B,N,L]
    int32_t batch;              // B
    int32_t kvHeads;            // Hkv
    int32_t capacity;           // C
    int32_t headSize;           // D
    int32_t blocks;             // N
    int32_t vectors;            // R: 1 mean, 2 smallest and largest
    int32_t maxBlockLength;     // L
    Element element;
};

// Asynchronous on `stream`, no workspace. A block that is longer than L or reaches outside the cache is not read: its
// representatives are NaN and its slots all C, a slot that no cache has and NexusAttention answers with NaN.
cudaError_t semanticBlockMap(SemanticBlockMapParams const& params, cudaStream_t stream);
} // namespace semkv
