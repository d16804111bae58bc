"""Which tokens end a semantic unit: decided per token id, from the tokenizer alone (SemantiCache, arXiv 2603.14303).

A token is a delimiter when its text, stripped, is empty (white space on its own) or holds nothing but delimiter
symbols, at least one of them, and closing marks ('."', '),'). So " the" is none although it starts with a space: in
BPE and SentencePiece vocabularies nearly every word does. Special tokens that end a message or a text are delimiters
too; a piece of a character (an undecodable byte token) never is.
"""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from semkv_deploy.model.delimiters import CLOSERS, SYMBOLS, Delimiters

_TURN_END = re.compile(
    r"</s>|<eos>|[<\[][|｜]?(im_end|end|eot|eot_id|eom|eom_id|eos|endoftext|end[_▁]of[_▁](text|turn|message|sentence)"
    r"(_token)?)[|｜]?[>\]]",
    re.IGNORECASE,
)


def find_delimiters(tokenizer: PreTrainedTokenizerBase) -> Delimiters:
    """Applies the rule to every entry of the vocabulary, added tokens included."""
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    ends = {token for token in special if _TURN_END.fullmatch(names.get(token, ""))}
    if tokenizer.eos_token_id is not None:
        ends.add(int(tokenizer.eos_token_id))
    plain = sorted(token for token in names if token not in special)
    texts = _texts(tokenizer, plain, names)
    found = {token for token, text in zip(plain, texts, strict=True) if is_delimiter_text(text)}
    return Delimiters(tuple(sorted(found | ends)), tuple(sorted(ends)))


def is_delimiter_text(text: str) -> bool:
    """The rule for one token's decoded text."""
    stripped = "".join(text.split())
    if not stripped:
        return text != ""
    return all(c in SYMBOLS or c in CLOSERS for c in stripped) and any(c in SYMBOLS for c in stripped)


def _texts(tokenizer: PreTrainedTokenizerBase, tokens: list[int], names: dict[int, str]) -> list[str]:
    """Each token decoded alone. A decoder that drops a leading space turns "▁" into nothing: then its name counts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        texts = backend.decode_batch([[token] for token in tokens], skip_special_tokens=False)
    else:
        texts = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in tokens]
    return [text or names[token].replace("▁", " ") for token, text in zip(tokens, texts, strict=True)]
