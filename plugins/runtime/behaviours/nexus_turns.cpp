#include "behaviours/nexus_turns.h"
#include "behaviours/spread_order.h"

#include <algorithm>
#include <cmath>

namespace semkv::runtime
{
namespace
{
bool any(Rows const& rows)
{
    return std::find(rows.begin(), rows.end(), 1) != rows.end();
}
} // namespace

TurnKeeper::TurnKeeper(NexusTurns const& spec, Engine& engine, Slots& slots)
    : Behaviour(engine, slots)
    , mSpec(spec)
    , mKept(spec.kept)
    , mTokens(spec.tokens)
    , mBegun(static_cast<size_t>(slots.batch), 0)
    , mEnded(static_cast<size_t>(slots.batch), 0)
{
}

void TurnKeeper::beginTurn(Rows const& rows)
{
    Rows over(rows.size());
    for (size_t row = 0; row < rows.size(); ++row)
    {
        over[row] = rows[row] && mEnded[row];
    }
    if (any(over))
    {
        finish(over);
    }
}

int64_t TurnKeeper::due(int64_t row) const
{
    // Rows that are spread over the turn have its positions.
    return mEnded[static_cast<size_t>(row)] && !mSpec.spread ? sizes(row).first : 0;
}

void TurnKeeper::beforeAppend(Ids const& appended)
{
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        for (size_t row = 0; row < appended.size(); ++row)
        {
            if (mSlots.length(group, static_cast<int64_t>(row)) + appended[row] > mContract.groups[group].capacity)
            {
                makeRoom(appended);
                return;
            }
        }
    }
}

void TurnKeeper::end(Rows const& rows)
{
    for (size_t row = 0; row < rows.size(); ++row)
    {
        mEnded[row] |= rows[row] && mSlots.position[row] > mBegun[row];
    }
}

void TurnKeeper::endTurn(Rows const& rows)
{
    end(rows);
    if (mSpec.atOnce)
    {
        beginTurn(rows);
    }
}

void TurnKeeper::compress(Rows const& rows)
{
    end(rows);
    beginTurn(rows);
}

void TurnKeeper::keep(double share, int64_t tokens)
{
    if ((share != 0) == (tokens != 0) || !(share >= 0 && share <= 1) || tokens < 0)
    {
        throw Error(SEMKV_BAD_ARGUMENT, "one of both is given")
            .where("keep_of_turns")
            .expected("a share up to 1, or 1 token or more")
            .got("share " + shortest(share) + ", tokens " + std::to_string(tokens));
    }
    if (std::ceil(mSpec.nexusShare * static_cast<double>(tokens)) > static_cast<double>(mSpec.most))
    {
        throw Error(SEMKV_BAD_ARGUMENT, "the bundle's adapter has fewer Nexus rows than are asked for")
            .where("keep_of_turns")
            .expected("at most " + std::to_string(mSpec.most))
            .got(std::to_string(tokens))
            .fix("ask for fewer, or build with another adapter");
    }
    mKept = share != 0 ? share : mKept;
    mTokens = tokens;
}

void TurnKeeper::reset(Rows const& rows)
{
    Behaviour::reset(rows);
    for (size_t row = 0; row < rows.size(); ++row)
    {
        if (rows[row])
        {
            mBegun[row] = mEnded[row] = 0;
        }
    }
}

Feeds TurnKeeper::state(int64_t first, int64_t last) const
{
    Ids turn, begun, ended;
    for (size_t row = static_cast<size_t>(first); row < static_cast<size_t>(last); ++row)
    {
        turn.push_back(mSlots.turn[row]);
        begun.push_back(mBegun[row]);
        ended.push_back(mEnded[row]);
    }
    Shape const shape{last - first};
    return {{"turn", Array::of(shape, turn)}, {"begun", Array::of(shape, begun)}, {"ended", Array::of(shape, ended)}};
}

void TurnKeeper::restore(Feeds const& state, int64_t first)
{
    Array const& turn = state.at("turn");
    for (int64_t number = 0; number < turn.shape[0]; ++number)
    {
        // A file that says otherwise was not saved by a session: no turn begins after what was seen.
        size_t const row = static_cast<size_t>(first + number);
        int64_t const position = mSlots.position[row];
        mSlots.turn[row] = std::clamp<int64_t>(turn.as<int64_t>()[number], 0, position);
        mBegun[row] = std::clamp<int64_t>(state.at("begun").as<int64_t>()[number], 0, position);
        mEnded[row] = state.at("ended").as<int64_t>()[number] != 0 && position > mBegun[row];
    }
}

std::pair<int64_t, int64_t> TurnKeeper::sizes(int64_t row) const
{
    int64_t const length = mSlots.at(row) - std::max(mBegun[static_cast<size_t>(row)], mSpec.sinks);
    int64_t const slots
        = mTokens != 0 ? mTokens : static_cast<int64_t>(std::ceil(mKept * static_cast<double>(length)));
    int64_t const share = static_cast<int64_t>(std::ceil(mSpec.nexusShare * static_cast<double>(slots)));
    if (slots >= length)
    {
        return {0, std::max<int64_t>(length, 0)};
    }
    return {std::min(share, mSpec.most), slots - share};
}

// Appends the Nexus rows of these rows' turns, and drops the turns' tokens.
void TurnKeeper::finish(Rows const& rows)
{
    Ids first(rows.size());
    for (size_t row = 0; row < rows.size(); ++row)
    {
        first[row] = std::max(mBegun[row], mSpec.sinks);
    }
    Ids until = first;
    {
        Timed const timed(stats.seconds);
        for (size_t row = 0; row < rows.size(); ++row)
        {
            int64_t const r = static_cast<int64_t>(row);
            auto const [nexus, recent] = rows[row] ? sizes(r) : std::pair<int64_t, int64_t>{0, 0};
            if (nexus > 0)
            {
                until[row] = mSlots.at(r) - recent;
                append(r, nexus, first[row], until[row]);
            }
        }
    }
    std::vector<Kept> keep;
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        Kept stays = live(group);
        for (size_t row = 0; row < rows.size(); ++row)
        {
            int64_t const r = static_cast<int64_t>(row);
            for (size_t slot = 0; rows[row] && slot < stays[row].size(); ++slot)
            {
                stays[row][slot] = stays[row][slot] && !leaves(r, group, slot, first[row], until[row]);
            }
        }
        keep.push_back(std::move(stays));
    }
    drop(keep);
    for (size_t row = 0; row < rows.size(); ++row)
    {
        if (rows[row])
        {
            ++mSlots.turn[row];
            mBegun[row] = mSlots.position[row];
            mEnded[row] = 0;
        }
    }
}

void TurnKeeper::append(int64_t row, int64_t count, int64_t first, int64_t end)
{
    Ids room(static_cast<size_t>(mSlots.batch), 0);
    room[static_cast<size_t>(row)] = count;
    beforeAppend(room);
    auto const [ids, positions] = nexusRows(row, count, first, end);
    size_t const piece = static_cast<size_t>(mContract.prefillChunk);
    for (size_t start = 0; start < ids.size(); start += piece)
    {
        size_t const stop = std::min(start + piece, ids.size());
        int64_t const tokens = static_cast<int64_t>(stop - start);
        auto const part = [&](Ids const& all) { return Ids(all.data() + start, all.data() + stop); };
        Feeds feeds;
        for (StepInput const& input : mContract.stepInputs)
        {
            feeds[input.name] = Array(Type::kInt64, input.shape(1));
        }
        feeds["input_ids"] = Array::of({1, tokens}, part(ids));
        feeds["position_ids"] = Array::of({1, tokens}, part(positions));
        feeds["logits_index"] = Array::of({1, 1}, {tokens - 1});
        feeds["length"] = mSlots.lengthsOf(row);
        mEngine.run(mSpec.decoder, feeds, row);
        mSlots.append(row, ids.data() + start, stop - start, mSpec.spread ? positions.data() + start : nullptr);
    }
}

bool TurnKeeper::leaves(int64_t row, size_t group, size_t slot, int64_t first, int64_t end)
{
    int64_t const position = mSlots.column("slot_position")[group].slots(row, 0)[slot];
    int64_t const turn = mSlots.column("slot_turn")[group].slots(row, 0)[slot];
    return turn == 2 * mSlots.turn[static_cast<size_t>(row)] && position >= first && position < end;
}

std::pair<Ids, Ids> TurnKeeper::nexusRows(int64_t row, int64_t count, int64_t first, int64_t end)
{
    Ids ids, positions;
    int64_t const number = std::min(mSlots.turn[static_cast<size_t>(row)], mSpec.turns - 1) * mSpec.most;
    if (!mSpec.spread)
    {
        for (int64_t i = 0; i < count; ++i)
        {
            ids.push_back(mSpec.firstId + number + i);
            positions.push_back(mSlots.at(row) + i);
        }
        return {ids, positions};
    }
    Ids tokens;
    int64_t const* const token = mSlots.column("slot_token")[0].slots(row, 0);
    std::vector<size_t> body;
    for (size_t slot = 0; slot < static_cast<size_t>(mSlots.length(0, row)); ++slot)
    {
        if (leaves(row, 0, slot, first, end))
        {
            body.push_back(slot);
            tokens.push_back(token[slot]);
        }
    }
    int64_t const* const position = mSlots.column("slot_position")[0].slots(row, 0);
    for (size_t const place : spreadOrder(tokens, mSpec.common))
    {
        int64_t const i = static_cast<int64_t>(ids.size());
        if (i == count)
        {
            break;
        }
        ids.push_back(mSpec.firstId + (number + i) * mSpec.firstId + tokens[place]);
        positions.push_back(position[body[place]]);
    }
    return {ids, positions};
}
} // namespace semkv::runtime
