/* semkv: holds a conversation on a bundle of semkv-deploy, whose KV cache has a fixed capacity.
 *
 * C99, the ABI of libsemkv. A null semkv_error* is success; any other is freed with semkv_error_free. Nothing is thrown
 * across it. Handles are opaque. Structs begin with their size, by which they grow: zero one, set size to sizeof, and
 * set what is not to have its default, which is 0. Strings are UTF-8.
 *
 * Threads: a bundle may be used by several at once, a session by one at a time; sessions run side by side.
 * semkv_session_cancel is the one call on a session that any thread may make while another call runs. */
#ifndef SEMKV_H
#define SEMKV_H

#include <stddef.h>
#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

#if defined(SEMKV_BUILDING)
#define SEMKV_API __attribute__((visibility("default")))
#else
#define SEMKV_API
#endif

#define SEMKV_API_VERSION 1

typedef struct semkv_bundle semkv_bundle;
typedef struct semkv_session semkv_session;
typedef struct semkv_error semkv_error;

typedef enum semkv_code
{
    SEMKV_OK = 0,
    SEMKV_BAD_ARGUMENT = 1,  /* what was asked for cannot be */
    SEMKV_BAD_BUNDLE = 2,    /* no bundle, one of another version, or one that contradicts itself */
    SEMKV_ALTERED_FILE = 3,  /* a file of the bundle, or a saved session, is missing, damaged or another */
    SEMKV_NO_TARGET = 4,     /* the bundle, or this machine, has not what the target needs */
    SEMKV_CONTEXT_FULL = 5,  /* no more tokens fit the context that the bundle was built for */
    SEMKV_CACHE_FULL = 6,    /* no more tokens fit the cache, and nothing compresses it */
    SEMKV_OUT_OF_MEMORY = 7,
    SEMKV_RUNTIME = 8,       /* the runtime below failed */
    SEMKV_CANCELLED = 9,
    SEMKV_NEEDS_RESET = 10   /* an earlier call failed half way: reset the row */
} semkv_code;

SEMKV_API uint32_t semkv_api_version(void); /* of the library: SEMKV_API_VERSION of its header */
SEMKV_API semkv_code semkv_error_code(semkv_error const* error);
SEMKV_API char const* semkv_error_message(semkv_error const* error); /* where, what, expected, got, what to do */
SEMKV_API void semkv_error_free(semkv_error* error);                 /* null is taken */
/* An error of a library beside this one, such as libsemkv_text; both strings are copied. */
SEMKV_API semkv_error* semkv_error_new(semkv_code code, char const* message);

/* Bundles. */

typedef struct semkv_bundle_options
{
    size_t size;
    char const* target;         /* "onnxruntime-cpu" (null), "tensorrt" or "tensorrt-rtx" */
    char const* onnxruntime;    /* libonnxruntime's path (1.32 or newer); null: $SEMKV_ONNXRUNTIME, else the loader's */
    char const* native_library; /* libsemkv_onnxruntime.so: naming it is the consent to run its code; null: none runs */
    char const* native_sha256;  /* hexadecimal: what that file must be; null: any */
    int32_t verify_all;         /* 0: hash the files that the target runs; else hash all of them */
    char const* tensorrt;       /* libnvinfer's or libtensorrt_rtx's path; null: $SEMKV_TENSORRT, else the loader's */
    char const* cudart;         /* libcudart's path; null: $SEMKV_CUDART, else the loader's */
    int32_t allow_plugins;      /* not 0: the consent to run native code that the engines bring; 0: none runs */
} semkv_bundle_options;

/* Opens and verifies a bundle. `options` may be null. */
SEMKV_API semkv_error* semkv_bundle_open(char const* path, semkv_bundle_options const* options, semkv_bundle** out);
SEMKV_API void semkv_bundle_close(semkv_bundle* bundle);                  /* open sessions go on; null is taken */
SEMKV_API char const* semkv_bundle_manifest(semkv_bundle const* bundle);  /* bundle.json; lives as long as the bundle */

/* A file that the manifest lists, by its name there, such as "tokenizer/tokenizer.json": the bytes that were hashed.
 * They live as long as the bundle, and have no 0 behind them. */
SEMKV_API semkv_error* semkv_bundle_read(
    semkv_bundle const* bundle, char const* name, char const** data, size_t* bytes);

/* Sessions: a conversation in each of `batch` rows. */

typedef struct semkv_session_options
{
    size_t size;
    double budget;   /* a share that was built; 0: the smallest */
    int32_t batch;   /* rows; 0: what the graphs were built for, or 1 */
    int32_t threads; /* of ONNX Runtime; 0: one for each CPU that the process may use */
    int32_t capacity; /* slots that every cache group has, to read in more memory than the budget; 0: the budget's */
} semkv_session_options;

typedef struct semkv_session_info
{
    size_t size;
    int32_t batch, vocab_size, max_context, prefill_chunk;
    int32_t capacity;         /* slots of the largest cache group, of each row */
    double budget;
    int64_t cache_bytes;      /* of all buffers, spare ones included */
    int32_t const* stop_ids;  /* that end a reply; live as long as the session */
    size_t stop_count;
    int32_t keeps_turns;      /* not 0: semkv_session_keep_of_turns and semkv_session_trim_turns are taken */
} semkv_session_info;

typedef struct semkv_stats
{
    size_t size;
    int64_t position;      /* tokens that the row has seen */
    int64_t kept_slots;    /* live slots of its fullest cache group */
    int64_t compressions;  /* of all rows, since the conversation began */
    int64_t evicted;       /* slots dropped because no threshold met the target */
    double compress_seconds;
} semkv_stats;

typedef struct semkv_ids
{
    int32_t const* ids;
    size_t count;
} semkv_ids;

/* Allocates everything: nothing grows afterwards. Buffers of a TensorRT target lie on the GPU that is the calling
 * thread's current one. `options` may be null. */
SEMKV_API semkv_error* semkv_session_open(
    semkv_bundle* bundle, semkv_session_options const* options, semkv_session** out);
SEMKV_API void semkv_session_close(semkv_session* session); /* null is taken */
SEMKV_API semkv_error* semkv_session_get_info(semkv_session const* session, semkv_session_info* info);
SEMKV_API semkv_error* semkv_session_get_stats(semkv_session const* session, int32_t row, semkv_stats* stats);

/* A call that fails leaves the session as it was, unless something was compressed meanwhile: then rows that hold part
 * of what was given take only semkv_session_reset. Rows are counted from 0; -1 means all of them. Logits are float
 * [batch, vocab_size], and live until the session's next call. */

/* Appends a prompt, or the next turn's text, to each row; an empty one leaves its row alone (its logits are 0). `rows`
 * has `count` = batch entries. */
SEMKV_API semkv_error* semkv_session_prefill(
    semkv_session* session, semkv_ids const* rows, size_t count, float const** logits);

/* Whether a row takes so many more tokens, in whatever pieces: null, or the error that semkv_session_prefill would give,
 * SEMKV_CONTEXT_FULL or SEMKV_CACHE_FULL. Nothing is appended. */
SEMKV_API semkv_error* semkv_session_check_append(semkv_session const* session, int32_t row, int32_t count);

/* Appends a token to each row that is active ([batch], null: all); the other rows' logits mean nothing. */
SEMKV_API semkv_error* semkv_session_step(
    semkv_session* session, int32_t const* ids, uint8_t const* active, float const** logits);

/* The turn of a row, or of all, is over: what the method does at turn ends is done. */
SEMKV_API semkv_error* semkv_session_end_turn(semkv_session* session, int32_t row);

/* Compresses a row, or all, now, as at the end of a turn. */
SEMKV_API semkv_error* semkv_session_compress(semkv_session* session, int32_t row);

/* Takes back the last turn of a row, or of all, ended or not: what was appended since it began. A turn begins with what
 * is appended after end_turn, reset or load. Refused (SEMKV_BAD_ARGUMENT) once something was compressed since. */
SEMKV_API semkv_error* semkv_session_undo_turn(semkv_session* session, int32_t row);

/* Never drops what the open turn of a row, or of all, has so far: a system prompt, a document. Refused where the
 * bundle's method cannot, or the capacity is too small for it. */
SEMKV_API semkv_error* semkv_session_pin(semkv_session* session, int32_t row);

/* What a method makes of turns as such (SONIC); refused (SEMKV_BAD_ARGUMENT) where the bundle's makes nothing of them.
 * Slots that a turn keeps, for turns that are finished from now on: a share of its tokens (tokens 0), or a number
 * whatever its length (share 0). */
SEMKV_API semkv_error* semkv_session_keep_of_turns(semkv_session* session, double share, int32_t tokens);

/* Drops the Nexus rows of finished turns behind each turn's first `tokens`, in a row or in all. */
SEMKV_API semkv_error* semkv_session_trim_turns(semkv_session* session, int32_t tokens, int32_t row);

/* A new conversation in a row, or in all. */
SEMKV_API semkv_error* semkv_session_reset(semkv_session* session, int32_t row);

typedef struct semkv_generate_options
{
    size_t size;
    int32_t max_new_tokens;   /* of each row; 0: none */
    double temperature;       /* 0: greedy */
    double top_p;             /* 0: 1, all of the mass */
    int32_t top_k;            /* 0: all */
    uint64_t seed;            /* the same seed draws the same tokens as Python's Sampler does */
    int32_t const* stop_ids;  /* null: the bundle's own; not null with stop_count 0: none */
    size_t stop_count;
} semkv_generate_options;

/* Called with each token as it is chosen. Nonzero ends the row's reply behind this token, which is kept. */
typedef int (*semkv_on_token)(void* user, int32_t row, int32_t token);

/* Appends prompts as semkv_session_prefill does, and generates until a stop id, max_new_tokens, or the end of the row's
 * context or cache. Every token that the callback was given is in the cache; a stop id is neither given nor
 * appended. */
SEMKV_API semkv_error* semkv_session_generate(semkv_session* session, semkv_ids const* rows, size_t count,
    semkv_generate_options const* options, semkv_on_token on_token, void* user);

/* Ends the call that runs on the session, if one does, with SEMKV_CANCELLED before its next run of the model: between
 * pieces of a prompt, or tokens. A prompt that was cut short is taken back as after any failure; tokens that were given
 * to the callback stay. Safe from any thread while the session is open. */
SEMKV_API void semkv_session_cancel(semkv_session* session);

/* Conversations in files, the same as Session.save and Session.load of semkv_deploy: of a row, or of all. */
SEMKV_API semkv_error* semkv_session_save(
    semkv_session const* session, char const* path, int32_t row, char const* note); /* note: any text, or null */
SEMKV_API semkv_error* semkv_session_load(semkv_session* session, char const* path, int32_t row);

#if defined(__cplusplus)
}
#endif

#endif /* SEMKV_H */
