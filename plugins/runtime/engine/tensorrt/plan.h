// The header of a plan: which runtime wrote it and in which version, read without the runtime.
#pragma once

#include "engine/tensorrt/library.h"

#include <string>

namespace semkv::runtime
{
// Throws SEMKV_ALTERED_FILE for what is no plan, and SEMKV_NO_TARGET for one of another runtime, or of another version
// than the library: the runtime refuses these with words that say neither. As
// semkv_deploy/targets/tensorrt/plan_file.py.
void checkPlan(PrivateCopy const& plan, std::string const& path, TrtLibrary const& library);
} // namespace semkv::runtime
