// semkv.h for C++17: handles that close themselves, and errors as exceptions. Header only.
#pragma once

#include "semkv/semkv.h"

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace semkv
{
class Error : public std::runtime_error
{
public:
    Error(semkv_code code, std::string const& message)
        : std::runtime_error(message)
        , mCode(code)
    {
    }

    semkv_code code() const noexcept
    {
        return mCode;
    }

private:
    semkv_code mCode;
};

inline void check(semkv_error* error)
{
    if (error != nullptr)
    {
        Error const thrown(semkv_error_code(error), semkv_error_message(error));
        semkv_error_free(error);
        throw thrown;
    }
}

using Ids = std::vector<int32_t>;
constexpr int32_t kEveryRow = -1;

struct BundleOptions
{
    std::string target = "onnxruntime-cpu"; // or "tensorrt", "tensorrt-rtx"
    std::string onnxruntime;   // libonnxruntime's path; empty: $SEMKV_ONNXRUNTIME, else the loader's
    std::string nativeLibrary; // naming it is the consent to run its code
    std::string nativeSha256;
    bool verifyAll = false;
    std::string tensorrt, cudart; // paths of libnvinfer or libtensorrt_rtx, and libcudart; empty: as above
    bool allowPlugins = false;    // the consent to run native code that the bundle's engines bring
};

struct SessionOptions
{
    double budget = 0;   // 0: the smallest that was built
    int32_t batch = 0;   // 0: what the graphs were built for, or 1
    int32_t threads = 0; // 0: one for each CPU
    int32_t capacity = 0; // slots of every cache group; 0: the budget's
};

struct GenerateOptions
{
    int32_t maxNewTokens = 256;
    double temperature = 0; // greedy
    double topP = 1;
    int32_t topK = 0; // all
    uint64_t seed = 0;
    bool bundleStops = true; // the bundle's stop ids, else `stopIds`
    Ids stopIds;
};

// A conversation in each row. Logits are [batch, vocab] and live until the next call.
class Session
{
public:
    // Given a row and a token as it is chosen; false ends the row's reply behind it.
    using OnToken = std::function<bool(int32_t row, int32_t token)>;

    explicit Session(semkv_session* session)
        : mSession(session, semkv_session_close)
    {
    }

    semkv_session* get() const
    {
        return mSession.get();
    }

    semkv_session_info info() const
    {
        semkv_session_info info{};
        info.size = sizeof(info);
        check(semkv_session_get_info(get(), &info));
        return info;
    }

    semkv_stats stats(int32_t row = 0) const
    {
        semkv_stats stats{};
        stats.size = sizeof(stats);
        check(semkv_session_get_stats(get(), row, &stats));
        return stats;
    }

    float const* prefill(std::vector<Ids> const& rows)
    {
        float const* logits = nullptr;
        auto const views = viewed(rows);
        check(semkv_session_prefill(get(), views.data(), views.size(), &logits));
        return logits;
    }

    float const* step(Ids const& ids, std::vector<uint8_t> const& active = {})
    {
        float const* logits = nullptr;
        requireRows(ids.size());
        requireRows(active.empty() ? ids.size() : active.size());
        check(semkv_session_step(get(), ids.data(), active.empty() ? nullptr : active.data(), &logits));
        return logits;
    }

    // New ids of each row: all of them are in the cache, so that the next turn's text follows directly.
    std::vector<Ids> generate(
        std::vector<Ids> const& rows, GenerateOptions const& options = {}, OnToken const& onToken = {})
    {
        semkv_generate_options given{};
        given.size = sizeof(given);
        given.max_new_tokens = options.maxNewTokens;
        given.temperature = options.temperature;
        given.top_p = options.topP;
        given.top_k = options.topK;
        given.seed = options.seed;
        int32_t const none = 0;
        given.stop_ids = options.bundleStops ? nullptr : options.stopIds.empty() ? &none : options.stopIds.data();
        given.stop_count = options.bundleStops ? 0 : options.stopIds.size();
        Reply reply{std::vector<Ids>(rows.size()), onToken, nullptr};
        auto const views = viewed(rows);
        semkv_error* const error
            = semkv_session_generate(get(), views.data(), views.size(), &given, &Session::chosen, &reply);
        if (reply.thrown)
        {
            semkv_error_free(error);
            std::rethrow_exception(reply.thrown);
        }
        check(error);
        return std::move(reply.rows);
    }

    // Of one row: the session's only one.
    Ids generate(Ids const& ids, GenerateOptions const& options = {}, OnToken const& onToken = {})
    {
        return generate(std::vector<Ids>{ids}, options, onToken).front();
    }

    void endTurn(int32_t row = kEveryRow)
    {
        check(semkv_session_end_turn(get(), row));
    }

    void compress(int32_t row = kEveryRow)
    {
        check(semkv_session_compress(get(), row));
    }

    // Throws as prefill would where a row does not take so many more tokens.
    void checkAppend(int32_t row, int32_t count) const
    {
        check(semkv_session_check_append(get(), row, count));
    }

    void undoTurn(int32_t row = kEveryRow)
    {
        check(semkv_session_undo_turn(get(), row));
    }

    // Slots that a turn keeps from now on: a share of its tokens, or a number whatever its length; the other is 0.
    void keepOfTurns(double share, int32_t tokens = 0)
    {
        check(semkv_session_keep_of_turns(get(), share, tokens));
    }

    void trimTurns(int32_t tokens, int32_t row = kEveryRow)
    {
        check(semkv_session_trim_turns(get(), tokens, row));
    }

    void pin(int32_t row = kEveryRow)
    {
        check(semkv_session_pin(get(), row));
    }

    void reset(int32_t row = kEveryRow)
    {
        check(semkv_session_reset(get(), row));
    }

    // From any thread.
    void cancel()
    {
        semkv_session_cancel(get());
    }

    void save(std::string const& path, int32_t row = kEveryRow, std::string const& note = "") const
    {
        check(semkv_session_save(get(), path.c_str(), row, note.c_str()));
    }

    void load(std::string const& path, int32_t row = kEveryRow)
    {
        check(semkv_session_load(get(), path.c_str(), row));
    }

private:
    struct Reply
    {
        std::vector<Ids> rows;
        OnToken const& onToken;
        std::exception_ptr thrown;
    };

    // Exceptions of the caller's do not cross C: the row ends, and they go on where they can.
    static int chosen(void* user, int32_t row, int32_t token)
    {
        auto& reply = *static_cast<Reply*>(user);
        try
        {
            reply.rows[static_cast<size_t>(row)].push_back(token);
            return !reply.thrown && (!reply.onToken || reply.onToken(row, token)) ? 0 : 1;
        }
        catch (...)
        {
            reply.thrown = std::current_exception();
            return 1;
        }
    }

    static std::vector<semkv_ids> viewed(std::vector<Ids> const& rows)
    {
        std::vector<semkv_ids> views;
        for (Ids const& ids : rows)
        {
            views.push_back({ids.data(), ids.size()});
        }
        return views;
    }

    void requireRows(size_t count) const
    {
        if (count != static_cast<size_t>(info().batch))
        {
            throw Error(SEMKV_BAD_ARGUMENT,
                "step: wrong number of rows (expected " + std::to_string(info().batch) + ", got "
                    + std::to_string(count) + ").");
        }
    }

    std::unique_ptr<semkv_session, void (*)(semkv_session*)> mSession;
};

class Bundle
{
public:
    explicit Bundle(std::string const& path, BundleOptions const& options = {})
        : mBundle(nullptr, semkv_bundle_close)
    {
        semkv_bundle_options given{};
        given.size = sizeof(given);
        given.target = options.target.c_str();
        given.onnxruntime = orNull(options.onnxruntime);
        given.native_library = orNull(options.nativeLibrary);
        given.native_sha256 = orNull(options.nativeSha256);
        given.verify_all = options.verifyAll;
        given.tensorrt = orNull(options.tensorrt);
        given.cudart = orNull(options.cudart);
        given.allow_plugins = options.allowPlugins;
        semkv_bundle* opened = nullptr;
        check(semkv_bundle_open(path.c_str(), &given, &opened));
        mBundle.reset(opened);
    }

    Session session(SessionOptions const& options = {}) const
    {
        semkv_session_options given{};
        given.size = sizeof(given);
        given.budget = options.budget;
        given.batch = options.batch;
        given.threads = options.threads;
        given.capacity = options.capacity;
        semkv_session* opened = nullptr;
        check(semkv_session_open(mBundle.get(), &given, &opened));
        return Session(opened);
    }

    semkv_bundle* get() const
    {
        return mBundle.get();
    }

    // bundle.json
    char const* manifest() const
    {
        return semkv_bundle_manifest(mBundle.get());
    }

private:
    static char const* orNull(std::string const& text)
    {
        return text.empty() ? nullptr : text.c_str();
    }

    std::unique_ptr<semkv_bundle, void (*)(semkv_bundle*)> mBundle;
};
} // namespace semkv
