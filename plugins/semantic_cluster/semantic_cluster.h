// Launch interface of the SemanticCluster kernels: no TensorRT, no CUDA language features.
#pragma once

#include "../common/element.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace semkv
{
// Sizes and pointers of one call; letters as in the operator contract (semkv_deploy/ops/semantic_cluster.py).
struct SemanticClusterParams
{
    void const* keyCache;     // [B,H,C,D]
    void const* valueCache;   // [B,H,C,D]
    float const* slotBias;    // [B,H,C]
    int64_t const* length;    // [B]
    int64_t const* chunkId;   // [B,G,L,C]
    float const* thresholds;  // [L]
    int64_t const* target;    // [B]
    void* keyCacheOut;        // may be keyCache
    void* valueCacheOut;      // may be valueCache
    float* slotBiasOut;       // may be slotBias
    int64_t* lengthOut;       // [B]; not the input
    int64_t* sourceSlot;      // [B,G,C]
    int64_t* level;           // [B]
    void* workspace;          // semanticClusterWorkspaceBytes, 256-byte aligned
    int32_t batch;            // B
    int32_t heads;            // H
    int32_t capacity;         // C
    int32_t headSize;         // D
    int32_t groups;           // G, 1 or H
    int32_t levels;           // L
    int32_t span;             // 1 .. 64
    Element element;
};

constexpr int32_t kSemanticClusterMaxSpan = 64;
constexpr int32_t kSemanticClusterMaxCapacity = 131072;

// Reads only the sizes.
size_t semanticClusterWorkspaceBytes(SemanticClusterParams const& params);

// Asynchronous on `stream`, no host synchronisation: which level is used is decided on the device. A batch row whose
// length is negative or above C keeps its cache and gets length -1, which NexusAttention answers with NaN.
cudaError_t semanticCluster(SemanticClusterParams const& params, cudaStream_t stream);
} // namespace semkv
