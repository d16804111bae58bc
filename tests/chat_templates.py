"""Chat templates in the forms that published models use, and a byte tokenizer that knows their tokens."""

from __future__ import annotations

from typing import Any, NamedTuple


class Form(NamedTuple):
    """A template, its special tokens, the one that ends a reply, and whether it shows replies as they were given."""

    template: str
    special: tuple[str, ...]
    end: str
    verbatim: bool = True
    eos: str = "<eos>"


CHATML = Form(
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
)

# Thinking is shown in the last reply only, and stripped of blank lines.
QWEN3 = Form(
    "{%- set ns = namespace(last=messages|length - 1) %}"
    "{%- for m in messages[::-1] %}{%- set i = (messages|length - 1) - loop.index0 %}"
    "{%- if m.role == 'user' and ns.last == messages|length - 1 %}{%- set ns.last = i %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role != 'assistant' %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}"
    "{%- else %}{%- set content = m.content %}{%- set thinking = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thinking = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thinking) %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + thinking.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
    ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    "<|im_end|>",
    verbatim=False,
)

# The prompt opens a thought; old replies lose theirs.
R1 = Form(
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + '<|end_of_sentence|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}",
    ("<|User|>", "<|Assistant|>", "<|end_of_sentence|>", "<think>", "</think>"),
    "<|end_of_sentence|>",
    verbatim=False,
    eos="<|end_of_sentence|>",
)

LLAMA3 = Form(
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|eot_id|>",
)

GEMMA = Form(
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ("<start_of_turn>", "<end_of_turn>"),
    "<end_of_turn>",
)

MISTRAL = Form(
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    ("[INST]", "[/INST]", "</s>"),
    "</s>",
    # The space that the template puts before a reply is the model's to generate.
    verbatim=False,
    eos="</s>",
)

# No token ends a turn: the next one's opens it.
GLM4 = Form(
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
    "<|user|>",
)

FORMS = {
    "chatml": CHATML,
    "qwen3": QWEN3,
    "r1": R1,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "glm4": GLM4,
}


def byte_tokenizer(template: str | None, special: tuple[str, ...] = (), eos: str = "<eos>") -> Any:
    """A token for each byte, then `<bos>`, `eos` and the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    others = [token for token in special if token != eos]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token=eos, additional_special_tokens=others
    )
    fast.chat_template = template
    return fast


class ScriptedSession:
    """Stands in for a session of one row: keeps what is appended, and says what a script tells it to.

    Args:
        replies: ids of each reply, one a `prefill`, its stop included.
    """

    keeps_turns = False

    def __init__(self, replies: list[list[int]], vocabulary: int, max_context: int = 1 << 20) -> None:
        self.cache: list[int] = []
        self.max_context, self.turns = max_context, 0
        self._replies, self._vocabulary, self._script = list(replies), vocabulary, iter(())

    def prefill(self, ids: list[int]) -> Any:
        self._script = iter(self._replies.pop(0))
        return self._append(ids)

    def step(self, ids: list[int]) -> Any:
        return self._append(ids)

    def has_room(self) -> bool:
        return len(self.cache) < self.max_context

    def end_turn(self) -> None:
        self.turns += 1

    def _append(self, ids: list[int]) -> Any:
        import numpy as np

        self.cache += [int(token) for token in ids]
        logits = np.zeros((1, self._vocabulary), np.float32)
        logits[0, next(self._script, 0)] = 1
        return logits
