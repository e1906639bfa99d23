"""The parameters that export writes into the configs of served models and that those models read back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final, Literal, Self, cast, get_args

from diffense import names

Policy = Literal["annotate", "abstain", "reject"]
Loop = Literal["bls", "fused", "whole", "direct"]
SETTINGS_PARAMETER: Final = "diffense_settings"  # JSON, what the guard needs to know of the models around it
POLICY_PARAMETER: Final = "diffense_policy"
BUDGET_PARAMETER: Final = "diffense_budget_ms"
CLOSED_PARAMETER: Final = "diffense_closed"
AT_ONCE_PARAMETER: Final = "diffense_at_once"  # how many processes of a front work at a time
DIRECT_KEY: Final = "direct"  # in the settings of that loop alone: code that does not know it refuses them at load
RAW_PREFIX: Final = "diffense_raw_"  # production outputs on their way through the guard


def name_raw(outputs: tuple[str, ...]) -> dict[str, str]:
    """Name under which each production output reaches the guard -> its own name, in order."""
    return {f"{RAW_PREFIX}{index}": output for index, output in enumerate(outputs)}


@dataclass(frozen=True)
class Wiring:
    """The models of one family and the tensors between them.

    Attributes:
        model: the production model.
        outputs: its outputs, in order.
        logits: the one among them that holds the logits.
        loop: ``bls`` calls the denoiser at every guided step, ``fused`` one graph for all of it; with ``whole`` the graph that
            would give the latents gives the score, with ``direct`` the verdict too, and there is no guard's model.
        callee: the denoiser's or the scorer's model name; empty when the guard needs neither.
        latents_model: the model that gives the latents, or the score.
        shared: whether that model gives the production outputs too.
        input: name of the production input.
        raw_logits: name of the latents model's other input, the logits; empty with `shared`. Stated, so that code and
            repository of which only one knows it refuse each other at load.
        probabilities: whether the logits are softmaxed.
    """

    model: str
    outputs: tuple[str, ...]
    logits: str
    loop: Loop
    callee: str
    latents_model: str
    shared: bool
    input: str
    raw_logits: str
    probabilities: bool = False

    @property
    def guard_model(self) -> str:
        """Name of the guard's model."""
        return self.model + names.GUARD_SUFFIX

    @property
    def raw(self) -> dict[str, str]:
        """Name under which each production output reaches the guard -> its own name."""
        return name_raw(self.outputs)

    @property
    def scored(self) -> bool:
        """Whether the latents model gives the score."""
        return self.loop in ("whole", "direct")

    @property
    def direct(self) -> bool:
        """Whether the latents model gives the verdict."""
        return self.loop == "direct"

    @property
    def judged(self) -> str:
        """What the guard judges, a tensor of the latents model: the latents, or the score made of them."""
        return names.RAW_SCORE if self.scored else names.LATENTS

    @property
    def found(self) -> tuple[str, ...]:
        """What a front asks the latents model for, beside production outputs: what the guard judges, or the verdict."""
        return names.VERDICT_TENSORS if self.direct else (self.judged,)

    def to_parameters(self) -> dict[str, str]:
        """Parameters of a config."""
        stated = asdict(self)
        if self.direct:
            stated[DIRECT_KEY] = True
        return {SETTINGS_PARAMETER: json.dumps(stated, sort_keys=True)}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> Self:
        """Read back what `to_parameters` wrote.

        Raises:
            ValueError: the parameter is missing or was written by another version.
        """
        try:
            stated = json.loads(parameters[SETTINGS_PARAMETER])
            stated.pop(DIRECT_KEY, None)
            if stated["loop"] not in get_args(Loop):
                raise ValueError(f"loop {stated['loop']}")
            return cls(**{**stated, "outputs": tuple(stated["outputs"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"parameter {SETTINGS_PARAMETER} is missing or of another version ({error})") from None


@dataclass(frozen=True)
class GatewayOptions:
    """How the gateway treats what the guard says.

    Attributes:
        policy: what happens to a flagged image. ``annotate``: nothing but the verdict; ``abstain``: its production
            outputs are replaced; ``reject``: the request that holds it gets an error.
        budget_ms: time for the verdict after production has answered.
        closed: an image without a verdict makes an error of its request, instead of ``flagged`` = 2.
    """

    policy: Policy = "annotate"
    budget_ms: int = 500
    closed: bool = field(default=False)

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise ValueError(f"policy is {', '.join(get_args(Policy))}, not {self.policy!r}")
        if self.budget_ms < 1:
            raise ValueError(f"the budget is at least 1 ms, not {self.budget_ms}")

    def to_parameters(self) -> dict[str, str]:
        """Parameters of a config, each of them made to be edited by hand."""
        return {
            POLICY_PARAMETER: self.policy,
            BUDGET_PARAMETER: str(self.budget_ms),
            CLOSED_PARAMETER: "true" if self.closed else "false",
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> Self:
        """Read the parameters; those that are missing have their defaults.

        Raises:
            ValueError: a value that makes no sense.
        """
        closed = parameters.get(CLOSED_PARAMETER, "false").lower()
        if closed not in ("true", "false"):
            raise ValueError(f"{CLOSED_PARAMETER} is true or false, not {closed!r}")
        try:
            budget = int(parameters.get(BUDGET_PARAMETER, "500"))
        except ValueError:
            raise ValueError(f"{BUDGET_PARAMETER} is a whole number, not {parameters[BUDGET_PARAMETER]!r}") from None
        return cls(cast("Policy", parameters.get(POLICY_PARAMETER, "annotate")), budget, closed == "true")
