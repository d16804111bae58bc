#include "engine/onnxruntime/ort.h"

#include "common/error.h"

#include <cstdlib>
#include <map>
#include <mutex>

#include <dlfcn.h>

namespace semkv::runtime
{
namespace
{
// The oldest that takes weights from memory (AddExternalInitializersFromFilesInMemory). Which release runs a bundle is a
// matter of its graphs: those of today need 1.32, and a release that cannot run one says so when it loads it.
constexpr uint32_t kApi = 18;

Error missing(std::string const& what)
{
    return Error(SEMKV_NO_TARGET, what)
        .where("target onnxruntime-cpu")
        .fix("give the path of libonnxruntime.so of ONNX Runtime 1.32 or newer, or set SEMKV_ONNXRUNTIME to it");
}

void* opened(std::string const& given)
{
    char const* const named = std::getenv("SEMKV_ONNXRUNTIME");
    std::string const path = !given.empty() ? given : named != nullptr ? named : "";
    for (char const* name : {path.c_str(), "libonnxruntime.so.1", "libonnxruntime.so"})
    {
        if (*name == '\0')
        {
            continue;
        }
        if (void* handle = ::dlopen(name, RTLD_NOW | RTLD_LOCAL))
        {
            return handle;
        }
        // Where one was asked for, no other is taken.
        if (!path.empty())
        {
            break;
        }
    }
    char const* const error = ::dlerror();
    throw missing("ONNX Runtime's library does not load").got(error != nullptr ? error : "nothing");
}
} // namespace

Ort const& Ort::load(std::string const& path)
{
    static std::mutex lock;
    static auto* const loaded = new std::map<OrtApiBase const*, Ort const*>();
    std::lock_guard<std::mutex> const guard(lock);
    void* const handle = opened(path);
    auto const get = reinterpret_cast<OrtApiBase const*(ORT_API_CALL*)()>(::dlsym(handle, "OrtGetApiBase"));
    if (get == nullptr)
    {
        throw missing("the library is not ONNX Runtime's: it has no OrtGetApiBase");
    }
    OrtApiBase const* const base = get();
    Ort const*& known = (*loaded)[base];
    if (known != nullptr)
    {
        return *known;
    }
    auto* const ort = new Ort();
    ort->mBase = base;
    ort->mVersion = base->GetVersionString();
    ort->mApi = base->GetApi(kApi);
    if (ort->mApi == nullptr)
    {
        throw missing("ONNX Runtime is too old").expected("1.32 or newer").got(ort->mVersion);
    }
    ort->check(ort->mApi->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "semkv", &ort->mEnv), "ONNX Runtime");
    ort->check(ort->mApi->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &ort->mMemory), "ONNX Runtime");
    known = ort;
    return *ort;
}

void Ort::check(OrtStatus* status, std::string const& where, std::string const& fix) const
{
    if (status == nullptr)
    {
        return;
    }
    std::string const text = mApi->GetErrorMessage(status);
    mApi->ReleaseStatus(status);
    throw Error(SEMKV_RUNTIME, "ONNX Runtime " + mVersion + ": " + text.substr(0, text.find('\n')))
        .where(where)
        .fix(fix);
}

std::shared_ptr<OrtValue> Ort::value(View const& view) const
{
    OrtValue* made = nullptr;
    check(mApi->CreateTensorWithDataAsOrtValue(
              mMemory, view.data, view.bytes(), view.shape.data(), view.shape.size(), elementType(view.type), &made),
        "a tensor");
    return std::shared_ptr<OrtValue>(made, mApi->ReleaseValue);
}

ONNXTensorElementDataType elementType(Type type)
{
    switch (type)
    {
    case Type::kFloat32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case Type::kFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case Type::kBFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case Type::kInt8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    }
}
} // namespace semkv::runtime
