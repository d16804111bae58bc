// semkv_undo BUNDLE LIBONNXRUNTIME: a session whose runtime fails at its first, second, … run, until it fails
// no more. After every failure the session is as it was, and the same call gives what it gives elsewhere; or it asks for a
// reset, and gives it then. Prints how many failures were of either kind.
#include "session/session.h"

#include <iostream>

using namespace semkv::runtime;

namespace
{
// Passes everything on, and fails once.
class Failing : public Engine
{
public:
    explicit Failing(std::unique_ptr<Engine> engine)
        : mEngine(std::move(engine))
    {
    }

    Contract const& contract() const override
    {
        return mEngine->contract();
    }

    int64_t batch() const override
    {
        return mEngine->batch();
    }

    float const* run(std::string const& program, Feeds const& feeds, int64_t row) override
    {
        count();
        return mEngine->run(program, feeds, row);
    }

    std::map<size_t, Feeds> runGroups(std::string const& program, std::map<size_t, Feeds> const& feeds) override
    {
        count();
        return mEngine->runGroups(program, feeds);
    }

    Array read(std::string const& buffer, size_t group) const override
    {
        return mEngine->read(buffer, group);
    }

    void write(std::string const& buffer, size_t group, Array const& array) override
    {
        mEngine->write(buffer, group, array);
    }

    void reset(int64_t row) override
    {
        mEngine->reset(row);
    }

    int64_t cacheBytes() const override
    {
        return mEngine->cacheBytes();
    }

    int64_t left = -1; // runs until one fails; less than 0: none does

private:
    void count()
    {
        if (left-- == 0)
        {
            throw Error(SEMKV_RUNTIME, "a failure that was asked for");
        }
    }

    std::unique_ptr<Engine> mEngine;
};

Ids words(int64_t first, int64_t count)
{
    Ids ids;
    for (int64_t i = 0; i < count; ++i)
    {
        ids.push_back(2 + (first + i * i % 97 + i) % 500);
    }
    return ids;
}

using Logits = std::vector<float>;

Logits copied(Session const& session, float const* logits)
{
    return Logits(logits, logits + session.batch() * session.contract().vocabSize);
}

Logits prompt(Session& session)
{
    return copied(session, session.prefill({words(7, 130), words(3, 40)}));
}

Logits step(Session& session)
{
    return copied(session, session.step({5, 9}, {1, 1}));
}

void begin(Session& session)
{
    session.reset(kEveryRow);
    session.prefill({words(1, 150), words(2, 170)});
    session.endTurn(kEveryRow);
}

struct Tried
{
    int undone = 0, reset = 0, wrong = 0;
};

Tried tried(Session& session, Failing& engine, Logits const& ofPrompt, Logits const& ofStep)
{
    Tried seen;
    for (int64_t n = 0;; ++n)
    {
        begin(session);
        engine.left = n;
        bool prompted = false; // else the prompt is what failed
        try
        {
            prompt(session);
            prompted = true;
            step(session);
            engine.left = -1;
            return seen;
        }
        catch (Error const& error)
        {
            seen.wrong += error.code() != SEMKV_RUNTIME;
        }
        engine.left = -1;
        try
        {
            seen.wrong += !prompted && prompt(session) != ofPrompt;
            seen.wrong += step(session) != ofStep;
            ++seen.undone;
        }
        catch (Error const& error)
        {
            seen.wrong += error.code() != SEMKV_NEEDS_RESET;
            ++seen.reset;
            begin(session);
            seen.wrong += prompt(session) != ofPrompt || step(session) != ofStep;
        }
    }
}
} // namespace

int main(int count, char** arguments)
try
{
    if (count != 3)
    {
        std::cerr << "usage: semkv_undo BUNDLE LIBONNXRUNTIME" << std::endl;
        return 2;
    }
    auto const bundle = std::make_shared<Bundle const>(arguments[1], "onnxruntime-cpu", false);
    RuntimeOptions const options{"onnxruntime-cpu", arguments[2], "", ""};
    auto engine = std::make_unique<Failing>(openEngine(bundle, options, bundle->contract(0), 2, 1));
    Failing& failing = *engine;
    Session session(bundle, std::move(engine));
    begin(session);
    Logits const ofPrompt = prompt(session), ofStep = step(session);
    Tried const seen = tried(session, failing, ofPrompt, ofStep);
    std::cout << seen.undone << " undone, " << seen.reset << " reset, " << seen.wrong << " wrong" << std::endl;
    return seen.wrong;
}
catch (std::exception const& error)
{
    std::cerr << "semkv_undo: " << error.what() << std::endl;
    return 1;
}
