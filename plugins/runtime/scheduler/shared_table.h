// Sessions that several servers share: a folder has what is true of them, and rows are copies of it. As
// semkv_deploy/serve/shared_table.py, with the same files and locks: servers of both kinds may share one folder.
#pragma once

#include "scheduler/table.h"

#include <set>

namespace semkv::runtime
{
// Gives sessions of a shared folder rows. Entries are those that have a row here or a turn; all others are in the
// folder alone.
class SharedTable : public SessionTable
{
public:
    // Throws where the folder cannot be used, or is a server's that does not share it.
    SharedTable(TableOf of, std::string const& folder, Clock::time_point now);

    Entry& enter(std::string const& name, Clock::time_point now) override;
    std::shared_ptr<Entry> known(std::string const& name) override;
    bool claim(Entry& entry) override;
    Left turnEnded(Entry& entry, Left left) override;
    void close() override;
    void renew(Entry& entry) override;
    void forget(Entry& entry) override;
    void expire(Clock::time_point before, Clock::time_point now) override;

protected:
    void loaded(Entry& entry) override;
    std::optional<std::string> leave(Entry& entry) override;

private:
    // What tells one writing of a file from another: inode and time. A file is never written in place.
    using Stamp = std::pair<uint64_t, int64_t>;

    bool makesPlace();
    void release(Entry& entry);
    FileLock& lock(std::string const& name);
    bool taken(std::string const& name);
    bool isSaved(Entry const& entry) const;
    std::optional<Stamp> stamp(std::string const& name) const;
    std::optional<Stamp> stampOf(Entry const& entry) const;
    void giveUpRow(Entry& entry);
    void refresh(Entry& entry);
    std::optional<std::string> write(Entry& entry);
    void removeFiles(Entry& entry);
    void unlinkFiles(Entry& entry);
    std::string foundBy(text::Conversation const& conversation) const;

    SavedSessions mShared;
    Clock::time_point mNow;
    std::map<std::string, std::unique_ptr<FileLock>> mLocks;
    std::map<std::string, Stamp> mStamps; // of what rows hold, and of what entries without a row were found to be
    std::set<std::string> mUnsaved; // whose row is newer than their file because it could not be written
    std::map<std::string, std::string> mNames; // files that name sessions by their messages
};
} // namespace semkv::runtime
