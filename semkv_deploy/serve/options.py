"""How sessions share an engine's rows: what all fronts are told, from a command line or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from semkv_deploy.errors import SemkvError


class ServingOptions(BaseModel):
    """Limits of a scheduler.

    Attributes:
        rows: sessions that have caches at one time.
        threads: of the engine; None: one for each CPU.
        idle_seconds: how long a session keeps its row after a turn.
        wait_seconds: how long a turn waits for a row; 0: it is refused at once.
        max_waiting: most turns that wait.
        max_sessions: most sessions, saved ones included.
        max_tokens: most tokens of a reply; None: as many as fit.
        save_sessions: folder where idle sessions are saved when their row is wanted, or when the server ends.
        share_sessions: that folder is shared with other servers, and sessions are saved at the end of every turn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: Annotated[int, Field(ge=1)] = 4
    threads: Annotated[int, Field(ge=1)] | None = None
    idle_seconds: Annotated[float, Field(ge=0)] = 600.0
    wait_seconds: Annotated[float, Field(ge=0)] = 30.0
    max_waiting: Annotated[int, Field(ge=1)] = 256
    max_sessions: Annotated[int, Field(ge=1)] = 1024
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    save_sessions: Path | None = None
    share_sessions: bool = False

    @model_validator(mode="after")
    def _shares_a_folder(self) -> ServingOptions:
        if self.share_sessions and self.save_sessions is None:
            raise SemkvError(
                "sessions are shared in a folder", where="--share-sessions", fix="give --save-sessions FOLDER"
            )
        return self
