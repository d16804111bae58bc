#include "scheduler/file_lock.h"

#include <cerrno>
#include <system_error>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

namespace semkv::runtime
{
bool FileLock::take()
{
    if (mFile >= 0)
    {
        return true;
    }
    int const file = ::open(mPath.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0)
    {
        throw std::system_error(errno, std::generic_category(), mPath);
    }
    struct stat mine = {}, there = {};
    bool const locked = ::flock(file, (mShared ? LOCK_SH : LOCK_EX) | LOCK_NB) == 0;
    int const why = errno;
    // Whoever had it may have removed the file since it was opened: then the lock is of no file.
    if (locked && ::fstat(file, &mine) == 0 && ::stat(mPath.c_str(), &there) == 0 && mine.st_dev == there.st_dev
        && mine.st_ino == there.st_ino)
    {
        mFile = file;
        return true;
    }
    ::close(file);
    if (!locked && why != EWOULDBLOCK)
    {
        throw std::system_error(why, std::generic_category(), mPath);
    }
    return false;
}

void FileLock::leave(bool remove)
{
    if (mFile < 0)
    {
        return;
    }
    if (remove)
    {
        ::unlink(mPath.c_str());
    }
    ::close(mFile);
    mFile = -1;
}
} // namespace semkv::runtime
