"""The tasks, by name. A folder each, with data maker, metric and README; `base.Task` is their interface."""

from __future__ import annotations

from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate.tasks.agreement import Agreement
from semkv_deploy.evaluate.tasks.base import Task
from semkv_deploy.evaluate.tasks.chat_recall import ChatRecall
from semkv_deploy.evaluate.tasks.continuation import Continuation
from semkv_deploy.evaluate.tasks.facts import Facts
from semkv_deploy.evaluate.tasks.longbench import LongBench
from semkv_deploy.evaluate.tasks.passkey import Passkey
from semkv_deploy.evaluate.tasks.ruler import Ruler
from semkv_deploy.evaluate.tasks.turns import Turns

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Continuation("prose"),
        Continuation("code"),
        Continuation("chat"),
        Turns(),
        Agreement(),
        Passkey(),
        Facts(),
        Ruler("single"),
        Ruler("multikey"),
        Ruler("variables"),
        LongBench(),
        ChatRecall(),
    )
}
"""Tasks by name, in the order of a table's columns."""


def task_of(name: str) -> Task:
    """The task of a name.

    Raises:
        SemkvError: when there is none.
    """
    if name not in TASKS:
        raise SemkvError("unknown task", where="--task", expected=" or ".join(TASKS), got=name)
    return TASKS[name]
