// Attention Matching's fit of one head's slots that stay. Knows nothing of ONNX Runtime.
#pragma once

#include "../element.h"

#include <cstdint>

namespace semkv::native
{
// Letters as in semkv_deploy/ops/native.py. Rows lie at `first` and up in caches of all heads [·,D].
struct FitHead
{
    Element element;
    int64_t size; // D
    int64_t first;
    int64_t length; // live slots before
    void const* keys;
    void const* values;
    float const* keyScale; // of codes, else null
    float const* valueScale;
    float const* bias;      // [C]
    int64_t const* kept;    // [count] slots that stay, in order; live ones
    int64_t count;
    float const* queries;   // [R,D], scaled; zero: none
    int64_t queryCount;     // R
    bool fitValues;         // and not biases alone
    void* valuesOut;        // rows of the slots that stay, which hold what they held before
    float* valueScaleOut;
    float* biasOut; // [C], likewise
};

struct FitKernels
{
    void (*fit)(FitHead const& head);
};

// Of the best instruction set that this CPU has.
FitKernels const& fitKernels();
} // namespace semkv::native
