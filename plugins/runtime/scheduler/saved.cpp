#include "scheduler/saved.h"

#include "common/sha256.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include <sys/stat.h>

namespace semkv::runtime
{
namespace fs = std::filesystem;
using nlohmann::json;

namespace
{
char const* const kSuffix = ".safetensors";
char const* const kFolderLock = ".servers";

void makeFolder(std::string const& folder)
{
    fs::path const path(folder);
    if (path.has_parent_path())
    {
        fs::create_directories(path.parent_path());
    }
    struct stat status = {};
    if (::mkdir(folder.c_str(), 0700) != 0
        && (errno != EEXIST || ::stat(folder.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)))
    {
        throw std::system_error(errno == 0 ? EEXIST : errno, std::generic_category());
    }
}
} // namespace

SavedSessions::SavedSessions(std::string folder, Session& session, bool shared)
    : mFolder(std::move(folder))
    , mSession(session)
    , mLock(mFolder + "/" + kFolderLock, shared)
{
    bool mine = false;
    try
    {
        makeFolder(mFolder);
        mine = mLock.take();
    }
    catch (std::system_error const& error)
    {
        throw Error(SEMKV_BAD_ARGUMENT, std::string("cannot be made: ") + std::strerror(error.code().value()))
            .where(mFolder)
            .fix("give another folder");
    }
    if (!mine)
    {
        throw Error(SEMKV_BAD_ARGUMENT, "another server has its sessions there")
            .where(mFolder)
            .fix("give each server a folder, or --share-sessions to all that share one");
    }
}

void SavedSessions::close()
{
    mLock.leave(false);
}

std::string SavedSessions::path(std::string const& name) const
{
    return mFolder + "/" + digestOfName(name) + kSuffix;
}

std::string SavedSessions::save(
    std::string const& name, int64_t row, text::Conversation const* conversation) const
{
    std::string const to = path(name);
    json const note{{"session", name}, {"conversation", conversation != nullptr ? conversation->state() : json()}};
    mSession.save(to, row, note.dump());
    // The folder may be older than this, and open to others.
    ::chmod(to.c_str(), 0600);
    return to;
}

std::vector<std::string> SavedSessions::files() const
{
    std::vector<std::pair<fs::file_time_type, std::string>> found;
    std::error_code gone; // another server's, which has ended it
    for (auto const& entry : fs::directory_iterator(mFolder, gone))
    {
        fs::path const& path = entry.path();
        if (path.extension() != kSuffix)
        {
            continue;
        }
        auto const time = fs::last_write_time(path, gone);
        if (!gone)
        {
            found.emplace_back(time, path.string());
        }
    }
    std::sort(found.begin(), found.end());
    std::vector<std::string> paths;
    for (auto& [time, path] : found)
    {
        paths.push_back(std::move(path));
    }
    return paths;
}

std::vector<SavedSession> SavedSessions::found()
{
    try
    {
        std::vector<SavedSession> all;
        for (std::string const& path : files())
        {
            all.push_back(read(path));
        }
        return all;
    }
    catch (...)
    {
        close();
        throw;
    }
}

SavedSession SavedSessions::read(std::string const& path) const
{
    std::string const note = mSession.readNote(path);
    json const read = json::parse(note, nullptr, false);
    bool const known = read.is_object() && read.contains("conversation") && read.contains("session")
        && read["session"].is_string();
    SavedSession session{known ? read["session"].get<std::string>() : "", path, nullptr};
    if (!known || fs::path(path).stem() != digestOfName(session.name))
    {
        throw Error(SEMKV_ALTERED_FILE, "not a server's session")
            .where(path)
            .fix("give sessions a folder of their own");
    }
    if (!read["conversation"].is_null())
    {
        session.conversation = std::make_shared<json const>(read["conversation"]);
    }
    return session;
}

std::string digestOfName(std::string const& name)
{
    Sha256 digest;
    digest.update(name);
    return digest.digest().substr(0, 40);
}
} // namespace semkv::runtime
