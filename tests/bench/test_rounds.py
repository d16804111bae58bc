"""Who is asked what, in which order, and what is made of the answers."""

from __future__ import annotations

from typing import Any

from semkv_deploy.bench.rounds import Shape, in_turn

TEXT = list(range(10, 100))


class Recorded:
    """Answers at once; notes who was asked in a log of all."""

    def __init__(self, name: str, log: list[tuple[str, str]], ms: list[float]) -> None:
        self.name, self.log, self.ms, self.prompts = name, log, iter(ms), []  # type: ignore[var-annotated]

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        if do != "facts":
            self.log.append((self.name, do))
        if do == "prefill":
            self.prompts.append(request["rows"])
        return {
            "prefill": {"seconds": 2.0},
            "decode": {"ms": next(self.ms) if do == "decode" else 0.0},
            "end_turn": {"seconds": 0.25},
            "facts": {"live_slots": 7.0, "compress_s": 0.5},
            "reset": {},
        }[do]


def run(shape: Shape, **ms: list[float]) -> tuple[dict[str, Any], list[tuple[str, str]], dict[str, Recorded]]:
    log: list[tuple[str, str]] = []
    measured = {name: Recorded(name, log, values) for name, values in ms.items()}
    return in_turn(measured, shape, TEXT, lambda what: None), log, measured


def test_rounds_are_taken_in_turn_behind_one_prompt():
    found, log, measured = run(
        Shape(256, batch=2, turns=1, prefills=2, rounds=3, tokens=8), a=[4.0, 9.0, 5.0], b=[1.0, 1.0, 1.0]
    )
    assert log == [
        *[("a", "prefill"), ("b", "prefill"), ("a", "reset"), ("b", "reset")],
        *[("a", "prefill"), ("b", "prefill")],
        *[("a", "decode"), ("b", "decode")] * 3,
    ]
    assert found["a"]["tpot_ms"] == {"median": 5.0, "min": 4.0, "max": 9.0, "all": [4.0, 9.0, 5.0]}
    assert found["a"]["tokens_per_s"]["all"] == [2 * 1e3 / 4.0, 2 * 1e3 / 9.0, 2 * 1e3 / 5.0]
    assert found["b"]["ttft_s"]["all"] == [2.0, 2.0]
    assert found["b"]["ttft_compress_s"] == 0.5
    # Prompt and rounds fill the context, rows begin at different places of the text, and all read the same.
    (prompt, again), theirs = measured["a"].prompts, measured["b"].prompts
    assert [len(row) for row in prompt] == [256 - 3 * 8] * 2 and prompt[0] != prompt[1] and again == prompt
    assert theirs == [prompt, prompt]
    assert prompt[0][: len(TEXT)] == TEXT and prompt[0][len(TEXT)] == TEXT[0]


def test_turns_are_taken_in_turn_and_summed():
    shape = Shape(400, batch=1, turns=2, prefills=5, rounds=1, tokens=10, reserve=6)
    found, log, measured = run(shape, a=[4.0, 6.0], b=[1.0, 1.0])
    turn = [("a", "prefill"), ("b", "prefill"), ("a", "decode"), ("b", "decode")]
    assert log == [*turn, ("a", "end_turn"), ("b", "end_turn"), *turn]
    assert [(each["seen"], each["tpot_ms"]) for each in found["a"]["turns"]] == [(200, 4.0), (400, 6.0)]
    assert found["a"]["total_s"] == 2.0 + 0.04 + 0.25 + 2.0 + 0.06
    # The token chosen last comes with the next prompt.
    assert [len(rows[0]) for rows in measured["a"].prompts] == [200 - 6 - 10, 200 - 6 - 10 - 1]
    assert measured["a"].prompts[1][0][0] == TEXT[(200 - 6 - 10) % len(TEXT)]
    assert "ttft_compress_s" not in found["a"]


def test_the_least_context_leaves_every_turn_a_prompt():
    assert Shape(999, batch=1, turns=4, prefills=1, rounds=2, tokens=8, reserve=3).least_context == 4 * (64 + 16 + 3)
