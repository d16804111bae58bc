// The files of a bundle: what the manifest lists, nothing else; and the bytes that are used are those that were hashed.
// As semkv_deploy/bundle/files.py.
#pragma once

#include "bundle/json.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace semkv::runtime
{
inline constexpr char const* kManifest = "bundle.json";

struct FileRecord
{
    int64_t bytes;
    std::string sha256;
};

// A file's bytes in a copy that nobody else can alter or truncate: a file without a name, mapped, so that the system
// may drop its pages; or memory, where the folder for temporary files has no room.
class PrivateCopy
{
public:
    explicit PrivateCopy(size_t bytes);
    PrivateCopy(PrivateCopy const&) = delete;
    PrivateCopy& operator=(PrivateCopy const&) = delete;
    ~PrivateCopy();

    void append(void const* data, size_t bytes);
    void finish(); // nothing is appended afterwards

    char* data() const
    {
        return mData;
    }

    size_t size() const
    {
        return mBytes;
    }

private:
    size_t mBytes, mWritten = 0;
    int mFile = -1;
    char* mData = nullptr;
};

class BundleFiles
{
public:
    BundleFiles(std::string root, Field const& records);

    // Compares the directory with the list: every file there with its size, no other, and the bytes of those whose
    // names begin with one of some prefixes (none: of all).
    void check(std::vector<std::string> const& only) const;

    std::string read(std::string const& name) const;                  // verified
    std::shared_ptr<PrivateCopy> copy(std::string const& name) const; // verified; one for all who ask

    bool lists(std::string const& name) const
    {
        return mRecords.count(name) > 0;
    }

    FileRecord const& record(std::string const& name) const
    {
        return mRecords.at(name);
    }

    std::string path(std::string const& name) const
    {
        return mRoot + "/" + name;
    }

    [[noreturn]] void unlisted(std::string const& name) const;

private:
    template <class Take>
    void pour(std::string const& name, Take const& take) const;
    void checkSize(std::string const& name, int64_t size) const;

    std::string mRoot;
    std::map<std::string, FileRecord> mRecords;
    mutable std::mutex mLock;
    mutable std::map<std::string, std::shared_ptr<PrivateCopy>> mCopies;
};

// An open descriptor, closed at the end.
class Descriptor
{
public:
    explicit Descriptor(int number = -1)
        : mNumber(number)
    {
    }

    Descriptor(Descriptor const&) = delete;
    Descriptor& operator=(Descriptor const&) = delete;
    ~Descriptor();

    int number() const
    {
        return mNumber;
    }

private:
    int mNumber;
};

// Opens a regular file below a folder, reached without a link below it; throws naming it.
std::unique_ptr<Descriptor> openRegular(std::string const& folder, std::string const& name);

// Reads on until an end or `most` bytes.
std::string readAll(Descriptor const& file, size_t most, std::string const& path);
} // namespace semkv::runtime
