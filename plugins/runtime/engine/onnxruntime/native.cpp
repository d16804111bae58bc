#include "engine/onnxruntime/native.h"

#include "common/sha256.h"

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace semkv::runtime
{
namespace
{
constexpr size_t kMostBytes = size_t{1} << 30;

// The library, never unloaded: sessions hold its operators.
void* loadVerified(RuntimeOptions const& options)
{
    std::string const& path = options.nativeLibrary;
    if (options.nativeSha256.empty())
    {
        return ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    }
    Descriptor const file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (file.number() < 0)
    {
        throw Error(SEMKV_NO_TARGET, std::string("cannot be read: ") + std::strerror(errno)).where(path);
    }
    std::string const content = readAll(file, kMostBytes, path);
    Sha256 digest;
    digest.update(content);
    std::string const found = digest.digest();
    if (found != options.nativeSha256)
    {
        throw Error(SEMKV_ALTERED_FILE, "not the native library that was asked for")
            .where(path)
            .expected("SHA-256 " + options.nativeSha256)
            .got(found)
            .fix("give the library that this digest was taken of");
    }
    // What is loaded is what was hashed, whatever happens to the file meanwhile.
    static std::mutex lock;
    static std::map<std::string, void*> loaded;
    std::lock_guard<std::mutex> const guard(lock);
    void*& handle = loaded[found];
    if (handle == nullptr)
    {
        Descriptor const copy(::memfd_create("libsemkv_onnxruntime", MFD_CLOEXEC));
        for (size_t done = 0; copy.number() >= 0 && done < content.size();)
        {
            ssize_t const written = ::write(copy.number(), content.data() + done, content.size() - done);
            if (written <= 0)
            {
                throw std::bad_alloc();
            }
            done += static_cast<size_t>(written);
        }
        handle = ::dlopen(("/proc/self/fd/" + std::to_string(copy.number())).c_str(), RTLD_NOW | RTLD_LOCAL);
    }
    return handle;
}
} // namespace

NativeLibrary NativeLibrary::load(RuntimeOptions const& options, int64_t version, std::string const& bundle)
{
    std::string const wanted = "libsemkv_onnxruntime.so of version " + std::to_string(version);
    if (options.nativeLibrary.empty())
    {
        throw Error(SEMKV_NO_TARGET, "the bundle's graphs have native operators")
            .where(bundle)
            .expected(wanted + ", named by the caller")
            .got("no native library")
            .fix(
                "name the library that scripts/build_native.sh builds, which lets its code run, or build the bundle "
                "with --native off");
    }
    void* const handle = loadVerified(options);
    if (handle == nullptr)
    {
        char const* const error = ::dlerror();
        throw Error(SEMKV_NO_TARGET, "the native library does not load")
            .where(options.nativeLibrary)
            .got(error != nullptr ? error : "nothing")
            .fix("build it with scripts/build_native.sh");
    }
    auto const found = reinterpret_cast<int (*)()>(::dlsym(handle, "semkv_onnxruntime_version"));
    NativeLibrary library;
    library.mRegister = reinterpret_cast<Register>(::dlsym(handle, "RegisterCustomOps"));
    if (found == nullptr || library.mRegister == nullptr || found() < version)
    {
        throw Error(SEMKV_NO_TARGET, "another native library than the bundle's graphs need")
            .where(options.nativeLibrary)
            .expected(wanted)
            .got(found != nullptr ? "version " + std::to_string(found()) : "another library")
            .fix("build it with scripts/build_native.sh of this version");
    }
    return library;
}

void NativeLibrary::registerWith(Ort const& ort, OrtSessionOptions* options) const
{
    ort.check(mRegister(options, &ort.base()), "native operators");
}
} // namespace semkv::runtime
