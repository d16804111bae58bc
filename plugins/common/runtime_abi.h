// The differences between the TensorRT a library is compiled against and the one that loads it.
//
// TensorRT 11 and TensorRT-RTX 1 changed the order of virtual functions in three interfaces that plugins call: ILogger and
// ILoggerFinder became versioned interfaces, IPluginRegistry lost its V2 functions. A call compiled with the headers of 10
// lands in the wrong function there, without a word. These calls therefore go by the version of the TensorRT that an
// object belongs to and the place of the function in its virtual table, read from the headers of 10.14 and of 11.1.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <initializer_list>

namespace semkv
{
// A function of the TensorRT in this process, which hosts load privately (Python) and under different names. Null when
// there is none. `mayLoad`: then load the first that the loader finds.
inline void* runtimeSymbol(char const* name, bool mayLoad)
{
    constexpr char const* kLibraries[]{"libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so", "libtensorrt_rtx.so.1",
        "libtensorrt_rtx.so"};
    void* symbol = dlsym(RTLD_DEFAULT, name);
    for (int const mode : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY | RTLD_GLOBAL})
    {
        for (char const* const library : kLibraries)
        {
            if (symbol == nullptr && (mayLoad || (mode & RTLD_NOLOAD) != 0))
            {
                void* const handle = dlopen(library, mode);
                symbol = handle != nullptr ? dlsym(handle, name) : nullptr;
            }
        }
    }
    return symbol;
}

// 10, 11, or 1 for TensorRT-RTX; `otherwise` when no TensorRT is in the process.
inline int32_t runtimeMajor(int32_t otherwise, bool mayLoad)
{
    void* const symbol = runtimeSymbol("getInferLibMajorVersion", mayLoad);
    return symbol != nullptr ? reinterpret_cast<int32_t (*)()>(symbol)() : otherwise;
}

// The same of the library that has the virtual table of `object`: a process may hold two TensorRTs.
inline int32_t majorOf(void* object, int32_t otherwise)
{
    Dl_info table{};
    if (dladdr(*static_cast<void* const*>(object), &table) != 0 && table.dli_fname != nullptr)
    {
        void* const handle = dlopen(table.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
        void* const symbol = handle != nullptr ? dlsym(handle, "getInferLibMajorVersion") : nullptr;
        Dl_info function{};
        // dlsym looks through a library's dependencies, too.
        if (symbol != nullptr && dladdr(symbol, &function) != 0 && function.dli_fbase == table.dli_fbase)
        {
            return reinterpret_cast<int32_t (*)()>(symbol)();
        }
    }
    return runtimeMajor(otherwise, false);
}

struct FunctionPlaces
{
    int log;         // ILogger::log
    int findLogger;  // ILoggerFinder::findLogger
    int loadLibrary; // IPluginRegistry::loadLibrary
};

inline FunctionPlaces functionPlaces(int32_t major)
{
    return major == 10 ? FunctionPlaces{0, 0, 10} : FunctionPlaces{4, 4, 6};
}

template <typename Result, typename... Arguments>
Result callVirtual(void* object, int place, Arguments... arguments)
{
    void* const* const functions = *static_cast<void* const* const*>(object);
    return reinterpret_cast<Result (*)(void*, Arguments...)>(functions[place])(object, arguments...);
}
} // namespace semkv
