// NexusAttention on a CPU: one call's sizes and pointers, and the function that runs it. Knows nothing of ONNX Runtime.
#pragma once

#include "../element.h"
#include "../parallel.h"

#include <cstdint>

namespace semkv::native
{
// Letters as in the operator's contract (semkv_deploy/ops/nexus_attention.py).
struct NexusAttentionCall
{
    void const* query;        // [B,Hq,S,D]
    void const* key;          // [B,Hkv,S,D]
    void const* value;        // [B,Hkv,S,D]
    void* keyCache;           // [B,Hkv,C,D], already the output: new rows are written to it
    void* valueCache;         // [B,Hkv,C,D]
    float* keyScale;          // [B,Hkv,C] where caches are int8, else null; the outputs
    float* valueScale;        // [B,Hkv,C]
    float const* slotBias;    // [B,Hkv,C]
    int64_t const* length;    // [B]
    int64_t const* slotIndex; // [B,Hkv,W], or null: all slots
    void* output;             // [B,Hq,S,D]
    float* mass;              // [B,Hkv,C], or null: not asked for
    int64_t batch;            // B
    int64_t heads;            // Hq
    int64_t kvHeads;          // Hkv
    int64_t rows;             // S
    int64_t capacity;         // C
    int64_t headSize;         // D
    int64_t width;            // W
    float scale;
    float softcap;
    int64_t window;
    bool causal;
    Element element;      // of query, key, value, output
    Element cacheElement; // of the caches: `element`, or 16 bits or int8 beside float32
};

// Appends and attends. Sizes, lengths and slot_index have been checked.
void nexusAttention(NexusAttentionCall const& call, Parallel const& parallel);

// Name of the instruction set that kernels were chosen for.
char const* nexusAttentionTarget();
} // namespace semkv::native
