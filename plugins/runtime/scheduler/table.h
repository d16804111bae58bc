// The table of sessions: which has a row, which is saved, and what becomes of an idle one when its row is wanted. As
// semkv_deploy/serve/table.py.
#pragma once

#include "scheduler/saved.h"
#include "scheduler/statistics.h"
#include "scheduler/turn.h"
#include "session/session.h"
#include "text/texts.h"

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace semkv::runtime
{
// A session.
struct Entry
{
    std::string name;
    bool nameless = false;  // its name is none that a caller knows
    Clock::time_point used; // when a turn of it ended last
    int64_t row = -1;       // none yet, or it is saved
    std::optional<text::Conversation> conversation{}; // of a session that is of messages
    std::deque<std::unique_ptr<Turn>> turns{};        // the running one, then those that wait
    std::string saved{};                              // its file, while that is what the session is
    bool running = false;

    bool idle() const
    {
        return turns.empty();
    }
};

enum class OnFull // when a session wants a row and all are taken
{
    kRefuse,
    kForget, // the one that is idle longest is forgotten
    kSave    // it is saved
};

// What a table is of.
struct TableOf
{
    Session& session;
    text::Texts const& texts;
    Statistics& counted;
    int64_t most; // sessions, saved ones included
    std::function<void(std::string const&)> warn;
};

// Gives sessions rows.
class SessionTable
{
public:
    // folder: where idle sessions are saved, with OnFull::kSave; those that are there are sessions. Throws where it
    // cannot be used.
    SessionTable(TableOf of, OnFull onFull, std::string const& folder, Clock::time_point now);
    virtual ~SessionTable() = default;

    std::map<std::string, std::shared_ptr<Entry>> const& entries() const
    {
        return mEntries;
    }

    int64_t rowsUsed() const
    {
        return mOf.session.batch() - static_cast<int64_t>(mFree.size());
    }

    // The session of that name, a new one if there is none; the one that is idle longest may have to go for it. An
    // empty name: a session that has none. Throws Refused when there are as many as there may be.
    virtual Entry& enter(std::string const& name, Clock::time_point now);

    // The session of that name; null: there is none.
    virtual std::shared_ptr<Entry> known(std::string const& name);

    // Gives a session a row, with what was saved of it; false when there is none. Throws Refused when no row is free
    // because no idle session can be saved; Error when what was saved of it cannot be read: it is to be forgotten then.
    bool giveRow(Entry& entry);

    // Takes a session for its next turn; false while another server runs one of it. Throws Error when what was saved of
    // it cannot be read.
    virtual bool claim(Entry&)
    {
        return true;
    }

    // Takes note that a turn has ended, and of what it left; returns what that is after all.
    virtual Left turnEnded(Entry&, Left left)
    {
        return left;
    }

    // Lets other servers have what was saved.
    virtual void close();

    // Whether there is anything of a session, in its row or saved.
    bool holds(Entry const& entry) const;

    // Makes a session what it is before its first turn; it keeps a row that it has, and turns that wait.
    virtual void renew(Entry& entry);

    // Ends a session: its row is free, its file is gone.
    virtual void forget(Entry& entry);

    // Evicts idle sessions that have a row and were not used since; one that cannot be saved keeps it a while.
    virtual void expire(Clock::time_point before, Clock::time_point now);

protected:
    std::string nameOf(std::string const& given) const;
    Entry& add(std::string const& name, bool nameless, Clock::time_point now);
    [[noreturn]] void refuseMore() const;
    std::vector<std::shared_ptr<Entry>> idle(bool withRow) const;
    void restore(Entry& entry, nlohmann::json const* state) const;

    // Takes note that a row holds what was saved.
    virtual void loaded(Entry& entry);

    // Takes an idle session's row: saved, or forgotten. Returns why it could not be saved; nothing is lost then.
    virtual std::optional<std::string> leave(Entry& entry);

    TableOf mOf;
    std::map<std::string, std::shared_ptr<Entry>> mEntries;
    std::vector<int64_t> mFree; // rows

private:
    bool evict();

    OnFull mOnFull;
    std::unique_ptr<SavedSessions> mSaved;
};
} // namespace semkv::runtime
