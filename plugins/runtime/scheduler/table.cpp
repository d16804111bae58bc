#include "scheduler/table.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <random>

#include <unistd.h>

namespace semkv::runtime
{
SessionTable::SessionTable(TableOf of, OnFull onFull, std::string const& folder, Clock::time_point now)
    : mOf(std::move(of))
    , mOnFull(onFull)
{
    for (int64_t row = 0; row < mOf.session.batch(); ++row)
    {
        mFree.push_back(row);
    }
    if (onFull != OnFull::kSave)
    {
        return;
    }
    mSaved = std::make_unique<SavedSessions>(folder, mOf.session, false);
    for (SavedSession const& each : mSaved->found())
    {
        Entry& entry = add(each.name, false, now);
        restore(entry, each.conversation.get());
        entry.saved = each.path;
    }
}

// A name for a session that has none, as no caller's will be.
std::string SessionTable::nameOf(std::string const& given) const
{
    if (!given.empty())
    {
        return given;
    }
    std::random_device device;
    std::string name;
    for (int i = 0; i < 8; ++i)
    {
        char digits[5];
        std::snprintf(digits, sizeof(digits), "%04x", device() & 0xFFFFu);
        name += digits;
    }
    return name;
}

Entry& SessionTable::add(std::string const& name, bool nameless, Clock::time_point now)
{
    auto entry = std::make_shared<Entry>();
    entry->name = name;
    entry->nameless = nameless;
    entry->used = now;
    mEntries[name] = entry;
    return *entry;
}

void SessionTable::refuseMore() const
{
    throw Refused(Fault::kUnavailable,
        Error(SEMKV_RUNTIME, "too many sessions")
            .where("scheduler")
            .expected("at most " + std::to_string(mOf.most)));
}

// Takes a conversation up again, where there is a chat template.
void SessionTable::restore(Entry& entry, nlohmann::json const* state) const
{
    entry.conversation.reset();
    if (state != nullptr && mOf.texts.hasTemplate())
    {
        try
        {
            entry.conversation.emplace(mOf.texts.tokenizer(), *state);
        }
        catch (nlohmann::json::exception const& error)
        {
            throw Error(SEMKV_ALTERED_FILE, "the saved session's conversation is none")
                .where("session " + entry.name)
                .got(error.what());
        }
    }
}

Entry& SessionTable::enter(std::string const& given, Clock::time_point now)
{
    auto const found = mEntries.find(given);
    if (!given.empty() && found != mEntries.end())
    {
        return *found->second;
    }
    if (static_cast<int64_t>(mEntries.size()) >= mOf.most)
    {
        auto const idles = idle(false);
        if (mOnFull == OnFull::kRefuse || idles.empty())
        {
            refuseMore();
        }
        forget(*idles.front());
        ++mOf.counted.evicted;
    }
    return add(nameOf(given), given.empty(), now);
}

std::shared_ptr<Entry> SessionTable::known(std::string const& name)
{
    auto const found = mEntries.find(name);
    return found != mEntries.end() ? found->second : nullptr;
}

bool SessionTable::giveRow(Entry& entry)
{
    if (entry.row >= 0)
    {
        return true;
    }
    if (mFree.empty() && !evict())
    {
        return false;
    }
    // The lowest: a step runs the rows from the first to the last that generates.
    auto const lowest = std::min_element(mFree.begin(), mFree.end());
    int64_t const row = *lowest;
    if (entry.saved.empty())
    {
        mOf.session.reset(row);
    }
    else
    {
        mOf.session.load(entry.saved, row);
        loaded(entry);
    }
    entry.row = row;
    mFree.erase(lowest);
    return true;
}

// The file is older from the next turn on, and would be gone on with by a later server if this one died.
void SessionTable::loaded(Entry& entry)
{
    ::unlink(entry.saved.c_str());
    entry.saved.clear();
}

void SessionTable::close()
{
    if (mSaved != nullptr)
    {
        mSaved->close();
    }
}

bool SessionTable::holds(Entry const& entry) const
{
    return !entry.saved.empty() || (entry.row >= 0 && mOf.session.slots().at(entry.row) > 0);
}

void SessionTable::renew(Entry& entry)
{
    if (entry.row >= 0)
    {
        mOf.session.reset(entry.row);
    }
    if (!entry.saved.empty())
    {
        ::unlink(entry.saved.c_str());
    }
    entry.saved.clear();
    entry.conversation.reset();
}

void SessionTable::forget(Entry& entry)
{
    if (entry.row >= 0)
    {
        mFree.push_back(entry.row);
    }
    if (!entry.saved.empty())
    {
        ::unlink(entry.saved.c_str());
    }
    entry.row = -1;
    entry.saved.clear();
    mEntries.erase(std::string(entry.name));
}

void SessionTable::expire(Clock::time_point before, Clock::time_point now)
{
    for (auto const& entry : idle(true))
    {
        if (entry->used < before && leave(*entry))
        {
            entry->used = now;
        }
    }
}

// Frees a row; false where sessions are not to be evicted, or none is idle.
bool SessionTable::evict()
{
    if (mOnFull == OnFull::kRefuse)
    {
        return false;
    }
    std::optional<std::string> why;
    for (auto const& entry : idle(true))
    {
        why = leave(*entry);
        if (!why)
        {
            return true;
        }
    }
    if (why)
    {
        throw Refused(Fault::kUnavailable,
            Error(SEMKV_RUNTIME, "no row is free, and no idle session can be saved").where("scheduler").got(*why));
    }
    return false;
}

// Idle sessions, the one that is idle longest first.
std::vector<std::shared_ptr<Entry>> SessionTable::idle(bool withRow) const
{
    std::vector<std::shared_ptr<Entry>> found;
    for (auto const& [name, entry] : mEntries)
    {
        if (entry->idle() && (!withRow || entry->row >= 0))
        {
            found.push_back(entry);
        }
    }
    std::sort(found.begin(), found.end(), [](auto const& one, auto const& other) { return one->used < other->used; });
    return found;
}

std::optional<std::string> SessionTable::leave(Entry& entry)
{
    if (mSaved == nullptr)
    {
        forget(entry);
    }
    else
    {
        try
        {
            entry.saved
                = mSaved->save(entry.name, entry.row, entry.conversation ? &*entry.conversation : nullptr);
        }
        catch (std::exception const& error)
        {
            ++mOf.counted.notSaved;
            mOf.warn(std::string("a session could not be saved and keeps its row: ") + error.what());
            return error.what();
        }
        mFree.push_back(entry.row);
        entry.row = -1;
    }
    ++mOf.counted.evicted;
    return std::nullopt;
}
} // namespace semkv::runtime
