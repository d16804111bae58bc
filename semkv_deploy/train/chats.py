"""JSON lines of dialogues, in the forms that are common, as token ids in the model's chat template."""

from __future__ import annotations

import json
from typing import Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.template import ChatTemplate
from semkv_deploy.train.layout import Dialogue

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Roles of ShareGPT and of chat templates, and the template's."""

JOINED = 60
"""Words that a conversation has at least where short dialogues are joined to one."""

_EXPECTED = '{"conversations": [{"from": …, "value": …}, …]}, {"messages": […]} or {"history": [{"user": …, "bot": …}]}'

Messages = list[dict[str, str]]


def read_chats(text: str, tokenizer: Any, where: str, *, most: int, joined: bool) -> list[Dialogue]:
    """Dialogues of two turns or more that fit in `most` tokens; what follows the last turn that fits is left out.

    A turn is a user's message and what comes until the next one. As in a running chat, the line feed that a template
    writes after a reply belongs to the next turn, because a cache holds a reply as it was generated.

    Args:
        joined: whether neighbours are joined to conversations of some length.

    Raises:
        SemkvError: when a line is no dialogue, or the tokenizer has no chat template.
    """
    template = ChatTemplate.of(tokenizer)
    if template is None:
        raise SemkvError("the tokenizer has no chat template", where=where, fix="take sources of running text alone")
    conversations = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            conversations.append(_messages(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            at = f"{where}, line {number}"
            raise SemkvError("no dialogue", where=at, expected=_EXPECTED, got=repr(error)) from None
    try:
        made = [
            _dialogue(of, template, tokenizer, where, most)
            for of in (_join(conversations) if joined else conversations)
        ]
    finally:
        template.close()
    return [dialogue for dialogue in made if dialogue is not None]


def _messages(record: Any) -> Messages:
    """One line's messages."""
    if "history" in record:
        pairs = [(pair["user"], pair["bot"]) for pair in record["history"]]
        found = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    elif "turns" in record:  # MT-Bench: users' messages, and for some of them a reference reply
        replies = record.get("reference", [])
        found = []
        for number, text in enumerate(record["turns"]):
            found.append(("user", text))
            if number < len(replies):
                found.append(("assistant", replies[number]))
    elif "messages" in record:
        found = [(ROLES[each["role"]], each["content"]) for each in record["messages"]]
    else:
        found = [(ROLES[each["from"]], each["value"]) for each in record["conversations"]]
    if not all(isinstance(text, str) for _, text in found):
        raise TypeError("a message is no text")
    return [{"role": role, "content": text} for role, text in found]


def _join(conversations: list[Messages]) -> list[Messages]:
    """Neighbours, joined until they have two turns and `JOINED` words for each."""
    result, open_one = [], Messages()
    for messages in conversations:
        open_one = [*open_one, *messages]
        words = sum(len(message["content"].split()) for message in open_one)
        if len(_starts(open_one)) >= 2 and words >= 2 * JOINED:
            result.append(open_one)
            open_one = []
    return result


def _starts(messages: Messages) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "user"]


def _dialogue(messages: Messages, template: ChatTemplate, tokenizer: Any, where: str, most: int) -> Dialogue | None:
    starts = _starts(messages)
    if len(starts) < 2:
        return None
    texts = [template.render(messages[:end], add_generation_prompt=False) for end in (*starts[1:], len(messages))]
    first = messages[starts[0]]["content"]
    at = texts[0].find(first)
    head = texts[0][:at].rstrip() if at > 0 else ""
    pieces, before = [], ""
    for text in texts:
        if not text.startswith(before):
            raise SemkvError("the chat template changes earlier messages", where=where, fix="take another template")
        pieces.append(text[len(before) :])
        before = text
    turns: list[str] = []
    feed = ""
    for piece in pieces:
        body = feed + piece
        stripped = body.rstrip("\n")
        feed = body[len(stripped) :]
        turns.append(stripped)
    cut = _system_end(turns[0], head)
    pinned = tuple(_encode(tokenizer, turns[0][:cut]))
    room, bodies = most - len(pinned), []
    for turn in (turns[0][cut:], *turns[1:]):
        ids = tuple(_encode(tokenizer, turn))
        room -= len(ids)
        if room < 0:
            break
        bodies.append(ids)
    return Dialogue(pinned, tuple(bodies), source=where) if len(bodies) > 1 else None


def _system_end(text: str, head: str) -> int:
    """Characters before the first user's message opens: a system prompt with what ends it, often none."""
    opening = head.rstrip("\n").rfind("\n<")
    return opening + 1 if opening >= 0 else 0


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
