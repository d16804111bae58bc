"""The HTTP endpoint on Ray Serve: replicas with rows of their own, over one shared folder of sessions.

`application` is what a Serve config's `import_path` names; `RayArguments` are its `args`. Any replica can take any call
(`serve.shared_table`): a session goes on where a replica that died or was drained left it. Calls that name their
session in Serve's header for models, `serve_multiplexed_model_id`, go to the replica that has it in a row.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from semkv_deploy.errors import SemkvError
from semkv_deploy.serve.options import ServingOptions

KEY_VARIABLE = "SEMKV_API_KEY"
BUSY_SHARE = 0.75
"""Of a replica's rows: where more of them are answering on average there is one more replica."""

CALLS_PER_ROW = 2
"""Calls that a replica takes at most: those that wait behind others in Serve's queue may still go to another."""

HEALTH_SECONDS = 2.0
"""Between looks at a replica, which tell that it has died."""

KNOWN_SESSIONS = 1024
"""Sessions by which a replica is known, named by callers; others are found as well, and read."""


class RayArguments(BaseModel):
    """What replicas serve.

    Attributes:
        bundle: its folder, on every machine.
        budget: share kept, slots or bytes; None: the smallest that was built.
        name: of the model; None: the bundle's folder's.
        api_key: None: that of SEMKV_API_KEY where replicas run, or none.
        max_body: bytes of a request's body.
        min_replicas, max_replicas: between them Serve chooses by how many rows are answering.
        serving: of each replica; `save_sessions` is the folder that all of them share, on every machine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: Path
    budget: str | float | None = None
    target: str = "onnxruntime-cpu"
    name: str | None = None
    api_key: str | None = None
    max_body: Annotated[int, Field(ge=1)] = 1 << 22
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    serving: ServingOptions

    @model_validator(mode="after")
    def _shares(self) -> RayArguments:
        if self.serving.save_sessions is None:
            raise SemkvError(
                "replicas share their sessions in a folder",
                where="serving.save_sessions",
                expected="a folder that all replicas see",
            )
        if self.max_replicas < self.min_replicas:
            raise SemkvError(
                "fewer than there are at least",
                where="max_replicas",
                expected=f"{self.min_replicas} or more",
                got=self.max_replicas,
            )
        return self


async def _forward(scope: Scope, receive: Receive, send: Send) -> None:
    """Calls go to the app of the replica that they are in: it is made there, with its scheduler."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    replica: Any = serve.get_replica_context().servable_object
    session = serve.get_multiplexed_model_id()
    if session:
        await replica.known_by(session)
    await replica.front(scope, receive, send)


def _front() -> ASGIApp:
    return _forward


@serve.deployment
@serve.ingress(_front)
class Replica:
    """One scheduler, and its HTTP endpoint."""

    def __init__(self, arguments: RayArguments) -> None:
        from semkv_deploy.budget_units import parse_budget
        from semkv_deploy.serve.http.app import Options, create_app
        from semkv_deploy.serve.open import open_scheduler

        self.scheduler = open_scheduler(
            arguments.bundle,
            arguments.serving.model_copy(update={"share_sessions": True}),
            budget=None if arguments.budget is None else parse_budget(str(arguments.budget)),
            target=arguments.target,
        )
        options = Options(
            name=arguments.name or arguments.bundle.resolve().name,
            api_key=arguments.api_key or os.environ.get(KEY_VARIABLE) or None,
            max_body=arguments.max_body,
        )
        self.front = create_app(self.scheduler, options)
        self.scheduler.start()

    @serve.multiplexed(max_num_models_per_replica=KNOWN_SESSIONS)
    async def known_by(self, session: str) -> str:
        """Tells Serve's router that calls of a session are best sent here."""
        return session

    def check_health(self) -> None:
        """Fails once the scheduler has: Serve puts another replica in its place."""
        if self.scheduler.failure is not None:
            raise self.scheduler.failure

    def __del__(self) -> None:
        # Serve calls it when the replica is drained. The constructor may have failed before there was one.
        scheduler = self.__dict__.pop("scheduler", None)
        if scheduler is not None:
            scheduler.close()


def application(args: RayArguments) -> serve.Application:
    """The application of a Serve config.

    Raises:
        SemkvError: for arguments that do not go together.
    """
    rows = args.serving.rows
    deployment = Replica.options(  # type: ignore[attr-defined]
        max_ongoing_requests=CALLS_PER_ROW * rows,
        health_check_period_s=HEALTH_SECONDS,
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": max(1.0, BUSY_SHARE * rows),
        },
    )
    bound: serve.Application = deployment.bind(args)
    return bound
