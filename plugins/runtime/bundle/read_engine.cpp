// Reads what a manifest says of engines: the file of each, its optimization profiles, and what all of a target need.
#include "bundle/contract.h"

namespace semkv::runtime
{
namespace
{
// [least, usual, most] of an input.
Profile::Range readRange(Field const& field, TensorSpec const* tensor)
{
    if (tensor == nullptr || field.size() != 3)
    {
        field.contradicts("three shapes of an input", tensor == nullptr ? "another tensor's" : "another number");
    }
    Profile::Range range{field.at(0).integers(0, INT32_MAX), field.at(2).integers(0, INT32_MAX)};
    bool fits = range.least.size() == tensor->shape.size() && range.most.size() == tensor->shape.size();
    for (size_t i = 0; fits && i < range.least.size(); ++i)
    {
        bool const open = tensor->shape[i] < 0;
        fits = range.least[i] <= range.most[i]
            && (open || (range.least[i] == tensor->shape[i] && range.most[i] == tensor->shape[i]));
    }
    if (!fits)
    {
        field.contradicts(
            "ascending shapes of " + listed(tensor->shape), listed(range.least) + " to " + listed(range.most));
    }
    return range;
}
} // namespace

void readEngine(Field const& field, Graph& graph)
{
    if (field.has("plan"))
    {
        graph.plan = field.at("plan").text();
        if (!isInside(graph.plan))
        {
            field.at("plan").contradicts("a path inside the bundle", graph.plan);
        }
    }
    Field const profiles = field.at("profiles");
    for (size_t i = 0; i < profiles.size(); ++i)
    {
        profiles.at(i).only({"phase", "shapes"});
        Profile profile;
        profile.phase = profiles.at(i).at("phase").text({"prefill", "decode", "both", "compress"});
        Field const shapes = profiles.at(i).at("shapes");
        for (std::string const& name : shapes.names())
        {
            profile.shapes[name] = readRange(shapes.at(name), graph.input(name));
        }
        graph.profiles.push_back(std::move(profile));
    }
}

EngineRecord readEngineRecord(Field const& target)
{
    EngineRecord record;
    if (target.at("kind").text() != "tensorrt")
    {
        return record;
    }
    record.version = target.has("version") ? target.at("version").text() : "";
    record.capabilities = target.at("compute_capabilities").integers(0, 1000);
    Field const plugins = target.at("plugins");
    for (size_t i = 0; i < plugins.size(); ++i)
    {
        record.plugins.push_back(plugins.at(i).text());
    }
    return record;
}
} // namespace semkv::runtime
