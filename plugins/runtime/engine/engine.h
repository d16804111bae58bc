// What a session needs of a runtime: buffers by name, and programs that read and write them. An engine knows no method
// and no behaviour. Another runtime is another subclass, and a line in engine/open.cpp.
#pragma once

#include "bundle/bundle.h"
#include "common/tensor.h"

#include <map>
#include <memory>
#include <string>

namespace semkv::runtime
{
using Feeds = std::map<std::string, Array>; // inputs or outputs by name; a program takes those that it has

inline constexpr int64_t kEveryRow = -1;

class Engine
{
public:
    virtual ~Engine() = default;

    virtual Contract const& contract() const = 0;
    virtual int64_t batch() const = 0;

    // Runs a program of scope "cache": feeds are the inputs that are no buffers, [n,…] (length [groups,n]). With a
    // row, that row's slices of the buffers are bound, and n = 1. Returns logits, float [n,1,vocab], valid until the
    // next call.
    virtual float const* run(std::string const& program, Feeds const& feeds, int64_t row) = 0;

    // Whether steps may leave rows at both ends of the batch out: by runRows.
    virtual bool runsSomeRows() const
    {
        return false;
    }

    // Runs one token in each of n rows, `first` and those behind it: as `run` of every row, of these rows.
    virtual float const* runRows(std::string const& program, Feeds const& feeds, int64_t first)
    {
        (void) first;
        return run(program, feeds, kEveryRow);
    }

    // Runs a program of scope "group" for some groups, by number; others keep their buffers. Returns the outputs that
    // are no buffers.
    virtual std::map<size_t, Feeds> runGroups(std::string const& program, std::map<size_t, Feeds> const& feeds) = 0;

    // A group's buffer in host memory, whole.
    virtual Array read(std::string const& buffer, size_t group) const = 0;
    virtual void write(std::string const& buffer, size_t group, Array const& array) = 0;

    // Clears what a new conversation needs cleared, of one row or of all.
    virtual void reset(int64_t row) = 0;

    // Bytes of all buffers, spare ones included.
    virtual int64_t cacheBytes() const = 0;
};

// What a bundle is opened with beside its path.
struct RuntimeOptions
{
    std::string target, onnxruntime, nativeLibrary, nativeSha256;
    std::string tensorrt{}, cudart{}; // libraries of the TensorRT targets
    bool allowPlugins = false;        // native code that engines bring may run
};

// The engine of a bundle's target.
std::unique_ptr<Engine> openEngine(std::shared_ptr<Bundle const> const& bundle, RuntimeOptions const& options,
    std::shared_ptr<Contract const> contract, int64_t batch, int64_t threads);

// Throws SEMKV_NO_TARGET for a target that this library runs not.
void checkTarget(std::string const& target);
} // namespace semkv::runtime
