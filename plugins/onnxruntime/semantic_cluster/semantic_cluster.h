// SemanticCluster on a CPU: one call's sizes and pointers, and the function that runs it. Knows nothing of ONNX Runtime.
#pragma once

#include "../element.h"
#include "../parallel.h"

#include <cstdint>

namespace semkv::native
{
// Keys or values [B,H,C,D] as they come in and go out, in two buffers.
struct CacheRows
{
    void const* from;
    void* to;
    float const* scaleFrom; // [B,H,C] where caches are int8, else null
    float* scaleTo;
};

// Letters as in the operator's contract (semkv_deploy/ops/semantic_cluster.py and semantic_cluster_native.py).
struct SemanticClusterCall
{
    CacheRows keys;
    CacheRows values;
    float const* bias;       // [B,H,C]
    float* biasOut;          // [B,H,C], another buffer
    int64_t const* length;   // [B], none above C
    int64_t const* chunk;    // [B,G,L,C]
    float const* thresholds; // [L]
    int64_t const* target;   // [B]
    int64_t const* position; // [B,G,C], or null: keys are compared and averaged as they lie
    float const* frequency;  // [F]
    int64_t* lengthOut;      // [B]
    int64_t* source;         // [B,G,C]
    int64_t* level;          // [B]
    int64_t batch;           // B
    int64_t heads;           // H
    int64_t capacity;        // C
    int64_t size;            // D
    int64_t groups;          // G
    int64_t levels;          // L
    int64_t frequencies;     // F
    int64_t span;
    bool seedKeys; // clusters have their seeds' keys
    Element element;

    int64_t perGroup() const { return heads / groups; }
};

// Merges. Sizes and lengths have been checked.
void semanticCluster(SemanticClusterCall const& call, Parallel const& parallel);
} // namespace semkv::native
