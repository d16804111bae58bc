#include "text/genai.h"

#include "common/error.h"

#include <onnxruntime_c_api.h>

#include <cstdlib>
#include <mutex>

#include <dlfcn.h>
#include <stdlib.h>

namespace semkv::text
{
using runtime::Error;

namespace
{
constexpr uint32_t kOrtApi = 18; // the oldest that onnxruntime-genai 0.18 takes

Error missing(std::string const& what)
{
    return Error(SEMKV_NO_TARGET, what)
        .where("text")
        .fix("install onnxruntime-genai 0.18 or newer (pip install onnxruntime-genai), and give the path of its "
             "libonnxruntime-genai.so, or set SEMKV_GENAI to it; ids need no such library");
}

Error noRuntime(std::string const& what)
{
    return Error(SEMKV_NO_TARGET, what)
        .where("text")
        .fix("give the path of libonnxruntime.so of ONNX Runtime 1.32 or newer, or set SEMKV_ONNXRUNTIME to it");
}

std::string chosen(std::string const& given, char const* variable)
{
    char const* const named = std::getenv(variable);
    return !given.empty() ? given : named != nullptr ? named : "";
}

std::string loaderError()
{
    char const* const error = ::dlerror();
    return error != nullptr ? error : "nothing";
}

OrtApiBase const* baseOf(void* library)
{
    auto const get = reinterpret_cast<OrtApiBase const* (*)()>(::dlsym(library, "OrtGetApiBase"));
    return get != nullptr ? get() : nullptr;
}

// The library looks for ONNX Runtime as it is loaded, and ends the process where it finds none: so it is loaded first,
// and what the library will find is looked at as it does.
void loadOnnxRuntime(std::string const& given)
{
    std::string const path = chosen(given, "SEMKV_ONNXRUNTIME");
    void* const ours = ::dlopen(path.empty() ? "libonnxruntime.so.1" : path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (ours == nullptr)
    {
        throw noRuntime("ONNX Runtime's library does not load").got(loaderError());
    }
    OrtApiBase const* const base = baseOf(ours);
    if (base == nullptr)
    {
        throw noRuntime("the library is not ONNX Runtime's: it has no OrtGetApiBase").got(path);
    }
    void* found = nullptr;
    char const* const named = std::getenv("ORT_LIB_PATH");
    for (char const* name : {named != nullptr ? named : "", "libonnxruntime.so.1", "libonnxruntime.so"})
    {
        found = found == nullptr && *name != '\0' ? ::dlopen(name, RTLD_NOW | RTLD_LOCAL) : found;
    }
    if (found == nullptr || baseOf(found) != base)
    {
        throw noRuntime("onnxruntime-genai would find another ONNX Runtime, or none")
            .expected("a library whose name is libonnxruntime.so.1 (SONAME), and ORT_LIB_PATH not set to another")
            .got(path.empty() ? "what the loader finds" : path);
    }
    if (base->GetApi(kOrtApi) == nullptr)
    {
        throw noRuntime("ONNX Runtime is too old").expected("1.32 or newer").got(base->GetVersionString());
    }
}

template <class Function>
void find(void* library, char const* name, Function& function)
{
    function = reinterpret_cast<Function>(::dlsym(library, name));
    if (function == nullptr)
    {
        throw missing("the library is not onnxruntime-genai's, or too old").expected(name).got("no such function");
    }
}
} // namespace

Genai::Genai(void* library)
{
    find(library, "OgaCreateTokenizerFromPath", createTokenizer);
    find(library, "OgaDestroyTokenizer", destroyTokenizer);
    find(library, "OgaUpdateTokenizerOptions", updateOptions);
    find(library, "OgaCreateSequences", createSequences);
    find(library, "OgaDestroySequences", destroySequences);
    find(library, "OgaTokenizerEncode", encode);
    find(library, "OgaSequencesGetSequenceCount", sequenceCount);
    find(library, "OgaSequencesGetSequenceData", sequenceData);
    find(library, "OgaTokenizerApplyChatTemplate", applyChatTemplate);
    find(library, "OgaDestroyString", destroyString);
    find(library, "OgaResultGetError", mResultError);
    find(library, "OgaDestroyResult", mDestroyResult);
}

Genai const& Genai::load(std::string const& path, std::string const& onnxruntime)
{
    static std::mutex lock;
    static Genai const* loaded = nullptr;
    std::lock_guard<std::mutex> const guard(lock);
    if (loaded == nullptr)
    {
        loadOnnxRuntime(onnxruntime);
        std::string const file = chosen(path, "SEMKV_GENAI");
        // The wheel's library reports to Microsoft as it is loaded and used, unless the environment says otherwise each
        // time. Who wants that says so: ORT_DISABLE_TELEMETRY=0.
        ::setenv("ORT_DISABLE_TELEMETRY", "1", 0);
        // Never closed: it has threads and state of its own.
        void* const library = ::dlopen(file.empty() ? "libonnxruntime-genai.so" : file.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr)
        {
            throw missing("onnxruntime-genai's library does not load").got(loaderError());
        }
        loaded = new Genai(library);
    }
    return *loaded;
}

void Genai::check(OgaResult* result, char const* what, char const* where, int code) const
{
    if (result != nullptr)
    {
        std::string const text = mResultError(result);
        mDestroyResult(result);
        throw Error(static_cast<semkv_code>(code), what).where(where).got(text.substr(0, text.find('\n')));
    }
}
} // namespace semkv::text
