// The little of ONNX's file format that says which files a graph takes its weights from.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace semkv::runtime
{
struct ExternalTensor
{
    std::string name, location;
    int64_t offset, length; // bytes; length 0: the file's rest
};

// Every external tensor of a model: initializers, attributes, those of subgraphs and of functions. `where` names the
// file in errors. Throws SEMKV_BAD_BUNDLE for what is no ONNX model, or a tensor whose place is no number.
std::vector<ExternalTensor> externalTensors(std::string const& model, std::string const& where);
} // namespace semkv::runtime
