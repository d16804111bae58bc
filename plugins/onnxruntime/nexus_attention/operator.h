// NexusAttention as operators of ONNX Runtime.
#pragma once

#include "../ort/api.h"

namespace semkv::native
{
// One for each set of options and of element types. Options show in the name, "NexusAttention_indexed_int8", because an
// operator of ONNX Runtime has as many tensors as its name says.
std::vector<std::unique_ptr<Operator>> nexusAttentionOperators();
} // namespace semkv::native
