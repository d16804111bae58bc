// Arrays with names in one file, in the safetensors format.
#pragma once

#include "engine/engine.h"

#include <map>
#include <string>

namespace semkv::runtime
{
struct SavedTensors
{
    Feeds tensors;
    std::map<std::string, std::string> metadata;
};

// SHA-256 of all tensors, by name, as semkv_deploy/runtime/state.py takes it.
std::string digestOf(Feeds const& tensors);

// Writes beside `path` and moves the file there, so that it appears when it is whole. Throws SEMKV_RUNTIME.
void writeTensors(std::string const& path, SavedTensors const& saved);

// Throws SEMKV_ALTERED_FILE for what is missing, damaged, or no such file.
SavedTensors readTensors(std::string const& path);

// The metadata alone, of a file that is as long as it says; throws as readTensors.
std::map<std::string, std::string> readMetadata(std::string const& path);
} // namespace semkv::runtime
