// One engine of a contract, and its only execution context: profiles take turns in its activation memory.
#pragma once

#include "bundle/bundle.h"
#include "engine/engine.h"
#include "engine/tensorrt/cuda.h"
#include "engine/tensorrt/library.h"

#include <map>
#include <memory>
#include <string>

namespace semkv::runtime
{
// Sizes of the symbols in a decoder's shapes.
struct RunSizes
{
    int64_t batch = 1, sequence = 1, rows = 1;

    static RunSizes of(Feeds const& feeds);
};

class TrtGraph
{
public:
    // Opens the engine. Throws SEMKV_NO_TARGET where the runtime does not, and SEMKV_BAD_BUNDLE where its tensors or
    // aliases are not what the contract says.
    TrtGraph(Bundle const& bundle, Graph const& contract, TrtLibrary const& library, std::shared_ptr<void> runtime,
        std::shared_ptr<Cuda const> cuda);

    Graph const& contract() const
    {
        return mContract;
    }

    // Whether a profile takes a run of the decoder of these sizes; an engine without profiles has one, number 0.
    bool fits(size_t profile, RunSizes const& sizes) const;

    // Runs once and waits. `feeds`: inputs on the host, more than the engine has is fine. `addresses`: of the inputs
    // and outputs that are buffers. Returns the other outputs.
    Feeds run(size_t profile, RunSizes const& sizes, Feeds const& feeds, std::map<std::string, void*> const& addresses);

private:
    void checkTensors() const;
    Shape shapeOf(TensorSpec const& tensor, RunSizes const& sizes) const;
    void* small(std::string const& name, size_t bytes);
    void require(bool done, std::string const& what) const;
    template <class Result, class... Arguments>
    Result ask(int place, Arguments... arguments) const
    {
        return callImplementation<Result>(mEngine.get(), place, arguments...);
    }

    std::string mPath;
    Graph const& mContract;
    TrtLibrary const& mLibrary;
    std::shared_ptr<Cuda const> mCuda;
    std::shared_ptr<void> mRuntime, mEngine, mContext; // freed in the opposite order
    size_t mProfile = 0;
    std::map<std::string, DeviceMemory> mSmall; // inputs and outputs that are no buffers
};
} // namespace semkv::runtime
