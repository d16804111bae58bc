// libsemkv_autoload.so, for hosts that only dlopen a plugin library (polygraphy --plugins, Triton, LD_PRELOAD): loads
// libsemkv_plugins.so from its own folder into the plugin registry. It links no TensorRT; it uses the one that is in the
// process, or else the first that the loader finds.
#include "runtime_abi.h"

#include <cstdint>
#include <cstdio>
#include <string>

namespace
{
__attribute__((constructor)) void loadPlugins()
{
    Dl_info self{};
    if (dladdr(reinterpret_cast<void const*>(&loadPlugins), &self) == 0 || self.dli_fname == nullptr)
    {
        std::fprintf(stderr, "semkv: cannot find the folder of libsemkv_autoload.so\n");
        return;
    }
    std::string path = self.dli_fname;
    size_t const slash = path.rfind('/');
    path = (slash == std::string::npos ? std::string() : path.substr(0, slash + 1)) + "libsemkv_plugins.so";
    auto const getRegistry = reinterpret_cast<void* (*) ()>(semkv::runtimeSymbol("getPluginRegistry", true));
    if (getRegistry == nullptr)
    {
        std::fprintf(stderr,
            "semkv: no TensorRT in this process and none of libnvinfer.so.11, libnvinfer.so.10, libtensorrt_rtx.so.1 "
            "found by the loader: expected one on LD_LIBRARY_PATH; %s is not registered\n",
            path.c_str());
        return;
    }
    int32_t const major = semkv::runtimeMajor(0, true);
    if (major != 10 && major != 11 && major != 1)
    {
        std::fprintf(stderr,
            "semkv: %s is not registered: expected TensorRT 10 or 11 or TensorRT-RTX 1, got version %d; load it with "
            "the registry's loadLibrary instead\n",
            path.c_str(), major);
        return;
    }
    int const place = semkv::functionPlaces(major).loadLibrary;
    if (semkv::callVirtual<void*, char const*>(getRegistry(), place, path.c_str()) == nullptr)
    {
        std::fprintf(stderr, "semkv: TensorRT could not load %s: see its log\n", path.c_str());
    }
}
} // namespace
