// Launch interface of the CompactCache kernels: no TensorRT, no CUDA language features.
#pragma once

#include "../common/element.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace semkv
{
// Sizes and pointers of one call; letters as in the operator contract (semkv_deploy/ops/compact_cache.py).
struct CompactCacheParams
{
    void const* keyCache;      // [B,H,C,D]
    void const* valueCache;    // [B,H,C,D]
    float const* slotBias;     // [B,H,C]
    int64_t const* keepIndex;  // [B,G,C]
    void* keyCacheOut;         // each output may be its input
    void* valueCacheOut;
    float* slotBiasOut;
    int64_t* lengthOut;        // [B]
    void* workspace;           // compactCacheWorkspaceBytes, 256-byte aligned
    int32_t batch;             // B
    int32_t heads;             // H
    int32_t capacity;          // C
    int32_t headSize;          // D
    int32_t groups;            // G, 1 or H
    Element element;
};

// Reads only the sizes. Includes room for one cache tensor: keeping slots out of order in place goes through it.
size_t compactCacheWorkspaceBytes(CompactCacheParams const& params);

// Asynchronous on `stream`, no host synchronisation. A keep_index at or above C leaves that batch row's cache as it is and
// sets its length to -1, which NexusAttention answers with NaN.
cudaError_t compactCache(CompactCacheParams const& params, cudaStream_t stream);
} // namespace semkv
