// The operators of libsemkv_onnxruntime_cuda.so: one for each set of options and element types that kernels have.
#pragma once

#include "../onnxruntime/ort/api.h"

namespace semkv::ort_cuda
{
using Operators = std::vector<std::unique_ptr<native::Operator>>;

Operators nexusAttentionOperators();
Operators compactCacheOperators();
Operators semanticClusterOperators();
Operators semanticBlockMapOperators();
Operators semanticBlockSelectOperators();
Operators refusedOperators();
} // namespace semkv::ort_cuda
