#include "session/session.h"

#include <algorithm>
#include <cstring>

namespace semkv::runtime
{
namespace
{
bool anyOf(Rows const& rows)
{
    return std::any_of(rows.begin(), rows.end(), [](uint8_t row) { return row != 0; });
}
} // namespace

Session::Session(std::shared_ptr<Bundle const> bundle, std::unique_ptr<Engine> engine)
    : mBundle(std::move(bundle))
    , mEngine(std::move(engine))
    , mContract(mEngine->contract())
    , mSlots(mContract, mEngine->batch(), mBundle->delimiters(mContract))
    , mOpen(static_cast<size_t>(mEngine->batch()), 0)
    , mBroken(mOpen)
    , mStarts(mOpen.size())
    , mLogits(static_cast<size_t>(mEngine->batch() * mContract.vocabSize))
{
    for (BehaviourSpec const& spec : mContract.behaviours)
    {
        mBehaviours.push_back(interpreter(spec, *mEngine, mSlots));
    }
    for (auto const& each : mBehaviours)
    {
        for (auto const& other : mBehaviours)
        {
            if (other != each)
            {
                each->others.push_back(other.get());
            }
        }
    }
}

float const* Session::prefill(std::vector<Ids> const& rows)
{
    mCancelled = false;
    return prefillRows(rows);
}

float const* Session::prefillRows(std::vector<Ids> const& rows)
{
    if (rows.size() != mOpen.size())
    {
        throw Error(SEMKV_BAD_ARGUMENT, "wrong number of rows")
            .where("prefill")
            .expected(std::to_string(batch()) + " lists of tokens")
            .got(std::to_string(rows.size()));
    }
    Rows moving(rows.size());
    for (size_t row = 0; row < rows.size(); ++row)
    {
        checkIds(rows[row], "prefill");
        refused(static_cast<int64_t>(row), static_cast<int64_t>(rows[row].size()), true);
        moving[row] = !rows[row].empty();
    }
    if (!anyOf(moving))
    {
        throw Error(SEMKV_BAD_ARGUMENT, "nothing to prefill")
            .where("prefill")
            .expected("at least one token")
            .got("none");
    }
    begin(moving);
    undoneIfFailed([&] {
        std::fill(mLogits.begin(), mLogits.end(), 0.0f);
        for (size_t row = 0; row < rows.size(); ++row)
        {
            prefillRow(static_cast<int64_t>(row), rows[row]);
        }
    });
    return mLogits.data();
}

// Appends a row's tokens in pieces, and writes the logits of the last down.
void Session::prefillRow(int64_t row, Ids const& ids)
{
    size_t const piece = static_cast<size_t>(mContract.prefillChunk);
    for (size_t start = 0; start < ids.size(); start += piece)
    {
        goOn();
        size_t const count = std::min(piece, ids.size() - start);
        Ids room(mOpen.size(), 0);
        room[static_cast<size_t>(row)] = static_cast<int64_t>(count);
        for (auto const& behaviour : mBehaviours)
        {
            behaviour->beforeAppend(room);
        }
        int64_t const tokens = static_cast<int64_t>(count);
        float const* const logits = run(row, ids.data() + start, tokens, tokens - 1);
        std::copy_n(logits, mContract.vocabSize, mLogits.data() + row * mContract.vocabSize);
        appended(row, ids.data() + start, count);
    }
}

float const* Session::step(Ids const& ids, Rows const& active)
{
    mCancelled = false;
    return stepRows(ids, active);
}

float const* Session::stepRows(Ids const& given, Rows const& active)
{
    if (given.size() != mOpen.size() || active.size() != mOpen.size())
    {
        throw Error(SEMKV_BAD_ARGUMENT, "wrong number of rows")
            .where("step")
            .expected(std::to_string(batch()))
            .got(std::to_string(given.size()));
    }
    Ids ids = given, moved(given.size(), 0);
    for (size_t row = 0; row < ids.size(); ++row)
    {
        ids[row] = active[row] ? ids[row] : 0;
        moved[row] = active[row] != 0;
    }
    checkIds(ids, "step");
    for (size_t row = 0; row < ids.size(); ++row)
    {
        refused(static_cast<int64_t>(row), moved[row], true);
    }
    begin(active);
    undoneIfFailed([&] {
        for (auto const& behaviour : mBehaviours)
        {
            behaviour->beforeAppend(moved);
        }
        // All rows, or those from the first to the last that is active, where the engine can leave the others out.
        size_t first = 0, last = ids.size();
        if (mEngine->runsSomeRows() && anyOf(active))
        {
            for (; !active[first]; ++first) {}
            for (; !active[last - 1]; --last) {}
        }
        // An idle row's token lies in a dead slot; where one has none left, the others are run one by one.
        bool full = false;
        for (size_t row = first; row < last; ++row)
        {
            for (size_t group = 0; !active[row] && group < mSlots.groups; ++group)
            {
                full = full || mSlots.length(group, static_cast<int64_t>(row)) >= mContract.groups[group].capacity;
            }
        }
        int64_t const vocab = mContract.vocabSize;
        if (!full)
        {
            // Copied: a program that is run for what was appended may take the step's bindings away.
            int64_t const from = static_cast<int64_t>(first), rows = static_cast<int64_t>(last - first);
            std::copy_n(runRows(from, rows, ids.data() + first), rows * vocab, mLogits.data() + from * vocab);
        }
        for (size_t row = 0; row < ids.size(); ++row)
        {
            int64_t const r = static_cast<int64_t>(row);
            if (full && active[row])
            {
                std::copy_n(run(r, &ids[row], 1, 0), vocab, mLogits.data() + r * vocab);
            }
        }
        for (size_t row = 0; row < ids.size(); ++row)
        {
            if (active[row])
            {
                appended(static_cast<int64_t>(row), &ids[row], 1);
            }
        }
    });
    return mLogits.data();
}

// Logits of `count` tokens of a row, at its position.
float const* Session::run(int64_t row, int64_t const* ids, int64_t count, int64_t logitsIndex)
{
    return mEngine->run(kDecode, feedsOf(row, ids, count, logitsIndex), row);
}

// Logits of one token in each of some rows.
float const* Session::runRows(int64_t first, int64_t rows, int64_t const* ids)
{
    Ids every(static_cast<size_t>(batch()), 0);
    std::copy_n(ids, rows, every.begin() + first);
    Feeds feeds = feedsOf(kEveryRow, every.data(), 1, 0);
    if (rows == batch())
    {
        return mEngine->run(kDecode, feeds, kEveryRow);
    }
    for (auto& [name, array] : feeds)
    {
        auto const input = std::find_if(mContract.stepInputs.begin(), mContract.stepInputs.end(),
            [&, &of = name](StepInput const& each) { return each.name == of; });
        if (input != mContract.stepInputs.end() && !input->byRow)
        {
            continue;
        }
        // Rows are the first axis; of the lengths, [groups, B], the second.
        size_t const axis = name == "length" ? 1 : 0;
        int64_t const outer = axis == 1 ? array.shape[0] : 1, whole = array.shape[axis];
        Shape shape = array.shape;
        shape[axis] = rows;
        Array part(array.type, shape);
        size_t const row = array.data.size() / static_cast<size_t>(outer * whole);
        for (int64_t i = 0; i < outer; ++i)
        {
            std::memcpy(part.data.data() + static_cast<size_t>(i * rows) * row,
                array.data.data() + static_cast<size_t>(i * whole + first) * row, static_cast<size_t>(rows) * row);
        }
        array = std::move(part);
    }
    return mEngine->runRows(kDecode, feeds, first);
}

// What a run of a row, or of every row (kEveryRow), is fed beside buffers.
Feeds Session::feedsOf(int64_t row, int64_t const* ids, int64_t count, int64_t logitsIndex) const
{
    int64_t const rows = row == kEveryRow ? batch() : 1;
    Ids positions;
    for (int64_t r = 0; r < rows; ++r)
    {
        for (int64_t i = 0; i < count; ++i)
        {
            positions.push_back(mSlots.at(row == kEveryRow ? r : row) + i);
        }
    }
    Feeds feeds;
    feeds["input_ids"] = Array::of({rows, count}, Ids(ids, ids + rows * count));
    feeds["position_ids"] = Array::of({rows, count}, positions);
    feeds["logits_index"] = Array::of({rows, 1}, Ids(static_cast<size_t>(rows), logitsIndex));
    feeds["length"] = mSlots.lengthsOf(row);
    for (StepInput const& input : mContract.stepInputs)
    {
        feeds[input.name] = Array(Type::kInt64, input.shape(rows));
    }
    for (auto const& behaviour : mBehaviours)
    {
        behaviour->stepInputs(row, feeds);
    }
    return feeds;
}

void Session::appended(int64_t row, int64_t const* ids, size_t count)
{
    mSlots.append(row, ids, count);
    for (auto const& behaviour : mBehaviours)
    {
        behaviour->appended(row, ids, count);
    }
}

} // namespace semkv::runtime
