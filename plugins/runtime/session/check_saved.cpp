// What a saved session must be to be taken.
#include "session/session.h"

#include <algorithm>

namespace semkv::runtime
{
namespace
{
std::string said(std::map<std::string, std::string> const& metadata, std::string const& key)
{
    auto const found = metadata.find(key);
    return found == metadata.end() ? std::string("none") : found->second;
}
} // namespace

void Session::checkIdentity(std::map<std::string, std::string> const& metadata, std::string const& path) const
{
    std::map<std::string, std::string> const called{{"format", "kind of file"}, {"version", "version of the file"},
        {"bundle", "bundle"}, {"target", "target"}, {"budget", "budget"}};
    for (auto const& [key, wanted] : identity())
    {
        std::string const got = said(metadata, key);
        if (got != wanted)
        {
            throw Error(SEMKV_ALTERED_FILE, "the saved session is of another " + called.at(key))
                .where(path)
                .expected(wanted.substr(0, 16))
                .got(got.substr(0, 16))
                .fix("open the bundle and budget that it was saved from");
        }
    }
}

// Nothing of a file is taken unless all of it fits.
void Session::checkSaved(SavedTensors const& saved, std::string const& path, int64_t first, int64_t count) const
{
    checkIdentity(saved.metadata, path);
    std::string const digest = said(saved.metadata, "sha256");
    if (digest != digestOf(saved.tensors))
    {
        throw Error(SEMKV_ALTERED_FILE, "the saved session is damaged")
            .where(path)
            .expected("SHA-256 " + digest.substr(0, 12) + "…");
    }
    int64_t const groups = static_cast<int64_t>(mSlots.groups);
    auto const is = [&](char const* name, Shape const& shape) {
        auto const found = saved.tensors.find(name);
        return found != saved.tensors.end() && found->second.type == Type::kInt64 && found->second.shape == shape;
    };
    if (!is("position", {count}) || !is("length", {groups, count}))
    {
        auto const position = saved.tensors.find("position");
        bool const counted = position != saved.tensors.end() && !position->second.shape.empty();
        throw Error(SEMKV_BAD_ARGUMENT, "a session of another number of rows")
            .where(path)
            .expected(std::to_string(count))
            .got(counted ? std::to_string(position->second.shape[0]) : "0");
    }
    Ids live(mSlots.groups, 0);
    for (int64_t group = 0; group < groups; ++group)
    {
        for (int64_t i = 0; i < count; ++i)
        {
            int64_t const length = saved.tensors.at("length").as<int64_t>()[group * count + i];
            int64_t const position = saved.tensors.at("position").as<int64_t>()[i];
            int64_t const capacity = mContract.groups[static_cast<size_t>(group)].capacity;
            if (length < 0 || length > position || position > mContract.maxContext)
            {
                throw Error(SEMKV_ALTERED_FILE, "the saved session does not fit the contract")
                    .where(path)
                    .fix("save it again");
            }
            if (length > capacity)
            {
                throw Error(SEMKV_ALTERED_FILE, "the saved session holds more slots than the caches")
                    .where(path)
                    .expected("at most " + std::to_string(capacity))
                    .got(std::to_string(length))
                    .fix("compress it before it is saved");
            }
            live[static_cast<size_t>(group)] = std::max(live[static_cast<size_t>(group)], length);
        }
    }
    for (auto const& [name, expected] : tensors(first, first + count, false))
    {
        Shape shape = expected.shape;
        size_t const dot = name.rfind('.');
        bool const isBuffer = name.compare(0, 7, "buffer.") == 0;
        if (name.compare(0, 7, "column.") == 0 || (isBuffer && mContract.buffer(name.substr(7, dot - 7))->hasSlots()))
        {
            shape[2] = live[static_cast<size_t>(std::stoll(name.substr(dot + 1)))];
        }
        auto const found = saved.tensors.find(name);
        if (found == saved.tensors.end() || found->second.shape != shape || found->second.type != expected.type)
        {
            throw Error(SEMKV_ALTERED_FILE, "the saved session's " + name + " is not the contract's")
                .where(path)
                .expected(std::string(nameOf(expected.type)) + " " + listed(shape))
                .got(found == saved.tensors.end()
                        ? "nothing"
                        : std::string(nameOf(found->second.type)) + " " + listed(found->second.shape));
        }
    }
}
} // namespace semkv::runtime
