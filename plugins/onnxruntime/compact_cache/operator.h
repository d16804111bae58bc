// CompactCache as operators of ONNX Runtime.
#pragma once

#include "../ort/api.h"

namespace semkv::native
{
// One for each element type.
std::vector<std::unique_ptr<Operator>> compactCacheOperators();
} // namespace semkv::native
