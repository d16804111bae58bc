// Runs a contract's graphs in ONNX Runtime: caches appended in place, groups compressed into spare buffers.
#pragma once

#include "engine/engine.h"
#include "engine/onnxruntime/graph.h"

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace semkv::runtime
{
// Memory that begins zeroed, whose pages are taken when they are first written to: slots never used cost nothing.
class Memory
{
public:
    Memory() = default;
    Memory(Type type, Shape shape);

    View const& view() const
    {
        return mView;
    }

private:
    std::shared_ptr<void> mHeld;
    View mView;
};

class OrtEngine : public Engine
{
public:
    OrtEngine(std::shared_ptr<Bundle const> const& bundle, RuntimeOptions const& options,
        std::shared_ptr<Contract const> contract, int64_t batch, int64_t threads);

    Contract const& contract() const override
    {
        return *mContract;
    }

    int64_t batch() const override
    {
        return mBatch;
    }

    float const* run(std::string const& program, Feeds const& feeds, int64_t row) override;

    bool runsSomeRows() const override
    {
        return !mContract->batch;
    }

    float const* runRows(std::string const& program, Feeds const& feeds, int64_t first) override;
    std::map<size_t, Feeds> runGroups(std::string const& program, std::map<size_t, Feeds> const& feeds) override;
    Array read(std::string const& buffer, size_t group) const override;
    void write(std::string const& buffer, size_t group, Array const& array) override;
    void reset(int64_t row) override;
    int64_t cacheBytes() const override;

private:
    using Set = std::map<std::string, Memory>; // a group's buffers, by name
    using Kind = std::pair<int64_t, int64_t>;  // what decides the shapes of a group's buffers: heads and slots

    // The decoder's inputs and outputs, bound for runs of one shape.
    struct Bound
    {
        OrtBinding binding;
        std::map<std::string, Array> small; // inputs that are no buffers
        Array logits;

        bool fits(Feeds const& feeds) const;
        float const* run(Feeds const& feeds);
    };

    Memory make(Buffer const& buffer, size_t group) const;
    Kind kind(size_t group) const;
    std::unique_ptr<Bound> bind(
        std::string const& program, Graph const& graph, Feeds const& feeds, int64_t first, int64_t rows);
    Feeds runGroup(std::string const& program, size_t group, Feeds const& feeds);

    std::shared_ptr<Bundle const> mBundle;
    std::shared_ptr<Contract const> mContract;
    int64_t mBatch;
    size_t mWorkers;
    std::map<std::string, std::unique_ptr<OrtGraph>> mGraphs; // by the graph's name in the contract
    std::vector<Set> mBuffers;                                // by group
    std::map<Kind, std::vector<Set>> mSpare;
    std::mutex mSpareLock;
    // Of steps, by their first row and number of rows, the one that was made last at the end; until buffers are
    // exchanged.
    std::vector<std::pair<std::pair<int64_t, int64_t>, std::unique_ptr<Bound>>> mSteps;
    std::unique_ptr<Bound> mPiece;
};
} // namespace semkv::runtime
