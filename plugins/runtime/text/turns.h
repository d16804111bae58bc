// The turns of a chat as a template writes them, as semkv_deploy/model/turns.py: what opens it, what stands between a
// reply and the next one. A cache has replies as they were generated, so that earlier turns are never written again:
// what is new is found with a reply that the template cannot know.
#pragma once

#include "text/detokenizer.h"
#include "text/tokenizer.h"

namespace semkv::text
{
using Messages = std::vector<Message>;

// Ids of the conversation before its first reply.
Ids opening(Tokenizer const& tokenizer, Messages const& messages);

// The text of system messages alone, with which an opening begins; empty where the template gives none.
std::string beforeUser(Tokenizer const& tokenizer, Messages const& messages);

// The text between a reply and the next: the turn's end, the new messages, what opens a reply. `before` are the
// messages until the one that was replied to, included. Throws SEMKV_BAD_ARGUMENT where the template refuses them, or
// does not show replies.
std::string afterReply(Tokenizer const& tokenizer, Messages const& before, Messages const& after);

// Ids of a text behind another one: no space is put before it, as before a first word.
Ids encodeFollowing(Tokenizer const& tokenizer, std::string const& text);

// Ids of what follows the assistant's last message, up to where the next reply begins. Throws SEMKV_BAD_ARGUMENT where
// there is none, or nothing after it.
Ids following(Tokenizer const& tokenizer, Messages const& messages);

// Ids of the tokens with which the template ends a reply, or, without such, opens the next turn.
Ids endIds(Tokenizer const& tokenizer, Detokenizer const& detokenizer);
} // namespace semkv::text
