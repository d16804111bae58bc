// What TensorRT says while it works, kept for the sentence of an error.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>

namespace semkv::runtime
{
// An ILogger, in the form that each TensorRT has for it; of what it is told it keeps the first errors.
class TrtLog
{
public:
    TrtLog();
    TrtLog(TrtLog const&) = delete;
    TrtLog& operator=(TrtLog const&) = delete;

    // To be given to createInferRuntime_INTERNAL of a TensorRT of this version.
    void* logger(int32_t major)
    {
        return major == 10 ? static_cast<void*>(&mPlain) : static_cast<void*>(&mVersioned);
    }

    // The errors since the last call, or `otherwise`.
    std::string taken(std::string const& otherwise);

private:
    // nvinfer1::ILogger of TensorRT 10.
    class Plain
    {
    public:
        virtual void log(int32_t severity, char const* text) noexcept;
        virtual ~Plain() = default;

        TrtLog* log_ = nullptr;
    };

    struct InterfaceInfo
    {
        char const* kind;
        int32_t major, minor;
    };

    // nvinfer1::ILogger of TensorRT 11 and TensorRT-RTX: first what IVersionedInterface has.
    class Versioned
    {
    public:
        virtual int32_t getAPILanguage() const noexcept;
        virtual InterfaceInfo getInterfaceInfo() const noexcept;
        virtual ~Versioned() = default;
        virtual void log(int32_t severity, char const* text) noexcept;

        TrtLog* log_ = nullptr;
    };

    void add(int32_t severity, char const* text) noexcept;

    std::mutex mLock;
    std::string mErrors;
    int mCount = 0;
    Plain mPlain;
    Versioned mVersioned;
};
} // namespace semkv::runtime
