// SemanticBlockMap as an operator of ONNX Runtime.
#pragma once

#include "../ort/api.h"

namespace semkv::native
{
std::vector<std::unique_ptr<Operator>> semanticBlockMapOperators();
} // namespace semkv::native
