#pragma once

#include <cstdlib>
#include <string>
#include <vector>

#include <dlfcn.h>

namespace semkv::runtime
{
// The first of some libraries that loads; where a path is given, or `variable` of the environment has one, that alone:
// where one was asked for, no other is taken. Null where none loads, with what the loader said of the first.
inline void* loadFirst(
    std::string const& given, char const* variable, std::vector<std::string> names, std::string& error)
{
    char const* const named = std::getenv(variable);
    std::string const path = !given.empty() ? given : named != nullptr ? named : "";
    if (!path.empty())
    {
        names = {path};
    }
    for (std::string const& name : names)
    {
        if (void* const handle = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL))
        {
            return handle;
        }
        char const* const said = ::dlerror();
        error += error.empty() && said != nullptr ? said : "";
    }
    return nullptr;
}
} // namespace semkv::runtime
