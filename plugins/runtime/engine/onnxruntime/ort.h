// ONNX Runtime's C API from a library that is loaded at run time: a program that links it is tied to one release.
#pragma once

#include "common/tensor.h"

#include "onnxruntime_c_api.h"

#include <memory>
#include <string>

namespace semkv::runtime
{
class Ort
{
public:
    // Loads libonnxruntime: from a path, else $SEMKV_ONNXRUNTIME, else as the loader finds it. The same library is
    // loaded once, and never unloaded: its threads and statics do not survive that.
    static Ort const& load(std::string const& path);

    OrtApi const& api() const
    {
        return *mApi;
    }

    OrtApiBase const& base() const
    {
        return *mBase;
    }

    OrtEnv* env() const
    {
        return mEnv;
    }

    std::string const& version() const
    {
        return mVersion;
    }

    // Throws what a status says, if it is one.
    void check(OrtStatus* status, std::string const& where, std::string const& fix = "") const;

    // A tensor over somebody's memory, which must outlive it.
    std::shared_ptr<OrtValue> value(View const& view) const;

private:
    Ort() = default;

    OrtApiBase const* mBase = nullptr;
    OrtApi const* mApi = nullptr;
    OrtEnv* mEnv = nullptr;
    OrtMemoryInfo* mMemory = nullptr;
    std::string mVersion;
};

ONNXTensorElementDataType elementType(Type type);
} // namespace semkv::runtime
