"""Facts told early in a chat, talk about other things, then questions about the facts, in the model's chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate.tasks.base import Ask, Decode, Example, Setting, Task
from semkv_deploy.evaluate.tasks.facts import NAMES
from semkv_deploy.evaluate.tasks.ruler import matched
from semkv_deploy.model.template import ChatTemplate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.evaluate.subject import Subject
    from semkv_deploy.model.template import Message

CITIES = ("Lisbon", "Oslo", "Prague", "Dublin", "Vienna", "Athens", "Geneva", "Madrid", "Warsaw", "Berlin", "Helsinki")
PETS = ("cat", "dog", "parrot", "rabbit", "tortoise", "hamster", "canary", "pony", "goldfish", "lizard")
FACTS = 4
FILLER = 96
"""Tokens of a filler message."""


class ChatRecall(Task):
    """Each message about a person states three facts; one is asked for."""

    name, metric, headroom, texts = "chat-recall", "recall", "recall", ("prose",)
    unit: ClassVar[str] = f"share recalled, of {FACTS} questions"
    extra: ClassVar[int] = 256
    by_default: ClassVar[bool] = False

    def examples(self, setting: Setting) -> list[Example]:
        template = ChatTemplate.of(setting.tokenizer)
        if template is None:
            raise SemkvError(
                "the tokenizer has no chat template", where=f"--task {self.name}", fix="leave the task out"
            )
        return [self._example(setting, template, number) for number in range(setting.count)]

    def _example(self, setting: Setting, template: ChatTemplate, number: int) -> Example:
        random = setting.random(self.name, number)
        messages: list[Message] = []
        questions = []
        for person in random.sample(NAMES, FACTS):
            city, pet, code = random.choice(CITIES), random.choice(PETS), str(random.randrange(1000, 10_000))
            told = f"{person} lives in {city}, has a {pet}, and the door code there is {code}."
            messages += [{"role": "user", "content": told}, {"role": "assistant", "content": "I will remember that."}]
            questions.append(
                random.choice(
                    [
                        (f"In which city does {person} live?", city),
                        (f"Which pet does {person} have?", pet),
                        (f"What is the door code of {person}?", code),
                    ]
                )
            )
        filled = messages
        for count in range(setting.context):
            passage = setting.tokenizer.decode(setting.window("prose", FILLER, self.name, number, count))
            more: list[Message] = [
                {"role": "user", "content": f"I like this passage: {passage}"},
                {"role": "assistant", "content": "It is a fine passage."},
            ]
            if len(setting.encode(template.render([*filled, *more], add_generation_prompt=False))) > setting.context:
                break
            filled = [*filled, *more]
        read = template.render(filled, add_generation_prompt=False)
        asks = []
        for question, answer in questions:
            asked: list[Message] = [*filled, {"role": "user", "content": question}]
            whole = template.render(asked, add_generation_prompt=True)
            if not whole.startswith(read):
                fix = "leave the task out"
                raise SemkvError("the chat template changes earlier messages", where=f"--task {self.name}", fix=fix)
            asks.append(Ask(prompt=setting.encode(whole[len(read) :]), texts=(answer,)))
        return Example(turns=(setting.encode(read),), asks=tuple(asks))

    def measure(
        self, example: Example, subject: Subject, decode: Decode, reference: NDArray[Any] | None
    ) -> dict[str, float]:
        answers = (matched(decode(subject.generate(ask.prompt, 32)), ask.texts) for ask in example.asks)
        return {"recall": sum(answers) / len(example.asks)}
