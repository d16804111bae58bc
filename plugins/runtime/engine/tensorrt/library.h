// TensorRT or TensorRT-RTX from a library that is loaded at run time, and the runtime object that opens engines.
#pragma once

#include "engine/engine.h"
#include "engine/tensorrt/log.h"
#include "engine/tensorrt/places.h"

#include <cstdint>
#include <memory>
#include <string>

namespace semkv::runtime
{
// "TensorRT" or "TensorRT-RTX".
std::string titleOf(std::string const& target);

class TrtLibrary
{
public:
    // Loads the library: from the caller's path, else $SEMKV_TENSORRT, else as the loader finds it, that of the version
    // which built the engines first. Never unloaded: its threads and statics do not survive that. Throws SEMKV_NO_TARGET
    // where there is none, or it is of another runtime or a major version that this library does not know.
    static TrtLibrary load(RuntimeOptions const& options, std::string const& builtBy);

    std::string const& title() const
    {
        return mTitle;
    }

    // Four numbers, as plans have them.
    std::string const& version() const
    {
        return mVersion;
    }

    Places const& places() const
    {
        return mPlaces;
    }

    TrtLog& log() const
    {
        return *mLog;
    }

    // An IRuntime. Code that engines bring runs only where `hostCode` says so.
    std::shared_ptr<void> runtime(bool hostCode) const;

private:
    std::string mTitle, mVersion;
    int32_t mMajor = 0, mNumber = 0;
    Places mPlaces{};
    void* (*mCreate)(void*, int32_t) = nullptr;
    TrtLog* mLog = nullptr; // the library's, never freed
};
} // namespace semkv::runtime
