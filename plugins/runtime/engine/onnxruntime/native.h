// libsemkv_onnxruntime.so, whose operators some bundles' graphs have: code, which runs only where the caller named it.
#pragma once

#include "engine/engine.h"
#include "engine/onnxruntime/ort.h"

namespace semkv::runtime
{
class NativeLibrary
{
public:
    // Loads the library that the caller named, of the version that a contract says. What is loaded has the digest that
    // the caller gave. Throws SEMKV_NO_TARGET where there is no consent, another file, or another version.
    static NativeLibrary load(RuntimeOptions const& options, int64_t version, std::string const& bundle);

    void registerWith(Ort const& ort, OrtSessionOptions* options) const;

private:
    using Register = OrtStatus*(ORT_API_CALL*)(OrtSessionOptions*, OrtApiBase const*);
    Register mRegister = nullptr;
};
} // namespace semkv::runtime
