// Programs of scope "group": groups side by side, each from its buffers into spare ones, which become its own.
#include "engine/onnxruntime/ort_engine.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>

namespace semkv::runtime
{
std::map<size_t, Feeds> OrtEngine::runGroups(std::string const& program, std::map<size_t, Feeds> const& feeds)
{
    std::vector<Graph> const& graphs = mContract->programs.at(program).graphs;
    if (!std::all_of(graphs.begin(), graphs.end(), [](Graph const& graph) { return !graph.aliases.empty(); }))
    {
        mSteps.clear(); // buffers are exchanged
    }
    std::vector<size_t> numbers;
    std::map<size_t, Feeds> results;
    for (auto const& [group, given] : feeds)
    {
        numbers.push_back(group);
        results[group]; // made here: workers fill in different ones
    }
    std::atomic<size_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    auto const work = [&] {
        for (size_t i = next++; i < numbers.size() && !failed; i = next++)
        {
            try
            {
                results.at(numbers[i]) = runGroup(program, numbers[i], feeds.at(numbers[i]));
            }
            catch (...)
            {
                if (!failed.exchange(true))
                {
                    error = std::current_exception();
                }
            }
        }
    };
    std::vector<std::thread> others;
    for (size_t i = 1; i < std::min(mWorkers, numbers.size()); ++i)
    {
        others.emplace_back(work);
    }
    work();
    for (std::thread& other : others)
    {
        other.join();
    }
    if (error)
    {
        std::rethrow_exception(error);
    }
    return results;
}

Feeds OrtEngine::runGroup(std::string const& program, size_t group, Feeds const& feeds)
{
    Program const& of = mContract->programs.at(program);
    Graph const& graph = of.forGroup(group);
    Set spare;
    {
        std::lock_guard<std::mutex> const lock(mSpareLock);
        std::vector<Set>& sets = mSpare[kind(group)];
        if (!sets.empty())
        {
            spare = std::move(sets.back());
            sets.pop_back();
        }
    }
    // Given back whatever happens: a run that fails must not cost a set.
    struct Back
    {
        OrtEngine& engine;
        Kind kind;
        Set& set;

        ~Back()
        {
            std::lock_guard<std::mutex> const lock(engine.mSpareLock);
            engine.mSpare[kind].push_back(std::move(set));
        }
    } const back{*this, kind(group), spare};

    OrtBinding run(*mGraphs.at(graph.name));
    std::map<std::string, View> given, results;
    std::vector<std::string> exchanged;
    for (auto const& [name, array] : feeds)
    {
        given[name] = array.view();
    }
    Set& own = mBuffers[group];
    for (auto const& [name, binding] : of.buffers)
    {
        auto const source = binding.input ? Binding::named(*binding.input, group, mBuffers.size()) : "";
        if (binding.input)
        {
            given[source] = own.at(name).view();
        }
        if (binding.output)
        {
            auto const result = Binding::named(*binding.output, group, mBuffers.size());
            auto const alias = graph.aliases.find(source);
            bool const inPlace = !binding.input || (alias != graph.aliases.end() && alias->second == result);
            results[result] = (inPlace ? own : spare).at(name).view();
            if (!inPlace)
            {
                exchanged.push_back(name);
            }
        }
    }
    for (TensorSpec const& tensor : graph.inputs)
    {
        run.input(tensor.name, given.at(tensor.name));
    }
    for (TensorSpec const& tensor : graph.outputs)
    {
        auto const found = results.find(tensor.name);
        found != results.end() ? run.output(tensor.name, found->second) : run.outputAsMade(tensor.name);
    }
    run.run();
    for (std::string const& name : exchanged)
    {
        std::swap(own.at(name), spare.at(name));
    }
    return run.made();
}
} // namespace semkv::runtime
