"""A training recipe: a YAML file that says all that a run depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.sonic_adapter import MODULES, Corner
from semkv_deploy.model.spread import Placement

LOSSES = ("kd", "ce", "attn", "rec", "reg", "match")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AdapterShape(_Part):
    """What is trained.

    Attributes:
        k_max: Nexus rows of a turn at most; slots 1 … K are the first of them for every budget.
        turns_max: turns with an embedding of their own; later ones share the last.
        rank: of the LoRA weights.
        modules: linear modules of every layer that have them; none: embeddings alone are trained.
        corner: whether a turn's Nexus rows see the earlier ones of it, or all (only for ablations: not deployed).
        start: what embeddings start from: a token such as "\\n" (`separator`), or the mean of the vocabulary's.
        noise: deviation of the start, in deviations of the vocabulary's embeddings.
        placement: `appended` behind a turn, at positions of their own and from `start`; `spread` over it, each at the
            position of one of the turn's tokens and from that token's embedding.
        common: so many of the data's most common tokens are what spread rows begin as last; 0: all tokens are alike.
    """

    k_max: int = Field(64, ge=1, le=4096)
    turns_max: int = Field(16, ge=1, le=4096)
    rank: int = Field(16, ge=1, le=1024)
    modules: tuple[Literal[MODULES], ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # type: ignore[valid-type]
    corner: Corner = "causal"
    start: Literal["separator", "mean"] = "separator"
    noise: float = Field(0.1, ge=0, le=10)
    placement: Placement = "spread"
    common: int = Field(0, ge=0, le=1 << 20)

    @model_validator(mode="after")
    def _spread(self) -> AdapterShape:
        if self.common and self.placement != "spread":
            raise ValueError("common says which tokens spread rows begin as: set placement to spread, or leave it out")
        return self


class LossWeights(_Part):
    """Weights of losses; 0 leaves one out.

    Attributes:
        kd: KL from the same model with a full cache. ce: cross-entropy. attn: attention shared over turns.
        rec: reconstruction of bodies. reg: hinge on attention to Nexus rows. match: outputs of attention by layer.
    """

    kd: float = Field(0, ge=0)
    ce: float = Field(0, ge=0)
    attn: float = Field(0, ge=0)
    rec: float = Field(0, ge=0)
    reg: float = Field(0, ge=0)
    match: float = Field(0, ge=0)

    @model_validator(mode="after")
    def _something(self) -> LossWeights:
        if not any(self.model_dump().values()):
            raise ValueError(f"all weights are 0: give one of {', '.join(LOSSES)}")
        if self.rec and not (self.match or self.whole):
            raise ValueError("rec needs the Nexus rows of another loss: give kd, ce or match too")
        return self

    @property
    def whole(self) -> bool:
        """Whether a loss takes the pass of the whole dialogue."""
        return bool(self.kd or self.ce or self.attn or self.reg)


class Stage(_Part):
    """A run of steps with the same losses; learning rates warm up, then stay, or fall to 0.

    Attributes:
        embeddings, adapter: learning rates; 0: not trained. lora_b learns `lora_b_ratio` times faster (LoRA+, arXiv
            2402.12354).
    """

    name: str = Field(min_length=1, max_length=40)
    steps: int = Field(ge=1)
    embeddings: float = Field(ge=0, le=1)
    adapter: float = Field(0, ge=0, le=1)
    lora_b_ratio: float = Field(4, gt=0, le=100)
    warmup: int = Field(10, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    losses: LossWeights


class Source(_Part):
    """A corpus, or a file of dialogues.

    Attributes:
        name: prose, austen, sotu, code, chat, mt-bench (fetched files), recall (templates), echo (a text whose last
            turn repeats an earlier one), or what `path` is called in errors.
        path: JSON lines of `conversations` (ShareGPT), `messages`, or `history` (MT-Bench-101).
        weight: how often dialogues are taken from it.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    path: str | None = None
    weight: float = Field(1, gt=0)


class Data(_Part):
    """Dialogues.

    Attributes:
        tokens, turns, turn: tokens of a dialogue at most, turns of one, tokens of a turn: least and most.
        held_out: share of every source's documents that is never trained on.
    """

    sources: tuple[Source, ...] = Field(min_length=1)
    tokens: int = Field(384, ge=16, le=1 << 16)
    turns: tuple[int, int] = (3, 5)
    turn: tuple[int, int] = (24, 128)
    held_out: float = Field(0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _in_order(self) -> Data:
        for name, (low, high), least in (("turns", self.turns, 2), ("turn", self.turn, 4)):
            if not least <= low <= high:
                raise ValueError(f"{name}: expected {least} ≤ least ≤ most, got {low} and {high}")
        return self


class Recipe(_Part):
    """All of a run.

    Attributes:
        model: a checkpoint, as `export` takes it; the command line may name another place.
        kept: share of a turn's tokens that Nexus rows stand for, sampled anew for each dialogue between these.
        batch: dialogues of a step and process; `accumulate` of them are added up before weights change.
        precision: of the frozen weights; None: bfloat16 on a GPU, float32 on a CPU (bfloat16 is faster on one
            that multiplies it, as AVX512-BF16 does). What is trained is float32.
        guided: layers that `attn` and `reg` look at, as shares of the depth.
    """

    name: str = Field("sonic", pattern=r"^[\w.-]{1,60}$")
    model: str
    seed: int = 0
    adapter: AdapterShape = Field(default_factory=lambda: AdapterShape.model_validate({}))
    data: Data
    kept: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.1, 0.5)
    stages: tuple[Stage, ...] = Field(min_length=1)
    precision: Literal["float32", "bfloat16"] | None = None
    batch: int = Field(1, ge=1)
    accumulate: int = Field(1, ge=1)
    answer_weight: float = Field(4, ge=1)
    floor: float = Field(0.02, ge=0, le=1)
    guided: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.3, 0.6, 0.9)
    clip: float = Field(1.0, gt=0)
    checkpoint_every: int = Field(50, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> Recipe:
        if self.kept[0] > self.kept[1]:
            raise ValueError(f"kept: expected least ≤ most, got {self.kept[0]} and {self.kept[1]}")
        if not self.adapter.modules and all(stage.embeddings == 0 for stage in self.stages):
            raise ValueError("nothing is trained: no modules, and embeddings have rate 0")
        return self

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def scaled(self, factor: float) -> Recipe:
        """The same with stages that are longer or shorter by a factor; of each a step is left."""
        stages = tuple(stage.model_copy(update={"steps": max(1, round(stage.steps * factor))}) for stage in self.stages)
        return self.model_copy(update={"stages": stages})

    def stage_at(self, step: int) -> tuple[Stage, int]:
        """The stage of a step, and which of its steps it is; both count from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise IndexError(step)


def load_recipe(path: Path, values: Any) -> Recipe:
    """A recipe from what its file holds.

    Raises:
        SemkvError: naming the first key that is wrong.
    """
    if not isinstance(values, dict):
        raise SemkvError("not a recipe", where=path, expected="a mapping with model, data and stages")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise SemkvError(f"not a recipe: {first['msg']}", where=f"{path}: {key}" if key else path) from None
