// Launch interface of the NexusAttention kernels: no TensorRT, no CUDA language features.
#pragma once

#include "../common/element.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace semkv
{
// Sizes and pointers of one call; letters as in the operator contract (semkv_deploy/ops/nexus_attention.py).
struct NexusAttentionParams
{
    void const* query;       // [B,Hq,S,D]
    void const* key;         // [B,Hkv,S,D]
    void const* value;       // [B,Hkv,S,D]
    void* keyCache;          // [B,Hkv,C,D], updated in place
    void* valueCache;        // [B,Hkv,C,D], updated in place
    float const* slotBias;   // [B,Hkv,C]
    int64_t const* length;   // [B]
    void* output;            // [B,Hq,S,D]
    float* workspace;        // nexusAttentionWorkspaceBytes
    int32_t batch;           // B
    int32_t queryHeads;      // Hq
    int32_t kvHeads;         // Hkv
    int32_t rows;            // S
    int32_t capacity;        // C
    int32_t headSize;        // D
    float scale;             // 0: 1/sqrt(D)
    float softcap;           // 0: off
    int32_t causal;          // 1 or 0
    int32_t window;          // 0: off
    int32_t maxWaves;        // most waves of thread blocks that splitting may make; 0: the default
    Element element;
};

// Head sizes with a kernel.
bool nexusAttentionHeadSizeSupported(int32_t headSize);

// Most new rows that one launch takes: each KV head's query rows, in tiles of eight, are one dimension of the grid.
int64_t nexusAttentionMaxRows(int32_t queryHeads, int32_t kvHeads);

// Upper bound over all devices. Bytes; 256-byte alignment is enough.
size_t nexusAttentionWorkspaceBytes(int32_t batch, int32_t queryHeads, int32_t kvHeads, int32_t rows, int32_t headSize);

// Appends key and value at `length` and writes the attention output. Asynchronous on `stream`, no host synchronisation.
// A batch row whose length is negative or leaves no room for the new rows gets NaN outputs and an untouched cache.
// Returns cudaErrorInvalidValue for sizes that no kernel takes.
cudaError_t nexusAttention(NexusAttentionParams const& params, cudaStream_t stream);
} // namespace semkv
