#include "bundle/files.h"

#include "bundle/contract.h"
#include "common/sha256.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace semkv::runtime
{
namespace fs = std::filesystem;

namespace
{
char const* const kRebuild = "build the bundle again, or copy it again from where it was built";
constexpr size_t kBlock = size_t{1} << 20;

Error altered(std::string const& what, std::string const& path)
{
    return Error(SEMKV_ALTERED_FILE, what).where(path).fix(kRebuild);
}

bool startsWith(std::string const& text, std::string const& prefix)
{
    return text.compare(0, prefix.size(), prefix) == 0;
}
} // namespace

Descriptor::~Descriptor()
{
    if (mNumber >= 0)
    {
        ::close(mNumber);
    }
}

std::unique_ptr<Descriptor> openRegular(std::string const& folder, std::string const& name)
{
    // Links are refused by the system while it opens, so that nothing can be put there between a look and the opening.
    auto held = std::make_unique<Descriptor>(::open(folder.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECTORY));
    size_t start = 0;
    for (bool last = false; !last && held->number() >= 0;)
    {
        size_t const slash = name.find('/', start);
        last = slash == std::string::npos;
        std::string const part = name.substr(start, last ? slash : slash - start);
        int const flags = O_RDONLY | O_CLOEXEC | O_NOFOLLOW | (last ? O_NONBLOCK : O_DIRECTORY);
        held = std::make_unique<Descriptor>(::openat(held->number(), part.c_str(), flags));
        start = slash + 1;
    }
    std::string const path = folder + "/" + name;
    if (held->number() < 0 && errno == ENOENT)
    {
        throw altered("file of the bundle is missing", path);
    }
    struct stat status = {};
    bool const opened = held->number() >= 0 && ::fstat(held->number(), &status) == 0;
    if (!opened && errno != ELOOP && errno != ENOTDIR && errno != ENXIO)
    {
        throw altered(std::string("cannot be read: ") + std::strerror(errno), path);
    }
    if (!opened || !S_ISREG(status.st_mode))
    {
        throw Error(SEMKV_ALTERED_FILE, "is a link or no regular file").where(path).fix("put the file itself there");
    }
    return held;
}

std::string readAll(Descriptor const& file, size_t most, std::string const& path)
{
    std::string content;
    for (;;)
    {
        size_t const before = content.size(), wanted = std::min(kBlock, most - before);
        content.resize(before + wanted);
        ssize_t const got = wanted ? ::read(file.number(), &content[before], wanted) : 0;
        if (got < 0 && errno != EINTR)
        {
            throw altered(std::string("cannot be read: ") + std::strerror(errno), path);
        }
        content.resize(before + static_cast<size_t>(std::max<ssize_t>(got, 0)));
        if (got == 0)
        {
            return content;
        }
    }
}

BundleFiles::BundleFiles(std::string root, Field const& records)
    : mRoot(std::move(root))
{
    for (std::string const& name : records.names())
    {
        Field const record = records.at(name);
        record.only({"bytes", "sha256"});
        if (name == kManifest || !isInside(name))
        {
            records.contradicts("paths inside the bundle", "'" + name + "'");
        }
        mRecords[name] = {record.at("bytes").integer(0, int64_t{1} << 50), record.at("sha256").text()};
    }
}

void BundleFiles::check(std::vector<std::string> const& only) const
{
    std::map<std::string, fs::file_status> found;
    std::error_code error;
    fs::recursive_directory_iterator each(mRoot, error);
    for (; !error && each != fs::recursive_directory_iterator(); each.increment(error))
    {
        found[fs::path(each->path()).lexically_relative(mRoot).generic_string()] = each->symlink_status();
    }
    if (error)
    {
        throw altered("cannot be read: " + error.message(), mRoot);
    }
    for (auto const& [name, record] : mRecords)
    {
        if (found.count(name) == 0)
        {
            throw altered("file of the bundle is missing", path(name));
        }
    }
    for (auto const& [name, status] : found)
    {
        bool const folder = fs::is_directory(status) && !lists(name);
        if (!folder && !fs::is_regular_file(status))
        {
            throw altered(fs::is_symlink(status) ? "a link, where a bundle has files only"
                                                 : "no regular file, where a bundle has files only",
                path(name));
        }
        if (!folder && name != kManifest && !lists(name))
        {
            unlisted(name);
        }
    }
    for (auto const& [name, record] : mRecords)
    {
        std::string const& of = name;
        checkSize(name, static_cast<int64_t>(fs::file_size(path(name), error)));
        if (only.empty()
            || std::any_of(only.begin(), only.end(), [&](auto const& each) { return startsWith(of, each); }))
        {
            pour(name, [](char const*, size_t) {});
        }
    }
}

// Gives a file's bytes to `take`, piece by piece, and throws at the end unless they are what the manifest says.
template <class Take>
void BundleFiles::pour(std::string const& name, Take const& take) const
{
    if (!lists(name))
    {
        unlisted(name);
    }
    auto const file = openRegular(mRoot, name);
    FileRecord const& record = mRecords.at(name);
    Sha256 digest;
    std::string piece(kBlock, '\0');
    for (int64_t total = 0;;)
    {
        ssize_t const got = ::read(file->number(), &piece[0], kBlock);
        if (got < 0)
        {
            throw altered(std::string("cannot be read: ") + std::strerror(errno), path(name));
        }
        total += got;
        if (got == 0 || total > record.bytes)
        {
            checkSize(name, total);
            break;
        }
        digest.update(piece.data(), static_cast<size_t>(got));
        take(piece.data(), static_cast<size_t>(got));
    }
    std::string const found = digest.digest();
    if (found != record.sha256)
    {
        throw altered("file of the bundle was altered", path(name))
            .expected("SHA-256 " + record.sha256.substr(0, 12) + "…")
            .got(found.substr(0, 12) + "…");
    }
}

std::string BundleFiles::read(std::string const& name) const
{
    std::string content;
    pour(name, [&](char const* data, size_t bytes) { content.append(data, bytes); });
    return content;
}

std::shared_ptr<PrivateCopy> BundleFiles::copy(std::string const& name) const
{
    std::lock_guard<std::mutex> const lock(mLock);
    std::shared_ptr<PrivateCopy>& held = mCopies[name];
    if (!held)
    {
        if (!lists(name))
        {
            unlisted(name);
        }
        auto made = std::make_shared<PrivateCopy>(static_cast<size_t>(mRecords.at(name).bytes));
        pour(name, [&](char const* data, size_t bytes) { made->append(data, bytes); });
        made->finish();
        held = std::move(made);
    }
    return held;
}

void BundleFiles::checkSize(std::string const& name, int64_t size) const
{
    if (size != mRecords.at(name).bytes)
    {
        throw altered("file of the bundle is truncated or altered", path(name))
            .expected(std::to_string(mRecords.at(name).bytes) + " bytes")
            .got(std::to_string(size) + " bytes");
    }
}

void BundleFiles::unlisted(std::string const& name) const
{
    throw Error(SEMKV_ALTERED_FILE, "not in the bundle's list of files, so nothing says what it should be")
        .where(path(name))
        .expected(std::string("only what ") + kManifest + " lists")
        .fix("remove it, or copy the bundle again from where it was built");
}
} // namespace semkv::runtime
