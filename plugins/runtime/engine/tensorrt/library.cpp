#include "engine/tensorrt/library.h"

#include "common/load_first.h"

#include <map>
#include <mutex>
#include <vector>

#include <dlfcn.h>

namespace semkv::runtime
{
namespace
{
bool isRtx(std::string const& target)
{
    return target == "tensorrt-rtx";
}

Error missing(std::string const& target, std::string const& what)
{
    std::string const file = isRtx(target) ? "libtensorrt_rtx.so.1" : "libnvinfer.so.10 or libnvinfer.so.11";
    return Error(SEMKV_NO_TARGET, what)
        .where("target " + target)
        .fix("give the path of " + file + ", or set SEMKV_TENSORRT to it");
}

void* opened(std::string const& target, std::string const& given, std::string const& builtBy)
{
    std::string const plain = isRtx(target) ? "libtensorrt_rtx.so" : "libnvinfer.so";
    std::string errors;
    // Engines are opened by the version that built them, so its library is asked for first.
    if (void* const handle
        = loadFirst(given, "SEMKV_TENSORRT", {plain + "." + builtBy.substr(0, builtBy.find('.')), plain}, errors))
    {
        return handle;
    }
    throw missing(target, titleOf(target) + "'s library does not load").got(errors);
}

// One log for a library, as long as the process: TensorRT goes on with the first logger that it was given, whatever
// becomes of the runtime that brought it. Sessions side by side may so find each other's words in their errors.
TrtLog& logOf(void* handle)
{
    static std::mutex lock;
    static auto* const logs = new std::map<void*, TrtLog*>();
    std::lock_guard<std::mutex> const guard(lock);
    TrtLog*& log = (*logs)[handle];
    log = log != nullptr ? log : new TrtLog();
    return *log;
}

template <class Function>
Function symbol(void* handle, char const* name)
{
    return reinterpret_cast<Function>(::dlsym(handle, name));
}
} // namespace

std::string titleOf(std::string const& target)
{
    return isRtx(target) ? "TensorRT-RTX" : "TensorRT";
}

TrtLibrary TrtLibrary::load(RuntimeOptions const& options, std::string const& builtBy)
{
    std::string const& target = options.target;
    void* const handle = opened(target, options.tensorrt, builtBy);
    TrtLibrary library;
    library.mTitle = titleOf(target);
    library.mLog = &logOf(handle);
    library.mCreate = symbol<void* (*)(void*, int32_t)>(handle, "createInferRuntime_INTERNAL");
    int32_t numbers[4]{};
    int i = 0;
    for (char const* part : {"Major", "Minor", "Patch", "Build"})
    {
        auto const number = symbol<int32_t (*)()>(handle, ("getInferLib" + std::string(part) + "Version").c_str());
        if (number == nullptr || library.mCreate == nullptr)
        {
            throw missing(target, "the library is not " + library.mTitle + "'s")
                .expected("createInferRuntime_INTERNAL and getInferLibMajorVersion, which TensorRT has since 10.0")
                .got("a library without");
        }
        library.mVersion += (i > 0 ? "." : "") + std::to_string(numbers[i] = number());
        ++i;
    }
    bool const known = isRtx(target) ? numbers[0] == 1 : numbers[0] == 10 || numbers[0] == 11;
    if (!known)
    {
        throw missing(target, "another runtime than the target's, or a version that this library does not know")
            .expected(isRtx(target) ? "TensorRT-RTX 1" : "TensorRT 10 or 11")
            .got(library.mVersion);
    }
    library.mMajor = numbers[0];
    library.mPlaces = placesOf(numbers[0], numbers[1]);
    // The runtime compares this number with its own: headers of another version have other tables.
    auto const number = symbol<int32_t (*)()>(handle, "getInferLibVersion");
    library.mNumber = number != nullptr ? number() : numbers[0] * 10000 + numbers[1] * 100 + numbers[2];
    return library;
}

std::shared_ptr<void> TrtLibrary::runtime(bool hostCode) const
{
    std::shared_ptr<void> made(mCreate(mLog->logger(mMajor), mNumber), deleteObject);
    if (!made)
    {
        throw Error(SEMKV_NO_TARGET, mTitle + " " + mVersion + " does not start").got(mLog->taken("no reason"));
    }
    callImplementation<void, bool>(made.get(), mPlaces.hostCode, hostCode);
    return made;
}
} // namespace semkv::runtime
