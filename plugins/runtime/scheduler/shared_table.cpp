#include "scheduler/shared_table.h"

#include <system_error>

namespace semkv::runtime
{
SharedTable::SharedTable(TableOf of, std::string const& folder, Clock::time_point now)
    : SessionTable(std::move(of), OnFull::kForget, "", now)
    , mShared(folder, mOf.session, true)
    , mNow(now)
{
    mShared.found(); // those of another bundle are refused now, not when one is wanted
}

Entry& SharedTable::enter(std::string const& given, Clock::time_point now)
{
    auto const found = mEntries.find(given);
    if (!given.empty() && found != mEntries.end())
    {
        return *found->second;
    }
    std::string const name = nameOf(given);
    if (!stamp(name) && !makesPlace())
    {
        refuseMore();
    }
    return add(name, given.empty(), now);
}

std::shared_ptr<Entry> SharedTable::known(std::string const& name)
{
    std::shared_ptr<Entry> entry = SessionTable::known(name);
    if (entry == nullptr && stamp(name))
    {
        entry = std::make_shared<Entry>();
        entry->name = name;
        entry->used = mNow;
    }
    if (entry != nullptr && entry->idle())
    {
        try
        {
            claim(*entry);
        }
        catch (std::exception const&)
        {
            // It is to be forgotten, and that can be done.
        }
    }
    return entry;
}

// Sees that there may be one more session: the one that is unused longest has to go, of whatever server.
bool SharedTable::makesPlace()
{
    std::vector<std::string> const files = mShared.files();
    if (static_cast<int64_t>(files.size()) < mOf.most)
    {
        return true;
    }
    for (std::string const& path : files)
    {
        try
        {
            std::string const name = mShared.read(path).name;
            std::shared_ptr<Entry> entry = SessionTable::known(name);
            if (entry == nullptr)
            {
                entry = std::make_shared<Entry>();
                entry->name = name;
            }
            if (entry->idle() && lock(name).take())
            {
                refresh(*entry);
                forget(*entry);
                ++mOf.counted.evicted;
                return true;
            }
        }
        catch (std::exception const&)
        {
            // One that is gone or damaged makes no place; the next may.
        }
    }
    return false;
}

bool SharedTable::claim(Entry& entry)
{
    if (!lock(entry.name).take())
    {
        return false;
    }
    refresh(entry);
    return true;
}

// Lets other servers have a session; the entry may be gone afterwards, unless the caller holds it.
void SharedTable::release(Entry& entry)
{
    std::string const name = entry.name;
    auto const held = mLocks.find(name);
    if (held != mLocks.end())
    {
        held->second->leave(true); // of a lock that was not had nothing is removed
        mLocks.erase(held);
    }
    if (entry.row < 0 && entry.idle())
    {
        mStamps.erase(name);
        mNames.erase(name);
        mUnsaved.erase(name);
        auto const found = mEntries.find(name);
        if (found != mEntries.end() && found->second.get() == &entry)
        {
            mEntries.erase(found);
        }
    }
}

Left SharedTable::turnEnded(Entry& entry, Left left)
{
    if (left == Left::kDropped && isSaved(entry))
    {
        // What the row holds is of no use; what was there before the turn is in the file.
        giveUpRow(entry);
        return Left::kUndone;
    }
    if (left == Left::kEnded || left == Left::kKept)
    {
        write(entry);
    }
    return left;
}

void SharedTable::renew(Entry& entry)
{
    removeFiles(entry);
    SessionTable::renew(entry);
}

void SharedTable::forget(Entry& entry)
{
    auto const found = mEntries.find(entry.name);
    // Held: what is of the table ends in the middle of this.
    std::shared_ptr<Entry> const held
        = found != mEntries.end() && found->second.get() == &entry ? found->second : nullptr;
    if (taken(entry.name) && stampOf(entry) == stamp(entry.name))
    {
        removeFiles(entry);
    }
    entry.saved.clear();
    SessionTable::forget(entry);
    release(entry);
}

void SharedTable::expire(Clock::time_point before, Clock::time_point now)
{
    mNow = now;
    for (auto const& entry : idle(false))
    {
        release(*entry);
    }
    SessionTable::expire(before, now);
}

void SharedTable::close()
{
    std::map<std::string, std::shared_ptr<Entry>> const all = mEntries;
    for (auto const& [name, entry] : all)
    {
        release(*entry);
    }
    mShared.close();
}

void SharedTable::loaded(Entry& entry)
{
    entry.saved.clear();
}

std::optional<std::string> SharedTable::leave(Entry& entry)
{
    if (!isSaved(entry) && holds(entry))
    {
        std::optional<std::string> why;
        try
        {
            // Where another server has the lock, what it writes is newer than the row.
            why = lock(entry.name).take() ? write(entry) : std::nullopt;
        }
        catch (std::system_error const& error)
        {
            why = error.what();
        }
        if (why)
        {
            return why;
        }
    }
    giveUpRow(entry);
    release(entry);
    ++mOf.counted.evicted;
    return std::nullopt;
}

void SharedTable::giveUpRow(Entry& entry)
{
    if (entry.row >= 0)
    {
        mFree.push_back(entry.row);
        entry.row = -1;
    }
    entry.saved = mStamps.count(entry.name) > 0 ? mShared.path(entry.name) : "";
}

FileLock& SharedTable::lock(std::string const& name)
{
    std::unique_ptr<FileLock>& lock = mLocks[name];
    if (lock == nullptr)
    {
        lock = std::make_unique<FileLock>(mShared.folder() + "/" + digestOfName(name) + ".lock", false);
    }
    return *lock;
}

// Whether the lock is this server's; not where it cannot be made, because the folder is gone.
bool SharedTable::taken(std::string const& name)
{
    try
    {
        return lock(name).take();
    }
    catch (std::system_error const& error)
    {
        mOf.warn(std::string("a session cannot be locked: ") + error.what());
        return false;
    }
}

bool SharedTable::isSaved(Entry const& entry) const
{
    return mStamps.count(entry.name) > 0 && mUnsaved.count(entry.name) == 0;
}
} // namespace semkv::runtime
