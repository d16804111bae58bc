#include "bundle/files.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <unistd.h>

namespace semkv::runtime
{
namespace
{
// A file without a name, or -1 where there is no room for it, twice over.
int unnamedFile(size_t bytes)
{
    char const* const given = std::getenv("TMPDIR");
    std::string const folder = given != nullptr && *given != '\0' ? given : "/tmp";
    struct statvfs space = {};
    if (::statvfs(folder.c_str(), &space) != 0 || space.f_bavail * space.f_frsize <= 2 * bytes)
    {
        return -1;
    }
    std::string name = folder + "/semkv.XXXXXX";
    int const file = ::mkostemp(&name[0], O_CLOEXEC);
    if (file >= 0)
    {
        ::unlink(name.c_str());
    }
    return file;
}
} // namespace

PrivateCopy::PrivateCopy(size_t bytes)
    : mBytes(bytes)
{
    if (bytes == 0)
    {
        return;
    }
    mFile = unnamedFile(bytes);
    if (mFile < 0)
    {
        void* const memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
        {
            throw std::bad_alloc();
        }
        mData = static_cast<char*>(memory);
    }
}

PrivateCopy::~PrivateCopy()
{
    if (mData != nullptr)
    {
        ::munmap(mData, mBytes);
    }
    if (mFile >= 0)
    {
        ::close(mFile);
    }
}

// Written, not stored through a mapping, where a full disk would be a signal.
void PrivateCopy::append(void const* data, size_t bytes)
{
    if (mFile < 0)
    {
        std::memcpy(mData + mWritten, data, bytes);
        mWritten += bytes;
        return;
    }
    for (auto const* from = static_cast<char const*>(data); bytes > 0;)
    {
        ssize_t const done = ::write(mFile, from, bytes);
        if (done <= 0)
        {
            throw Error(SEMKV_RUNTIME, "no room for a private copy of the bundle's weights")
                .where("the folder for temporary files")
                .fix("set TMPDIR to a folder with more room");
        }
        from += done;
        bytes -= static_cast<size_t>(done);
        mWritten += static_cast<size_t>(done);
    }
}

void PrivateCopy::finish()
{
    if (mFile < 0)
    {
        return;
    }
    // Writable pages of our own: ONNX Runtime takes a pointer that it might write through.
    void* const memory = ::mmap(nullptr, mBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, mFile, 0);
    if (memory == MAP_FAILED)
    {
        throw std::bad_alloc();
    }
    mData = static_cast<char*>(memory);
    ::close(mFile);
    mFile = -1;
}
} // namespace semkv::runtime
