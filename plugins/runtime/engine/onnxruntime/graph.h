// One graph of a contract in ONNX Runtime, and runs of it whose inputs and outputs are somebody's memory.
#pragma once

#include "bundle/bundle.h"
#include "engine/onnxruntime/native.h"
#include "engine/onnxruntime/ort.h"

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace semkv::runtime
{
class OrtGraph
{
public:
    // Throws SEMKV_BAD_BUNDLE where the graph's inputs and outputs are not what the contract says.
    OrtGraph(Ort const& ort, LoadedGraph loaded, Graph const& contract, int64_t threads,
        std::optional<NativeLibrary> const& native);

    Ort const& ort() const
    {
        return mOrt;
    }

    Graph const& contract() const
    {
        return mContract;
    }

    OrtSession* session() const
    {
        return mSession.get();
    }

private:
    void checkSide(bool inputs) const;

    Ort const& mOrt;
    LoadedGraph mLoaded; // its weights must outlive the session
    Graph const& mContract;
    std::shared_ptr<OrtSession> mSession;
};

// Memory bound to a graph's inputs and outputs, for any number of runs.
class OrtBinding
{
public:
    explicit OrtBinding(OrtGraph const& graph);

    void input(std::string const& name, View const& view);
    void output(std::string const& name, View const& view);
    void outputAsMade(std::string const& name); // ONNX Runtime allocates it
    void run();

    // Copies of what ONNX Runtime allocated, after a run, by name.
    std::map<std::string, Array> made() const;

private:
    OrtGraph const& mGraph;
    std::shared_ptr<OrtIoBinding> mBinding;
    std::vector<std::shared_ptr<OrtValue>> mHeld;
    std::vector<std::string> mOutputs;
    std::vector<bool> mIsMade;
};
} // namespace semkv::runtime
