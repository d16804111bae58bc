// Launch interface of the NexusAttention kernels: no TensorRT, no CUDA language features.
#pragma once

#include "../common/element.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace semkv
{
// How the caches are stored.
enum class CacheElement : int32_t
{
    kSame = 0, // as query, key and value
    kInt8 = 1,
    kFp8 = 2, // e4m3fn
};

// Sizes and pointers of one call; letters as in the operator contract (semkv_deploy/ops/nexus_attention.py).
struct NexusAttentionParams
{
    void const* query;        // [B,Hq,S,D]
    void const* key;          // [B,Hkv,S,D]
    void const* value;        // [B,Hkv,S,D]
    int64_t const* slotIndex; // [B,Hkv,W], or null: all live slots
    void* keyCache;           // [B,Hkv,C,D], updated in place
    void* valueCache;         // [B,Hkv,C,D], updated in place
    float const* slotBias;    // [B,Hkv,C]
    int64_t const* length;    // [B]
    float* keyScale;          // [B,Hkv,C], updated in place; null unless the caches are quantised
    float* valueScale;        // [B,Hkv,C], updated in place; null unless the caches are quantised
    void* output;             // [B,Hq,S,D]
    float* mass;              // [B,Hkv,C], or null
    float* workspace;         // nexusAttentionWorkspaceBytes
    int32_t batch;            // B
    int32_t queryHeads;       // Hq
    int32_t kvHeads;          // Hkv
    int32_t rows;             // S
    int32_t capacity;         // C
    int32_t headSize;         // D
    int32_t indexWidth;       // W
    float scale;              // 0: 1/sqrt(D)
    float softcap;            // 0: off
    int32_t causal;           // 1 or 0
    int32_t window;           // 0: off
    int32_t splitHalves;      // splits to make, in halves of what suits the sizes; 0: as suits them
    Element element;
    CacheElement cache;
};

// Head sizes with a kernel.
bool nexusAttentionHeadSizeSupported(int32_t headSize);

// Most new rows that one launch takes: each KV head's query rows, in tiles of eight (of four over a quantised cache), are
// one dimension of the grid.
int64_t nexusAttentionMaxRows(int32_t queryHeads, int32_t kvHeads, CacheElement cache);

// Upper bound over all devices, from the sizes and from whether slotIndex and mass are null. Bytes; 256-byte alignment is
// enough. With mass it has one float for every query row and slot.
size_t nexusAttentionWorkspaceBytes(NexusAttentionParams const& params);

// Appends key and value at `length` and writes the attention output. Asynchronous on `stream`, no host synchronisation.
// A batch row whose length is negative or leaves no room for the new rows gets NaN outputs and an untouched cache.
// Returns cudaErrorInvalidValue for sizes that no kernel takes, and for a quantised cache without scales.
cudaError_t nexusAttention(NexusAttentionParams const& params, cudaStream_t stream);
} // namespace semkv
