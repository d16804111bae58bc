"""Turns that have a row: their prompts are appended piece by piece, and one token to all of them in one run.

What a turn does to its session ends here too: it is ended, or taken back, or kept as far as it had come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.conversation import ChatFormat, Conversation
from semkv_deploy.runtime.reply import ReplyBuilder
from semkv_deploy.runtime.tokens import check_ids
from semkv_deploy.serve.statistics import Statistics
from semkv_deploy.serve.table import Entry
from semkv_deploy.serve.turn import Clock, Failed, FinishReason, Left, Piece, TooLong, Turn, as_kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.runtime.session import Session

OnFinish = Callable[[Entry, FinishReason, Left, SemkvError | None], None]


class RunningTurns:
    """The first turns of sessions that have a row, by row.

    Args:
        stop_ids: the model's ends of text.
        form: of conversations; None: there are none.
        on_finish: called when a turn is no longer running, with what became of it.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        stop_ids: tuple[int, ...],
        form: ChatFormat | None,
        statistics: Statistics,
        clock: Clock,
        on_finish: OnFinish,
    ) -> None:
        self._session, self._tokenizer, self._stop_ids, self._form = session, tokenizer, stop_ids, form
        self._statistics, self._clock, self._on_finish = statistics, clock, on_finish
        self._entries: dict[int, Entry] = {}
        self._next_prompt = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry: Entry) -> bool:
        return entry.row is not None and self._entries.get(entry.row) is entry

    def begin(self, entry: Entry) -> None:
        """Begins the first turn of a session that has a row.

        Raises:
            SemkvError: when its prompt is refused; nothing has happened then.
        """
        row, turn = entry.row, entry.turns[0]
        assert row is not None
        stop_ids = {*self._stop_ids, *turn.request.stop_ids}
        if turn.request.messages:
            assert self._form is not None
            stop_ids.update(self._form.stop_ids)
        turn.ids = self._prompt(entry, turn)
        try:
            self._session.check_append(row, len(turn.ids))
        except SemkvError as error:
            raise as_kind(TooLong, error) from None
        turn.before = int(self._session.position[row])
        turn.reply = ReplyBuilder(self._tokenizer, stop_ids, turn.request.stop)
        self._entries[row] = entry

    def _prompt(self, entry: Entry, turn: Turn) -> list[int]:
        request, vocab_size = turn.request, self._session.contract.vocab_size
        in_messages = entry.conversation is not None and bool(entry.conversation.messages)
        if in_messages != bool(request.messages) and self._session.position[entry.row] > 0:
            raise SemkvError(
                "a session is of messages or of tokens, from its first turn on",
                where=f"session {entry.name}",
                expected="messages" if in_messages else "ids or text",
            )
        if request.messages:
            assert self._form is not None
            if entry.conversation is None:
                entry.conversation = Conversation(self._form)
            ids = entry.conversation.tokens(request.messages)
            turn.pinned = entry.conversation.pinned if self._session.keeps_turns else 0
            return ids
        if request.text:
            return check_ids(self._tokenizer, self._tokenizer.encode(request.text), vocab_size)
        bad = next((token for token in request.ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            expected = f"0 to {vocab_size - 1}"
            raise SemkvError("no token of the model has this id", where="ids", expected=expected, got=bad)
        return list(request.ids)

    def append_prompt(self) -> bool:
        """Appends one piece of one prompt; turns take turns. False when no prompt is left."""
        rows = sorted(row for row, entry in self._entries.items() if _prompt_left(entry.turns[0]))
        if not rows:
            return False
        row = next((row for row in rows if row >= self._next_prompt), rows[0])
        self._next_prompt = row + 1
        turn = self._entries[row].turns[0]
        end = turn.pinned if turn.appended < turn.pinned else len(turn.ids)
        piece = turn.ids[turn.appended : min(end, turn.appended + self._session.contract.prefill_chunk)]
        prompts: list[list[int]] = [[] for _ in range(self._session.batch)]
        prompts[row] = piece
        try:
            logits = self._session.prefill(prompts)
            turn.appended += len(piece)
            self._statistics.prompt_tokens += len(piece)
            if turn.appended == turn.pinned:
                self._session.pin(row)
            if turn.appended == len(turn.ids):
                self._choose(row, logits[row : row + 1])
        except Exception as error:
            self._fail(row, error)
        return True

    def append_tokens(self) -> bool:
        """Appends one token in every row that has chosen one, in one run, and chooses the next."""
        pending = {row: entry.turns[0].pending for row, entry in self._entries.items()}
        chosen = {row: token for row, token in pending.items() if token is not None}
        if not chosen:
            return False
        ids, active = np.zeros(self._session.batch, np.int64), np.zeros(self._session.batch, bool)
        for row, token in chosen.items():
            ids[row], active[row] = token, True
        try:
            logits = self._session.step(ids, active)
        except Exception as error:
            # Which row made it fail is not known: none of them has its token.
            for row in chosen:
                self._fail(row, error)
            return True
        for row in chosen:
            turn = self._entries[row].turns[0]
            turn.reply.appended()
            turn.pending = None
            try:
                if turn.generated == turn.request.max_new_tokens:
                    self._end(row, "length")
                else:
                    self._choose(row, logits[row : row + 1])
            except Exception as error:
                self._fail(row, error)
        return True

    def _choose(self, row: int, logits: NDArray[np.float32]) -> None:
        turn = self._entries[row].turns[0]
        token = int(turn.request.sampler(logits)[0])
        if turn.reply.ends(token):
            self._end(row, "stop")
        elif not self._session.has_room(row):
            self._end(row, "length")
        else:
            self._statistics.count_token(turn, self._clock())
            turn.tell(Piece((token,), turn.reply.push(token)))
            if turn.reply.stopped:
                self._end(row, "stop")
            else:
                turn.pending = token

    def break_off(self, entry: Entry) -> None:
        """Ends a session's running turn for its caller: taken back, or kept as far as it had come."""
        self._finish(entry, "cancelled", self._taken_back(entry, keep=True))

    def fail_all(self, error: Exception) -> None:
        """Gives up every running turn and its session, without another call of the engine."""
        for entry in list(self._entries.values()):
            self._finish(entry, "error", "dropped", as_kind(Failed, error))

    def _end(self, row: int, reason: FinishReason) -> None:
        entry = self._entries[row]
        turn = entry.turns[0]
        rest = turn.reply.flush()
        if rest:
            turn.tell(Piece((), rest))
        self._session.end_turn(row)
        _record(entry, turn)
        self._finish(entry, reason, "ended")

    def _fail(self, row: int, error: Exception) -> None:
        entry = self._entries[row]
        self._finish(entry, "error", self._taken_back(entry, keep=False), as_kind(Failed, error))

    def _finish(self, entry: Entry, reason: FinishReason, left: Left, error: SemkvError | None = None) -> None:
        assert entry.row is not None
        del self._entries[entry.row]
        self._on_finish(entry, reason, left, error)

    def _taken_back(self, entry: Entry, *, keep: bool) -> Left:
        """Makes a session what it was before its running turn, or says what it made of it.

        Args:
            keep: where it cannot be, because something was compressed meanwhile: end a turn whose prompt is whole.
        """
        row, turn = entry.row, entry.turns[0]
        assert row is not None
        if turn.pinned and turn.appended >= turn.pinned:
            # What is pinned is no part of the turn any more; it opened the conversation, which begins anew.
            return "dropped"
        try:
            self._session.check_rows(row)
            if turn.appended:
                self._session.undo_turn(row)
            return "undone"
        except Exception:
            if not keep or _prompt_left(turn):
                return "dropped"
        try:
            self._session.check_rows(row)
            turn.reply.flush()
            self._session.end_turn(row)
            _record(entry, turn)
        except Exception:
            return "dropped"
        return "kept"


def _prompt_left(turn: Turn) -> bool:
    return turn.appended < len(turn.ids)


def _record(entry: Entry, turn: Turn) -> None:
    if turn.request.messages:
        assert entry.conversation is not None
        entry.conversation.record(turn.request.messages, turn.reply.reply())
