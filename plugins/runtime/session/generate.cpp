#include "session/session.h"

#include <algorithm>

namespace semkv::runtime
{
void Session::generate(
    std::vector<Ids> const& rows, int64_t most, Sampling const& how, Ids const& stopIds, OnToken const& onToken)
{
    mCancelled = false;
    Sampler sampler(how);
    float const* logits = prefillRows(rows);
    size_t const vocab = static_cast<size_t>(mContract.vocabSize);
    Rows active(rows.size()), ending(rows.size(), 0);
    for (size_t row = 0; row < rows.size(); ++row)
    {
        active[row] = !rows[row].empty();
    }
    for (int64_t i = 0; i < most; ++i)
    {
        // Between a token's choice and its step nothing is cancelled: every token that was given out is in the cache.
        goOn();
        Ids chosen(rows.size(), 0);
        for (size_t row = 0; row < rows.size(); ++row)
        {
            if (!active[row])
            {
                sampler.skip();
                continue;
            }
            chosen[row] = sampler.choose(logits + row * vocab, mContract.vocabSize);
            // A row at its end ends alone: what it chose has no place.
            active[row] = std::find(stopIds.begin(), stopIds.end(), chosen[row]) == stopIds.end()
                && !refused(static_cast<int64_t>(row), 1, false);
        }
        if (std::find(active.begin(), active.end(), 1) == active.end())
        {
            return;
        }
        for (size_t row = 0; row < rows.size(); ++row)
        {
            ending[row] = active[row] && onToken && onToken(static_cast<int64_t>(row), chosen[row]);
        }
        logits = stepRows(chosen, active);
        for (size_t row = 0; row < rows.size(); ++row)
        {
            active[row] = active[row] && !ending[row];
        }
    }
}
} // namespace semkv::runtime
