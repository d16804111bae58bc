/* semkv_text: a bundle's texts. Ids of texts, texts of ids as they come, and what a chat template writes.
 *
 * C99, the ABI of libsemkv_text, which stands beside libsemkv. Conventions are those of semkv.h: a null semkv_error* is
 * success, structs begin with their size, strings are UTF-8.
 *
 * Tokenizer and chat template are onnxruntime-genai's (0.18 or newer), whose library is loaded by the first call of
 * semkv_text_open and by nothing else. That call sets ORT_DISABLE_TELEMETRY to 1 in the environment where it is not
 * set, so that the library sends nothing: no other thread should use the environment meanwhile. A chat template is a
 * program that comes with the bundle; it runs in this process, without limits.
 *
 * What a call gives is the caller's, and is freed with semkv_text_free, but for what a stream gives. Threads: a
 * semkv_text may be used by several at once, a stream by one at a time. */
#ifndef SEMKV_TEXT_H
#define SEMKV_TEXT_H

#include "semkv/semkv.h"

#if defined(__cplusplus)
extern "C" {
#endif

typedef struct semkv_text semkv_text;
typedef struct semkv_text_stream semkv_text_stream;

typedef struct semkv_text_options
{
    size_t size;
    char const* genai;       /* libonnxruntime-genai's path; null: $SEMKV_GENAI, else the loader's */
    char const* onnxruntime; /* libonnxruntime's path, as for the bundle; null: $SEMKV_ONNXRUNTIME, else the loader's */
} semkv_text_options;

/* Opens a bundle's tokenizer: files that are verified as they are read. `options` may be null. The bundle may be closed
 * afterwards. SEMKV_NO_TARGET where the library is not there, or was not compared with Python's on such a tokenizer. */
SEMKV_API semkv_error* semkv_text_open(
    semkv_bundle const* bundle, semkv_text_options const* options, semkv_text** out);
SEMKV_API void semkv_text_close(semkv_text* text); /* its streams go on; null is taken */
SEMKV_API void semkv_text_free(void* memory);      /* null is taken */

/* Ids of a text, without a token of the tokenizer's own before or behind; markup such as "<|im_end|>" becomes its
 * token. SEMKV_BAD_ARGUMENT for what is no UTF-8, or would have to be normalized first. */
SEMKV_API semkv_error* semkv_text_encode(semkv_text const* text, char const* from, int32_t** ids, size_t* count);

/* The text of ids, without special tokens; what is no UTF-8 is U+FFFD. `*to` ends with a 0, and may have others. */
SEMKV_API semkv_error* semkv_text_decode(
    semkv_text const* text, int32_t const* ids, size_t count, char** to, size_t* bytes);

/* Ids that end a reply: the bundle's, and those with which its chat template ends one. */
SEMKV_API semkv_error* semkv_text_stop_ids(semkv_text const* text, int32_t** ids, size_t* count);

/* A reply's text as its tokens come, whole characters all. */
SEMKV_API semkv_error* semkv_text_stream_open(semkv_text const* text, semkv_text_stream** out);
SEMKV_API void semkv_text_stream_close(semkv_text_stream* stream); /* null is taken */

/* What has become certain with a token: often nothing. It lives until the stream's next call. */
SEMKV_API semkv_error* semkv_text_stream_push(
    semkv_text_stream* stream, int32_t token, char const** piece, size_t* bytes);

/* The rest at the reply's end: what stayed no whole character is U+FFFD. The stream is then as new. */
SEMKV_API semkv_error* semkv_text_stream_flush(semkv_text_stream* stream, char const** piece, size_t* bytes);

typedef struct semkv_message
{
    char const* role; /* "system", "user", "assistant", as the model's template has them */
    char const* content;
} semkv_message;

/* The conversation as the chat template writes it; with `prompt`, up to where the assistant's reply begins. */
SEMKV_API semkv_error* semkv_text_render(semkv_text const* text, semkv_message const* messages, size_t count,
    int32_t prompt, char** to, size_t* bytes);

/* Ids to append before the first reply: all of the conversation. */
SEMKV_API semkv_error* semkv_text_opening(
    semkv_text const* text, semkv_message const* messages, size_t count, int32_t** ids, size_t* ids_count);

/* Ids to append before the next reply: what the template writes behind the last message of the assistant's. That one
 * the cache has, as the tokens that were generated; the ones before it are never written again. */
SEMKV_API semkv_error* semkv_text_following(
    semkv_text const* text, semkv_message const* messages, size_t count, int32_t** ids, size_t* ids_count);

#if defined(__cplusplus)
}
#endif

#endif /* SEMKV_TEXT_H */
