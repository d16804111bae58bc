// semkv_schedule BUNDLE LIBONNXRUNTIME BUDGET: puts turns before a scheduler, from a thread for each caller, and prints
// what became of each, and the scheduler's numbers. The standard input is a JSON object: "rows", options of the
// scheduler, "genai" where there are texts, and "callers": lists of turns, each of which its caller puts when its last one has ended.
#include "scheduler/scheduler.h"
#include "text/texts.h"

#include <nlohmann/json.hpp>

#include <future>
#include <iostream>

using namespace semkv::runtime;
using nlohmann::json;

namespace
{
class Heard : public Listener
{
public:
    explicit Heard(json const& turn)
        : mGoneAfter(turn.value("gone_after", -1))
    {
    }

    std::future<json> result()
    {
        return mResult.get_future();
    }

    void piece(Ids const& ids, std::string const& text) noexcept override
    {
        mIds.insert(mIds.end(), ids.begin(), ids.end());
        mPieces.push_back(text);
    }

    void finished(Finished const& end) noexcept override
    {
        char const* const reasons[]{"stop", "length", "cancelled", "error"};
        mResult.set_value({{"ids", mIds}, {"pieces", mPieces}, {"reason", reasons[static_cast<int>(end.reason)]},
            {"prompt_tokens", end.promptTokens}, {"cached_tokens", end.cachedTokens},
            {"fault", end.failure ? static_cast<int>(end.failure->fault) : -1},
            {"error", end.failure ? end.failure->text : ""}});
    }

    bool gone() noexcept override
    {
        return mGoneAfter >= 0 && static_cast<int64_t>(mIds.size()) >= mGoneAfter;
    }

private:
    int64_t mGoneAfter; // tokens; -1: never
    std::vector<int64_t> mIds;
    std::vector<std::string> mPieces;
    std::promise<json> mResult;
};

Request requestOf(json const& turn)
{
    Request request;
    request.ids = turn.value("ids", Ids{});
    request.text = turn.value("text", "");
    for (json const& each : turn.value("messages", json::array()))
    {
        request.messages.push_back({each.at("role"), each.at("content")});
    }
    request.stop = turn.value("stop", std::vector<std::string>{});
    request.maxNewTokens = turn.value("most", int64_t{8});
    request.sampling.temperature = turn.value("temperature", 0.0);
    request.sampling.seed = turn.value("seed", uint64_t{0});
    request.stopIds = turn.value("stops", Ids{});
    if (turn.contains("start"))
    {
        request.start = turn.at("start").get<bool>();
    }
    request.endSession = turn.value("end", false);
    return request;
}

json statistics(Scheduler const& scheduler)
{
    Statistics const now = scheduler.statistics();
    return {{"turns", now.turns}, {"cancelled", now.cancelled}, {"failed", now.failed}, {"refused", now.refused},
        {"compressions", now.compressions}, {"new_tokens", now.newTokens}, {"sessions", now.sessions},
        {"evicted", now.evicted}, {"not_saved", now.notSaved},
        {"rows_used", now.rowsUsed}, {"running", now.running}, {"waiting", now.waiting}};
}
} // namespace

int main(int count, char** arguments)
try
{
    if (count != 4)
    {
        std::cerr << "semkv_schedule: see test/schedule.cpp" << std::endl;
        return 2;
    }
    json const given = json::parse(std::cin);
    RuntimeOptions runtime;
    runtime.target = "onnxruntime-cpu";
    runtime.onnxruntime = arguments[2];
    auto const bundle = std::make_shared<Bundle const>(arguments[1], runtime.target, false);
    auto const contract = bundle->contract(std::stod(arguments[3]));
    SchedulerOptions options;
    options.idleSeconds = given.value("idle_seconds", options.idleSeconds);
    options.waitSeconds = given.value("wait_seconds", options.waitSeconds);
    options.maxWaiting = given.value("max_waiting", options.maxWaiting);
    options.maxSessions = given.value("max_sessions", options.maxSessions);
    options.saveSessions = given.value("save_sessions", "");
    options.shareSessions = given.value("share_sessions", false);
    options.warn = [](std::string const& text) { std::cerr << text << std::endl; };
    auto engine = openEngine(bundle, runtime, contract, given.value("rows", int64_t{4}), 1);
    auto texts = std::make_shared<semkv::text::Texts>(semkv::text::tokenizerFiles(
        bundle->text(), [&](std::string const& name) { return bundle->read(name); }));
    if (given.contains("genai"))
    {
        texts->load(given.at("genai"), runtime.onnxruntime);
    }
    Scheduler scheduler(std::make_unique<Session>(bundle, std::move(engine)), texts, options);

    json const& callers = given.at("callers");
    std::vector<json> results(callers.size());
    std::vector<std::thread> threads;
    for (size_t caller = 0; caller < callers.size(); ++caller)
    {
        threads.emplace_back([&, caller] {
            for (json const& turn : callers[caller])
            {
                std::this_thread::sleep_for(std::chrono::milliseconds(turn.value("after_ms", 0)));
                auto heard = std::make_unique<Heard>(turn);
                auto result = heard->result();
                scheduler.submit(turn.value("session", ""), requestOf(turn), std::move(heard));
                results[caller].push_back(result.get());
            }
        });
    }
    for (std::thread& thread : threads)
    {
        thread.join();
    }
    // What ended last is published with its round.
    std::this_thread::sleep_for(std::chrono::milliseconds(given.value("settle_ms", 200)));
    std::cout << json{{"callers", results}, {"statistics", statistics(scheduler)}}.dump() << std::endl;
    return 0;
}
catch (std::exception const& error)
{
    std::cerr << "semkv_schedule: " << error.what() << std::endl;
    return 1;
}
