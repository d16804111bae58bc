// An opened bundle: its manifest, and files that are what the manifest says.
#pragma once

#include "bundle/contract.h"
#include "bundle/files.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace semkv::runtime
{
// A graph's file, and the weights that it names: by the name that it has for a file, the file's bytes.
struct LoadedGraph
{
    std::string name, model;
    std::map<std::string, std::shared_ptr<PrivateCopy>> data;
};

class Bundle
{
public:
    // Verifies the manifest, the list of files, and the bytes of those that the target runs, or of all.
    Bundle(std::string const& root, std::string const& target, bool verifyAll);

    std::string const& text() const
    {
        return mText;
    }

    // SHA-256 of the manifest, and so of everything that it lists: saved sessions belong to a bundle by it.
    std::string const& fingerprint() const
    {
        return mFingerprint;
    }

    std::string const& root() const
    {
        return mRoot;
    }

    // The contract of a budget that was built; 0: of the smallest.
    std::shared_ptr<Contract const> contract(double budget) const;

    // Verified bytes of a graph and its weights.
    LoadedGraph graph(std::string const& name) const;

    // Verified bytes of an engine's file, or any other; one copy for all who ask.
    std::shared_ptr<PrivateCopy> plan(std::string const& name) const;

    // Verified bytes of a file.
    std::string read(std::string const& name) const
    {
        return mFiles->read(name);
    }

    std::string path(std::string const& name) const
    {
        return mFiles->path(name);
    }

    EngineRecord const& engines() const
    {
        return mEngines;
    }

    // [vocab]: whether a token ends a chunk.
    std::vector<uint8_t> delimiters(Contract const& contract) const;

private:
    std::string mRoot, mText, mFingerprint;
    std::unique_ptr<BundleFiles> mFiles;
    std::vector<std::shared_ptr<Contract const>> mContracts;
    EngineRecord mEngines;
};
} // namespace semkv::runtime
