"""Question answering over files in LongBench's format (Bai et al., arXiv 2308.14508)."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate.tasks.base import Ask, Decode, Example, Setting, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.evaluate.subject import Subject

QUESTION = "\n\nAnswer the question with a few words from the text above.\nQuestion: {question}\nAnswer:"


class LongBench(Task):
    """Records of `context`, `input` and `answers`, in the order of a random draw."""

    name, metric, headroom, records = "longbench", "f1", "f1", ("longbench",)
    unit: ClassVar[str] = "F1 of words with the best accepted answer"
    extra: ClassVar[int] = 256
    by_default: ClassVar[bool] = False

    def examples(self, setting: Setting) -> list[Example]:
        records = setting.records["longbench"]
        if len(records) < setting.count:
            raise SemkvError("too few records", where="--text longbench", expected=setting.count, got=len(records))
        chosen = setting.random(self.name).sample(range(len(records)), setting.count)
        examples = []
        for number in chosen:
            record = records[number]
            try:
                context, question = str(record["context"]), str(record["input"])
                answers = tuple(map(str, record["answers"]))
            except (KeyError, TypeError) as error:
                expected = "context, input and answers"
                where = f"--text longbench, record {number + 1}"
                raise SemkvError("no record of LongBench", where=where, expected=expected, got=error) from None
            ids = setting.encode(context)
            half = setting.context // 2
            # Cut in the middle, as LongBench does: beginnings and ends say what a text is.
            ids = ids if len(ids) <= setting.context else (*ids[:half], *ids[half - setting.context :])
            prompt = setting.encode(QUESTION.format(question=question))
            examples.append(Example(turns=(ids,), asks=(Ask(prompt=prompt, texts=answers),), note={"record": number}))
        return examples

    def measure(
        self, example: Example, subject: Subject, decode: Decode, reference: NDArray[Any] | None
    ) -> dict[str, float]:
        (ask,) = example.asks
        text = decode(subject.generate(ask.prompt, 32)).strip().split("\n")[0]
        return {"f1": max((f1(text, answer) for answer in ask.texts), default=0.0)}


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the")]


def f1(text: str, answer: str) -> float:
    """F1 of the words of two texts, counted as often as both have them."""
    first, second = words(text), words(answer)
    common = sum((Counter(first) & Counter(second)).values())
    return 2 * common / (len(first) + len(second)) if common else 0.0
