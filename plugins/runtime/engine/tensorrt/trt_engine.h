// Runs a contract's engines in TensorRT or TensorRT-RTX on a GPU: caches appended in place, groups compressed into
// spare buffers. As semkv_deploy/targets/tensorrt/engine.py.
#pragma once

#include "engine/engine.h"
#include "engine/tensorrt/cuda.h"
#include "engine/tensorrt/library.h"
#include "engine/tensorrt/trt_graph.h"

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace semkv::runtime
{
class TrtEngine : public Engine
{
public:
    // On the calling thread's current GPU. Throws SEMKV_NO_TARGET where the bundle has no engines, or none for it.
    TrtEngine(std::shared_ptr<Bundle const> const& bundle, RuntimeOptions const& options,
        std::shared_ptr<Contract const> contract, int64_t batch);

    Contract const& contract() const override
    {
        return *mContract;
    }

    int64_t batch() const override
    {
        return mBatch;
    }

    float const* run(std::string const& program, Feeds const& feeds, int64_t row) override;
    std::map<size_t, Feeds> runGroups(std::string const& program, std::map<size_t, Feeds> const& feeds) override;
    Array read(std::string const& buffer, size_t group) const override;
    void write(std::string const& buffer, size_t group, Array const& array) override;
    void reset(int64_t row) override;
    int64_t cacheBytes() const override;

private:
    using Set = std::map<std::string, DeviceMemory>; // a group's buffers, by name
    using Kind = std::pair<int64_t, int64_t>;        // what decides the shapes of a group's buffers: heads and slots

    View viewed(std::string const& buffer, size_t group) const; // type and shape; no host memory
    Kind kind(size_t group) const;
    std::pair<TrtGraph*, size_t> choose(std::string const& program, RunSizes const& sizes, bool prompt);

    std::shared_ptr<Bundle const> mBundle;
    std::shared_ptr<Contract const> mContract;
    int64_t mBatch;
    TrtLibrary mLibrary;
    std::shared_ptr<Cuda const> mCuda;
    std::map<std::string, std::unique_ptr<TrtGraph>> mGraphs; // by the graph's name in the contract
    std::vector<Set> mBuffers;                                // by group
    std::map<Kind, Set> mSpare;                               // one for each: groups are run one after the other
    Array mLogits;
};
} // namespace semkv::runtime
