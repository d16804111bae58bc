// The contract of one budget (docs/contract.md): everything that a session is told about a bundle.
#pragma once

#include "bundle/json.h"
#include "common/tensor.h"

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

namespace semkv::runtime
{
struct CacheGroup
{
    int64_t layer, heads, capacity;
};

// Dimension names with the sizes that are numbers: B rows, Hkv heads of a group, C slots of a group, D head size.
struct Buffer
{
    std::string name;
    std::vector<std::string> dims;
    Type type;
    bool isFloat32; // says something of slots: cleared for a new conversation

    bool hasSlots() const;
    Shape sizes(CacheGroup const& group, int64_t batch, int64_t headDim) const;
};

// A decoder input beyond ids, positions, logits_index and length: int64 [count], or [B, count].
struct StepInput
{
    std::string name;
    bool byRow;
    int64_t heads; // of all groups, each with numbers of its own; 0: a row has one list
    int64_t count;

    Shape shape(int64_t rows) const
    {
        if (!byRow)
        {
            return {count};
        }
        return heads > 0 ? Shape{rows, heads, count} : Shape{rows, count};
    }
};

struct TensorSpec
{
    std::string name;
    Type type;
    Shape shape;                      // -1: open
    std::vector<std::string> symbols; // by dimension, the name of an open size; empty where it is a number
};

struct Binding
{
    std::optional<std::string> input, output; // patterns

    // The names for one group of so many.
    static std::string named(std::string const& pattern, size_t group, size_t groups);
};

// An optimization profile of an engine: the runs that it is for, and the sizes of inputs that it takes.
struct Profile
{
    struct Range
    {
        Shape least, most;
    };

    std::string phase;
    std::map<std::string, Range> shapes; // by input; others are static
};

struct Graph
{
    std::string name, phase, onnx;
    std::string plan; // the engine's file; empty: the graph itself is run, or no engine was built
    std::vector<Profile> profiles;
    std::vector<int64_t> groups;
    std::vector<TensorSpec> inputs, outputs;
    std::map<std::string, std::string> aliases;

    TensorSpec const* input(std::string const& named) const;
    TensorSpec const* output(std::string const& named) const;
};

struct Program
{
    bool ofGroup;
    std::map<std::string, Binding> buffers;
    std::vector<Graph> graphs;

    Graph const& ofPhase(bool prompt) const;
    Graph const& forGroup(size_t group) const;
};

struct MakeRoom
{
    std::string program;
    bool atTurns;
    std::vector<int64_t> keepSlots;
    std::vector<double> turnShare;
    int64_t least;
    double recentShare;
    int64_t recentLeast, reserve;
    std::map<std::string, std::vector<Array>> byGroup;
};

// Of the same fields; a turn's own slots are meant where those of make_room are of all that a row holds.
struct IsolatedTurns : MakeRoom
{
};

struct ReadAgain
{
    std::string program, input;
    bool atTurns;
    int64_t piece;
};

struct NexusTurns
{
    std::string program, decoder;
    bool atOnce;
    bool spread; // Nexus rows begin as tokens of the turn, at their positions
    std::unordered_map<int64_t, size_t> common; // where a token stands among those that they begin as last
    int64_t firstId, most, turns;
    double kept;
    int64_t tokens;
    double nexusShare;
    int64_t sinks;
    std::vector<int64_t> keepSlots;
};

struct DomainWeights
{
    std::vector<int64_t> weights, logShares;
};

// Where a text is cut into blocks; with a column it is Blocks, with a program BlockTables.
struct BlockRule
{
    int64_t base, search, nearness;
    std::vector<int64_t> turnIds, tokenIds;
    std::vector<DomainWeights> domains;
    std::optional<int64_t> domain;
    std::string column;
    std::string program, input;
    int64_t most = 0, closed = 0;

    int64_t longest() const
    {
        return base + search;
    }

    int64_t shortest() const
    {
        return base - search;
    }
};

// Where blocks end in each head's slots, of which some were evicted.
struct SlotTables
{
    std::string program, input, column;
    int64_t join, most, closed;
};

using BehaviourSpec = std::variant<MakeRoom, IsolatedTurns, ReadAgain, NexusTurns, BlockRule, SlotTables>;

struct Contract
{
    std::string target;
    double budget;
    std::optional<int64_t> batch;
    int64_t maxContext, prefillChunk;
    Type dtype;
    std::optional<int64_t> native;
    int64_t headDim, vocabSize;
    std::vector<int32_t> stopIds;
    std::string delimiters;
    std::vector<CacheGroup> groups;
    std::vector<Buffer> buffers, columns;
    std::vector<StepInput> stepInputs;
    std::map<std::string, Program> programs;
    std::vector<BehaviourSpec> behaviours;

    Buffer const* buffer(std::string const& name) const;
    StepInput const* stepInput(std::string const& name) const;
    int64_t capacity() const; // of the largest group

    // Buffers that a group's program gives back elsewhere than it took them: there are spare ones of these.
    std::vector<std::string> exchanged() const;
};

// A contract whose caches are larger than it says; what it keeps when it compresses is the same. Throws
// SEMKV_BAD_ARGUMENT where shapes are static, a table of blocks has the budget's size, or for less than the budget's.
std::shared_ptr<Contract const> larger(std::shared_ptr<Contract const> const& contract, int64_t capacity);

inline constexpr char const* kDecode = "decode";
inline constexpr int64_t kSchemaVersion = 5; // of manifests and of contracts
inline constexpr int64_t kMost = 1 << 24;    // a number of a sensible size

// What a TensorRT target's record says of all of its engines.
struct EngineRecord
{
    std::string version;              // of the runtime that built them; empty: none were built
    std::vector<int64_t> capabilities; // compute capabilities that they are for, 86 for 8.6
    std::vector<std::string> plugins; // operators that are native code in them
};

// Reads a contract and compares its parts with each other. Throws SEMKV_BAD_BUNDLE naming the field.
Contract readContract(Field const& field);
EngineRecord readEngineRecord(Field const& target);
void readEngine(Field const& field, Graph& graph); // plan and profiles, when inputs are read
void readLayout(Field const& field, Contract& contract);
BehaviourSpec readBehaviour(Field const& field, Contract const& contract);

// Whether a relative path with slashes stays where it starts.
bool isInside(std::string const& path);
} // namespace semkv::runtime
