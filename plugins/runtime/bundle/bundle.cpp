#include "bundle/bundle.h"

#include "bundle/onnx_data.h"
#include "common/sha256.h"

#include <algorithm>
#include <filesystem>

namespace semkv::runtime
{
namespace
{
constexpr size_t kManifestLimit = size_t{1} << 28; // bytes: more is no manifest

std::string joined(std::vector<std::string> const& parts)
{
    std::string text;
    for (std::string const& part : parts)
    {
        text += (text.empty() ? "" : " or ") + part;
    }
    return text;
}

Field targetRecord(Field const& manifest, std::string const& target)
{
    Field const targets = manifest.at("targets");
    if (!targets.has(target))
    {
        throw Error(SEMKV_NO_TARGET, "the bundle was not built for this target")
            .where("target")
            .expected(joined(targets.names()))
            .got(target);
    }
    return targets.at(target);
}
} // namespace

Bundle::Bundle(std::string const& root, std::string const& target, bool verifyAll)
    : mRoot(root)
{
    std::error_code error;
    if (!std::filesystem::is_directory(root, error))
    {
        throw Error(SEMKV_BAD_BUNDLE, "no such bundle")
            .where(root)
            .expected("a directory written by `semkv-deploy build`");
    }
    std::string const path = root + "/" + kManifest;
    if (!std::filesystem::exists(std::filesystem::symlink_status(path, error)))
    {
        throw Error(SEMKV_BAD_BUNDLE, "not a bundle: it has no bundle.json")
            .where(root)
            .fix("give the directory `build` wrote");
    }
    mText = readAll(*openRegular(root, kManifest), kManifestLimit + 1, path);
    if (mText.size() > kManifestLimit)
    {
        throw Error(SEMKV_BAD_BUNDLE, "too large to be a manifest").where(path);
    }
    Sha256 digest;
    digest.update(mText);
    mFingerprint = digest.digest();
    Document const document(mText, path);
    Field const manifest = document.root();
    bool const versioned = manifest.has("schema_version") && manifest.at("schema_version").isInteger();
    int64_t const version = versioned ? manifest.at("schema_version").integer(INT64_MIN, INT64_MAX) : 0;
    if (version != kSchemaVersion)
    {
        throw Error(SEMKV_BAD_BUNDLE, "bundle of another schema version")
            .where(path)
            .expected(std::to_string(kSchemaVersion))
            .got(versioned ? std::to_string(version) : "none")
            .fix("build it again with the version of semkv-deploy that this library is of");
    }
    mFiles = std::make_unique<BundleFiles>(root, manifest.at("files"));
    Field const record = targetRecord(manifest, target), budgets = record.at("budgets");
    mEngines = readEngineRecord(record);
    for (size_t i = 0; i < budgets.size(); ++i)
    {
        auto contract = std::make_shared<Contract>(readContract(budgets.at(i).at("contract")));
        if (contract->target != target)
        {
            budgets.at(i).contradicts("a contract of target " + target, contract->target);
        }
        mContracts.push_back(std::move(contract));
    }
    if (mContracts.empty())
    {
        budgets.contradicts("a budget or more", "none");
    }
    // The same files as semkv_deploy.runtime.open.
    mFiles->check(verifyAll ? std::vector<std::string>{}
                            : std::vector<std::string>{"targets/" + target + "/", "tokenizer/", "delimiters.json"});
}

std::shared_ptr<Contract const> Bundle::contract(double budget) const
{
    auto const smaller = [](auto const& one, auto const& other) { return one->budget < other->budget; };
    if (budget == 0)
    {
        return *std::min_element(mContracts.begin(), mContracts.end(), smaller);
    }
    std::vector<std::string> built;
    for (auto const& contract : mContracts)
    {
        if (contract->budget == budget)
        {
            return contract;
        }
        built.push_back(shortest(contract->budget));
    }
    throw Error(SEMKV_BAD_ARGUMENT, "the target was not built for this budget")
        .where("budget")
        .expected(joined(built))
        .got(shortest(budget));
}

LoadedGraph Bundle::graph(std::string const& name) const
{
    LoadedGraph loaded{name, mFiles->read(name), {}};
    std::string const folder = name.substr(0, name.rfind('/') == std::string::npos ? 0 : name.rfind('/') + 1);
    for (ExternalTensor const& tensor : externalTensors(loaded.model, mFiles->path(name)))
    {
        std::string const file = folder + tensor.location;
        if (!isInside(tensor.location) || !mFiles->lists(file))
        {
            throw Error(SEMKV_BAD_BUNDLE, "external data that the bundle does not list")
                .where(mFiles->path(name))
                .expected("files of the bundle beside the graph")
                .got("'" + tensor.location + "' of tensor " + tensor.name);
        }
        int64_t const bytes = mFiles->record(file).bytes;
        if (tensor.offset > bytes || tensor.length > bytes - tensor.offset)
        {
            throw Error(SEMKV_BAD_BUNDLE, "a tensor lies beyond its file's end")
                .where(mFiles->path(name))
                .expected(std::to_string(bytes) + " bytes")
                .got("tensor " + tensor.name + " at " + std::to_string(tensor.offset));
        }
        if (loaded.data.count(tensor.location) == 0)
        {
            loaded.data[tensor.location] = mFiles->copy(file);
        }
    }
    return loaded;
}

std::shared_ptr<PrivateCopy> Bundle::plan(std::string const& name) const
{
    return mFiles->copy(name);
}

std::vector<uint8_t> Bundle::delimiters(Contract const& contract) const
{
    std::string const path = mFiles->path(contract.delimiters);
    Document const document(mFiles->read(contract.delimiters), path);
    std::vector<uint8_t> table(static_cast<size_t>(contract.vocabSize), 0);
    for (int64_t const token : document.root().at("token_ids").integers(INT64_MIN, INT64_MAX))
    {
        if (token >= 0 && token < contract.vocabSize) // ids past the model's vocabulary are ignored
        {
            table[static_cast<size_t>(token)] = 1;
        }
    }
    return table;
}
} // namespace semkv::runtime
