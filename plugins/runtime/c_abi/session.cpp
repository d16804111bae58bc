// Sessions of the C interface. What is done is done by session/.
#include "c_abi/handles.h"

using namespace semkv::runtime;

namespace
{
std::vector<Ids> listsOf(semkv_ids const* rows, size_t count)
{
    if (count > 0)
    {
        notNull(rows, "rows");
    }
    std::vector<Ids> lists(count);
    for (size_t row = 0; row < count; ++row)
    {
        if (rows[row].count > 0)
        {
            notNull(rows[row].ids, "rows[].ids");
            lists[row].assign(rows[row].ids, rows[row].ids + rows[row].count);
        }
    }
    return lists;
}

void checkRow(Session const& session, int32_t row)
{
    if (row < 0 || row >= session.batch())
    {
        reject("row", "0 to " + std::to_string(session.batch() - 1), std::to_string(row));
    }
}
} // namespace

extern "C" {
semkv_error* semkv_session_open(semkv_bundle* bundle, semkv_session_options const* given, semkv_session** out)
{
    return guarded([&] {
        notNull(bundle, "bundle");
        notNull(out, "out");
        semkv_session_options const options = taken(given, "options");
        auto contract = bundle->bundle->contract(options.budget);
        contract = options.capacity != 0 ? larger(contract, options.capacity) : contract;
        int64_t const batch = options.batch != 0 ? options.batch : contract->batch.value_or(1);
        if (batch < 1 || batch > 1 << 16 || batch != contract->batch.value_or(batch))
        {
            throw Error(SEMKV_BAD_ARGUMENT, "the graphs take another batch")
                .where("batch")
                .expected(contract->batch ? std::to_string(*contract->batch) : "1 or more")
                .got(std::to_string(batch));
        }
        if (options.threads < 0 || options.threads > 4096)
        {
            reject("threads", "0 (all) or more", std::to_string(options.threads));
        }
        auto engine = openEngine(bundle->bundle, bundle->options, contract, batch, options.threads);
        *out = new semkv_session{{bundle->bundle, std::move(engine)}};
    });
}

void semkv_session_close(semkv_session* session)
{
    delete session;
}

semkv_error* semkv_session_get_info(semkv_session const* session, semkv_session_info* info)
{
    return guarded([&] {
        notNull(session, "session");
        Contract const& contract = session->session.contract();
        semkv_session_info result = {};
        result.batch = static_cast<int32_t>(session->session.batch());
        result.vocab_size = static_cast<int32_t>(contract.vocabSize);
        result.max_context = static_cast<int32_t>(contract.maxContext);
        result.prefill_chunk = static_cast<int32_t>(contract.prefillChunk);
        result.capacity = static_cast<int32_t>(contract.capacity());
        result.budget = contract.budget;
        result.cache_bytes = session->session.engine().cacheBytes();
        result.stop_ids = contract.stopIds.data();
        result.stop_count = contract.stopIds.size();
        result.keeps_turns = session->session.keepsTurns();
        give(result, info, "info");
    });
}

semkv_error* semkv_session_get_stats(semkv_session const* session, int32_t row, semkv_stats* stats)
{
    return guarded([&] {
        notNull(session, "session");
        checkRow(session->session, row);
        CompressionStats const of = session->session.stats();
        Slots const& slots = session->session.slots();
        semkv_stats result = {};
        result.position = slots.at(row);
        result.kept_slots = slots.kept(row);
        result.compressions = of.runs;
        result.evicted = of.evicted;
        result.compress_seconds = of.seconds;
        give(result, stats, "stats");
    });
}

semkv_error* semkv_session_prefill(semkv_session* session, semkv_ids const* rows, size_t count, float const** logits)
{
    return guarded([&] {
        notNull(session, "session");
        float const* const result = session->session.prefill(listsOf(rows, count));
        if (logits != nullptr)
        {
            *logits = result;
        }
    });
}

semkv_error* semkv_session_check_append(semkv_session const* session, int32_t row, int32_t count)
{
    return guarded([&] {
        notNull(session, "session");
        checkRow(session->session, row);
        if (count < 0)
        {
            reject("count", "0 or more", std::to_string(count));
        }
        session->session.checkAppend(row, Ids(static_cast<size_t>(count), 0));
    });
}

semkv_error* semkv_session_step(semkv_session* session, int32_t const* ids, uint8_t const* active, float const** logits)
{
    return guarded([&] {
        notNull(session, "session");
        notNull(ids, "ids");
        size_t const batch = static_cast<size_t>(session->session.batch());
        Rows const moving = active != nullptr ? Rows(active, active + batch) : Rows(batch, 1);
        float const* const result = session->session.step(Ids(ids, ids + batch), moving);
        if (logits != nullptr)
        {
            *logits = result;
        }
    });
}

semkv_error* semkv_session_end_turn(semkv_session* session, int32_t row)
{
    return guarded([&] {
        notNull(session, "session");
        session->session.endTurn(row);
    });
}

semkv_error* semkv_session_compress(semkv_session* session, int32_t row)
{
    return guarded([&] {
        notNull(session, "session");
        session->session.compress(row);
    });
}

semkv_error* semkv_session_undo_turn(semkv_session* session, int32_t row)
{
    return guarded([&] {
        notNull(session, "session");
        session->session.undoTurn(row);
    });
}

semkv_error* semkv_session_pin(semkv_session* session, int32_t row)
{
    return guarded([&] {
        notNull(session, "session");
        session->session.pin(row);
    });
}

semkv_error* semkv_session_keep_of_turns(semkv_session* session, double share, int32_t tokens)
{
    return guarded([&] {
        notNull(session, "session");
        session->session.keepOfTurns(share, tokens);
    });
}

semkv_error* semkv_session_trim_turns(semkv_session* session, int32_t tokens, int32_t row)
{
    return guarded([&] {
        notNull(session, "session");
        session->session.trimTurns(tokens, row);
    });
}

semkv_error* semkv_session_reset(semkv_session* session, int32_t row)
{
    return guarded([&] {
        notNull(session, "session");
        session->session.reset(row);
    });
}

semkv_error* semkv_session_generate(semkv_session* session, semkv_ids const* rows, size_t count,
    semkv_generate_options const* given, semkv_on_token on_token, void* user)
{
    return guarded([&] {
        notNull(session, "session");
        semkv_generate_options const options = taken(given, "options");
        if (options.max_new_tokens < 0)
        {
            reject("max_new_tokens", "0 or more", std::to_string(options.max_new_tokens));
        }
        Sampling const how{options.temperature, options.top_p == 0 ? 1.0 : options.top_p, options.top_k, options.seed};
        std::vector<int32_t> const& own = session->session.contract().stopIds;
        Ids const stops = options.stop_ids != nullptr ? Ids(options.stop_ids, options.stop_ids + options.stop_count)
                                                      : Ids(own.begin(), own.end());
        OnToken call;
        if (on_token != nullptr)
        {
            call = [&](int64_t row, int64_t token) {
                return on_token(user, static_cast<int32_t>(row), static_cast<int32_t>(token)) != 0;
            };
        }
        session->session.generate(listsOf(rows, count), options.max_new_tokens, how, stops, call);
    });
}

void semkv_session_cancel(semkv_session* session)
{
    if (session != nullptr)
    {
        session->session.cancel();
    }
}

semkv_error* semkv_session_save(semkv_session const* session, char const* path, int32_t row, char const* note)
{
    return guarded([&] {
        notNull(session, "session");
        notNull(path, "path");
        session->session.save(path, row, text(note));
    });
}

semkv_error* semkv_session_load(semkv_session* session, char const* path, int32_t row)
{
    return guarded([&] {
        notNull(session, "session");
        notNull(path, "path");
        session->session.load(path, row);
    });
}
}
