// Sessions in a folder: one file each, with its name and the conversation's messages, found again by a later server. As
// semkv_deploy/serve/saved.py, whose files they are too.
#pragma once

#include "scheduler/file_lock.h"
#include "session/session.h"
#include "text/conversation.h"

#include <nlohmann/json_fwd.hpp>

#include <memory>
#include <string>
#include <vector>

namespace semkv::runtime
{
// A session's file: its name, and the state of its conversation (null: it is of tokens).
struct SavedSession
{
    std::string name, path;
    std::shared_ptr<nlohmann::json const> conversation;
};

// Saves rows of a session to a folder, which is made where there is none, for its owner alone.
class SavedSessions
{
public:
    // shared: with other servers that share it; else the folder is this server's until it is closed. Throws
    // SEMKV_BAD_ARGUMENT where it cannot be made, or is another server's.
    SavedSessions(std::string folder, Session& session, bool shared);

    // Lets other servers have the folder.
    void close();

    std::string const& folder() const
    {
        return mFolder;
    }

    // A session's file, whether it is there or not.
    std::string path(std::string const& name) const;

    // Writes a session; returns its file. `conversation` is null for one of tokens. Throws where it cannot be written;
    // what was saved of it before is as it was then.
    std::string save(std::string const& name, int64_t row, text::Conversation const* conversation) const;

    // Files of sessions, the one that is unused longest first.
    std::vector<std::string> files() const;

    // Sessions that are there, by age. Throws for a file that is damaged, or of another bundle, target or budget; the
    // folder is let go then.
    std::vector<SavedSession> found();

    // What a session's file says of it; throws as `found`.
    SavedSession read(std::string const& path) const;

private:
    std::string mFolder;
    Session& mSession;
    FileLock mLock;
};

// A file name for a session's, which may be anything that a client likes.
std::string digestOfName(std::string const& name);
} // namespace semkv::runtime
