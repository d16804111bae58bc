// Locks of files that servers share: held by a process, let go when it ends, however it ends. As
// semkv_deploy/serve/locks.py, whose files they are too.
#pragma once

#include <string>

namespace semkv::runtime
{
// A lock of one file, which is made where there is none. It works on one machine, and over NFS from version 4 on.
class FileLock
{
public:
    // shared: others may share it; else nobody may have it.
    FileLock(std::string path, bool shared)
        : mPath(std::move(path))
        , mShared(shared)
    {
    }

    FileLock(FileLock const&) = delete;
    FileLock& operator=(FileLock const&) = delete;

    ~FileLock()
    {
        leave(false);
    }

    // Takes the lock, or finds that it is taken; true where this object has it already. Throws std::system_error where
    // the file cannot be made or locked.
    bool take();

    // Lets the lock go. With `remove` the file goes as well: not of a lock that is shared.
    void leave(bool remove);

private:
    std::string mPath;
    bool mShared;
    int mFile = -1;
};
} // namespace semkv::runtime
