// semkv_driver: does what the lines of its standard input say, each a JSON object with "do", and answers each with a
// line: {"ok": …} or {"code": …, "error": …}.
//
//     semkv_driver threads BUNDLE LIBONNXRUNTIME ROWS: see threads.cpp
//     semkv_driver bench BUNDLE LIBONNXRUNTIME BUDGET ROWS THREADS STEPS [NATIVE_LIBRARY] < ids: see bench.cpp
#include "driver.h"

#include <nlohmann/json.hpp>

#include <iostream>
#include <optional>

using nlohmann::json;

namespace
{
json logits(semkv::Session const& session, float const* values)
{
    auto const info = session.info();
    json rows = json::array();
    for (int32_t row = 0; row < info.batch; ++row, values += info.vocab_size)
    {
        rows.push_back(std::vector<float>(values, values + info.vocab_size));
    }
    return rows;
}

semkv::GenerateOptions generateOptions(json const& line)
{
    semkv::GenerateOptions options;
    options.maxNewTokens = line.value("most", 8);
    options.temperature = line.value("temperature", 0.0);
    options.topP = line.value("top_p", 1.0);
    options.topK = line.value("top_k", 0);
    options.seed = line.value("seed", uint64_t{0});
    options.bundleStops = !line.contains("stops");
    options.stopIds = line.value("stops", semkv::Ids{});
    return options;
}

json done(semkv::Session& session, json const& line)
{
    std::string const what = line.at("do");
    int32_t const row = line.value("row", semkv::kEveryRow);
    if (what == "prefill")
    {
        return logits(session, session.prefill(line.at("rows").get<std::vector<semkv::Ids>>()));
    }
    if (what == "step")
    {
        return logits(session, session.step(line.at("ids"), line.value("active", std::vector<uint8_t>{})));
    }
    if (what == "generate")
    {
        json called = json::array();
        int32_t const most = line.value("break_after", -1);
        auto const onToken = [&](int32_t of, int32_t token) {
            called.push_back({of, token});
            return static_cast<int32_t>(called.size()) != most;
        };
        json replies = session.generate(line.at("rows").get<std::vector<semkv::Ids>>(), generateOptions(line), onToken);
        return {{"replies", replies}, {"called", called}};
    }
    if (what == "stats")
    {
        auto const stats = session.stats(row);
        return {{"position", stats.position}, {"kept_slots", stats.kept_slots}, {"compressions", stats.compressions},
            {"evicted", stats.evicted}, {"compress_seconds", stats.compress_seconds}};
    }
    if (what == "info")
    {
        auto const info = session.info();
        return {{"batch", info.batch}, {"vocab_size", info.vocab_size}, {"max_context", info.max_context},
            {"prefill_chunk", info.prefill_chunk}, {"capacity", info.capacity}, {"budget", info.budget},
            {"cache_bytes", info.cache_bytes}, {"keeps_turns", info.keeps_turns},
            {"stop_ids", std::vector<int32_t>(info.stop_ids, info.stop_ids + info.stop_count)}};
    }
    what == "end_turn"       ? session.endTurn(row)
        : what == "compress" ? session.compress(row)
        : what == "reset"    ? session.reset(row)
        : what == "undo"     ? session.undoTurn(row)
        : what == "pin"      ? session.pin(row)
        : what == "check"    ? session.checkAppend(row, line.at("count"))
        : what == "keep"     ? session.keepOfTurns(line.value("share", 0.0), line.value("tokens", 0))
        : what == "trim"     ? session.trimTurns(line.at("tokens"), row)
        : what == "save"     ? session.save(line.at("path"), row, line.value("note", ""))
        : what == "load"     ? session.load(line.at("path"), row)
                             : throw std::invalid_argument(what);
    return nullptr;
}

// "open": options of a bundle and of a session.
semkv::Session opened(json const& line)
{
    semkv::BundleOptions of;
    of.target = line.value("target", of.target);
    of.onnxruntime = line.value("onnxruntime", "");
    of.nativeLibrary = line.value("native_library", "");
    of.nativeSha256 = line.value("native_sha256", "");
    of.verifyAll = line.value("verify_all", false);
    of.tensorrt = line.value("tensorrt", "");
    of.cudart = line.value("cudart", "");
    of.allowPlugins = line.value("allow_plugins", false);
    semkv::Bundle const bundle(line.at("bundle"), of);
    return bundle.session({line.value("budget", 0.0), line.value("batch", 0), line.value("threads", 0),
        line.value("capacity", 0)});
}
} // namespace

int main(int count, char** arguments)
try
{
    if (count == 5 && std::string(arguments[1]) == "threads")
    {
        semkv::BundleOptions options;
        options.onnxruntime = arguments[3];
        return semkv::test::runThreads(semkv::Bundle(arguments[2], options), std::stoi(arguments[4]));
    }
    if (count >= 8 && std::string(arguments[1]) == "bench")
    {
        semkv::BundleOptions options;
        options.onnxruntime = arguments[3];
        options.nativeLibrary = count > 8 ? arguments[8] : "";
        semkv::SessionOptions const how{std::stod(arguments[4]), std::stoi(arguments[5]), std::stoi(arguments[6]), 0};
        semkv::Session session = semkv::Bundle(arguments[2], options).session(how);
        return semkv::test::runBench(session, std::stoi(arguments[7]));
    }
    std::optional<semkv::Session> session;
    for (std::string text; std::getline(std::cin, text);)
    {
        json answer;
        try
        {
            json const line = json::parse(text);
            if (line.at("do") == "open")
            {
                session.reset();
                session.emplace(opened(line));
                answer = {{"ok", nullptr}};
            }
            else if (line.at("do") == "close")
            {
                session.reset();
                answer = {{"ok", nullptr}};
            }
            else
            {
                answer = {{"ok", done(session.value(), line)}};
            }
        }
        catch (semkv::Error const& error)
        {
            answer = {{"code", error.code()}, {"error", error.what()}};
        }
        catch (std::exception const& error)
        {
            answer = {{"code", -1}, {"error", error.what()}};
        }
        std::cout << answer.dump() << std::endl;
    }
    return 0;
}
catch (std::exception const& error)
{
    std::cerr << "semkv_driver: " << error.what() << std::endl;
    return 1;
}
