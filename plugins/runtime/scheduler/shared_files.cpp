// Files of sessions that servers share: read where another server wrote them, and written at a turn's end.
#include "scheduler/shared_table.h"

#include <nlohmann/json.hpp>

#include <cerrno>
#include <cstring>
#include <random>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace semkv::runtime
{
namespace
{
// Writes a file, whole or not at all, for its owner alone.
void writeText(std::string const& path, std::string const& text)
{
    size_t const slash = path.rfind('/') + 1;
    std::random_device device;
    std::string const partial
        = path.substr(0, slash) + "." + path.substr(slash) + "." + std::to_string(device()) + ".partial";
    int const file = ::open(partial.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    bool const written = file >= 0 && ::write(file, text.data(), text.size()) == static_cast<ssize_t>(text.size());
    bool const closed = file >= 0 && ::close(file) == 0;
    if (!written || !closed || ::rename(partial.c_str(), path.c_str()) != 0)
    {
        int const why = errno;
        ::unlink(partial.c_str());
        throw Error(SEMKV_RUNTIME, std::string("cannot be written: ") + std::strerror(why)).where(path);
    }
}
} // namespace

std::optional<SharedTable::Stamp> SharedTable::stamp(std::string const& name) const
{
    struct stat found = {};
    if (::stat(mShared.path(name).c_str(), &found) != 0)
    {
        return std::nullopt;
    }
    return Stamp{found.st_ino, found.st_mtim.tv_sec * 1'000'000'000LL + found.st_mtim.tv_nsec};
}

std::optional<SharedTable::Stamp> SharedTable::stampOf(Entry const& entry) const
{
    auto const found = mStamps.find(entry.name);
    return found != mStamps.end() ? std::optional<Stamp>(found->second) : std::nullopt;
}

// Makes an entry what its file says, where another server wrote that, or ended the session; under the lock.
void SharedTable::refresh(Entry& entry)
{
    std::optional<Stamp> const now = stamp(entry.name);
    if (now == stampOf(entry) || (!now && mUnsaved.count(entry.name) > 0))
    {
        return;
    }
    mUnsaved.erase(entry.name);
    mStamps.erase(entry.name);
    mNames.erase(entry.name);
    giveUpRow(entry);
    entry.conversation.reset();
    if (!now)
    {
        return;
    }
    mStamps[entry.name] = *now;
    entry.saved = mShared.path(entry.name);
    restore(entry, mShared.read(entry.saved).conversation.get());
    if (entry.conversation)
    {
        mNames[entry.name] = foundBy(*entry.conversation);
    }
}

// Makes the file what the row holds, or says why not; then there is none, lest an older one be gone on with.
std::optional<std::string> SharedTable::write(Entry& entry)
{
    try
    {
        mShared.save(entry.name, entry.row, entry.conversation ? &*entry.conversation : nullptr);
        mStamps[entry.name] = stamp(entry.name).value();
        mUnsaved.erase(entry.name);
        if (entry.conversation)
        {
            std::string const older = mNames[entry.name], newer = foundBy(*entry.conversation);
            mNames[entry.name] = newer;
            writeText(newer, entry.name);
            if (!older.empty() && older != newer)
            {
                ::unlink(older.c_str());
            }
        }
        return std::nullopt;
    }
    catch (std::exception const& error)
    {
        ++mOf.counted.notSaved;
        mOf.warn(std::string("a session could not be saved, and is this server's alone: ") + error.what());
        // Its stamp is kept: a folder that comes back has what was there before, and the row is newer than that.
        mUnsaved.insert(entry.name);
        unlinkFiles(entry);
        return error.what();
    }
}

// Removes a session's files, under its lock.
void SharedTable::removeFiles(Entry& entry)
{
    mStamps.erase(entry.name);
    mUnsaved.erase(entry.name);
    unlinkFiles(entry);
}

void SharedTable::unlinkFiles(Entry& entry)
{
    auto const name = mNames.find(entry.name);
    if (name != mNames.end())
    {
        ::unlink(name->second.c_str());
        mNames.erase(name);
    }
    ::unlink(mShared.path(entry.name).c_str());
}

// The file that names the session whose messages these are: by their JSON, as Python writes it.
std::string SharedTable::foundBy(text::Conversation const& conversation) const
{
    nlohmann::json const state = conversation.state();
    std::string written;
    for (nlohmann::json const& each : state.at("messages"))
    {
        written += (written.empty() ? "{\"content\": " : ", {\"content\": ") + each.at("content").dump(-1, ' ', true)
            + ", \"role\": " + each.at("role").dump(-1, ' ', true) + "}";
    }
    return mShared.folder() + "/" + digestOfName("[" + written + "]") + ".messages";
}
} // namespace semkv::runtime
