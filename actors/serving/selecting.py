"""How clients name the way in which an action is chosen, and what becomes of it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from actors.serving.config import LimitsConfig
from actors.serving.errors import ApiError
from counterpoint.policies.policy import check_mask
from counterpoint.selection.config import Rule, SelectionConfig

SelectionName = Literal["greedy", "mg-select", "random", "likelihood", "entropy", "self-certainty"]
RULES: dict[SelectionName, Rule] = {
    "greedy": "greedy",
    "mg-select": "masked_condition",
    "random": "random",
    "likelihood": "likelihood",
    "entropy": "entropy",
    "self-certainty": "self_certainty",
}
NAMES: dict[Rule, str] = {rule: name for name, rule in RULES.items()}
DEFAULT_MASK = "text"

ServedRule = Literal["greedy", "random", "likelihood", "entropy", "self_certainty", "masked_condition"]
ShownMask = Literal["text", "state", "both"]
Temperature = Annotated[float, Field(ge=0.01, le=100.0, allow_inf_nan=False)]
"""Beyond these bounds float32 cannot tell the tokens' probabilities apart."""
Count = Annotated[int, Field(ge=1)]


class SelectionBody(BaseModel):
    """A selection by its settings; null is the same as leaving a field out, save for `first_tokens`."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    rule: ServedRule | None = Field(None, examples=["masked_condition"])
    """greedy: the likeliest token each time, no candidates. random: the first candidate. likelihood: the
    likeliest candidate. entropy, self_certainty: the one whose distributions are sharpest, or furthest from
    uniform. masked_condition (MG-Select): the one whose distributions lie furthest from those of the same
    policy that is not told some of its conditions."""
    candidates: Count | None = Field(None, examples=[4])
    """Candidates of a decision."""
    temperature: Temperature | None = Field(None, examples=[0.5])
    """At which candidates are sampled."""
    mask: ShownMask | None = Field(None, examples=["text"])
    """What the reference is not told; for masked_condition only."""
    reference_temperature: Temperature | None = Field(None, examples=[4.0])
    """Of the reference's distributions."""
    policy_temperature: Temperature | None = Field(None, examples=[1.0])
    """Of the policy's distributions in the confidence."""
    first_tokens: Count | None = Field(None, examples=[5])
    """Action tokens whose confidences are aggregated, from the first; null takes all, the default is 5."""
    aggregate: Literal["sum", "mean"] | None = Field(None, examples=["sum"])
    """Over a candidate's tokens."""


def _form(value: Any) -> str:
    return "settings" if isinstance(value, dict | SelectionBody) else "name"


class Selecting(BaseModel):
    """How an action is chosen; what is left out is as the service's configuration says.

    Types are strict: neither "3" nor true is a number. Fields that are not listed are refused by name.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    selection: (
        Annotated[
            Annotated[SelectionName, Tag("name")] | Annotated[SelectionBody, Tag("settings")],
            Discriminator(_form),
        ]
        | None
    ) = Field(None, examples=["mg-select"])
    """The rule by its name, or an object of settings; greedy where neither the request nor the service says
    otherwise. The oracle needs a simulator and is not offered."""
    num_candidates: Count | None = Field(None, examples=[4])
    """Candidates of a decision, 4 by default; the service's configuration says how many at most (16 unless it
    is changed). greedy has one."""
    temperature: Temperature | None = Field(None, examples=[0.5])
    """At which candidates are sampled; not for greedy."""
    mask: ShownMask | None = Field(None, examples=["text"])
    """mg-select's: which conditions the reference is not told; the policy must have them."""


def selection_of(
    asked: Selecting, defaults: Mapping[str, Any], conditions: frozenset[str], limits: LimitsConfig
) -> SelectionConfig:
    """Return the selection that a client asks for, with `defaults` for what is left out.

    Settings without meaning for the rule are brought to one value, so that equal selections compare equal.
    Raises invalid_value for what the rule cannot have, the policy lacks (`conditions`) or `limits` exceed.
    """
    given = _given(asked)
    settings = {"candidates": min(4, limits.max_candidates), **defaults, **given}
    rule = settings.setdefault("rule", "greedy")
    if rule == "greedy":
        _refuse_settings_of_candidates(given)
        settings = {"rule": rule, "candidates": 1}
    elif rule == "masked_condition":
        settings["mask"] = settings.get("mask") or DEFAULT_MASK
    elif "mask" not in given:
        settings.pop("mask", None)
    if settings["candidates"] > limits.max_candidates:
        raise ApiError(
            "invalid_value",
            f"num_candidates={settings['candidates']} is more than this service allows: give at most "
            f"{limits.max_candidates}",
            "num_candidates",
        )
    try:
        selection = SelectionConfig.model_validate(settings)
    except ValidationError as error:
        raise ApiError("invalid_value", f"selection: {_first(error)}", "selection") from error
    try:
        check_mask(selection.mask or "none", conditions)
    except ValueError as error:
        raise ApiError("invalid_value", str(error), "mask") from error
    return selection


def check_defaults(defaults: Mapping[str, Any]) -> None:
    """Raise ValueError, in one line, unless `actions.selection` of a configuration can serve as defaults."""
    rule = defaults.get("rule", "greedy")
    if rule not in list(NAMES):
        raise ValueError(f"actions.selection: rule={rule} cannot be served: give one of {', '.join(NAMES)}")
    try:
        SelectionConfig.model_validate(
            {**defaults, "rule": "masked_condition", "mask": defaults.get("mask") or DEFAULT_MASK}
        )
    except ValidationError as error:
        raise ValueError(f"actions.selection: {_first(error)}") from error


def _given(asked: Selecting) -> dict[str, Any]:
    """Return SelectionConfig's settings as far as the client gives them, each at one place only."""
    given: dict[str, Any] = {}
    if isinstance(asked.selection, str):
        given["rule"] = RULES[asked.selection]
    elif asked.selection is not None:
        told = asked.selection.model_dump(exclude_unset=True)
        given = {name: value for name, value in told.items() if value is not None or name == "first_tokens"}
    for field, name in (("num_candidates", "candidates"), ("temperature", "temperature"), ("mask", "mask")):
        value = getattr(asked, field)
        if value is None:
            continue
        if name in given:
            message = f"{field} is given beside selection.{name}: give one of them"
            raise ApiError("invalid_value", message, field)
        given[name] = value
    return given


def _refuse_settings_of_candidates(given: Mapping[str, Any]) -> None:
    if given.get("candidates", 1) > 1:
        raise ApiError(
            "invalid_value",
            f"num_candidates={given['candidates']} has no meaning for selection=greedy: choose a selection "
            f"that has candidates, such as mg-select, or leave it out",
            "num_candidates",
        )
    for name in ("temperature", "mask"):
        if given.get(name) is not None:
            raise ApiError(
                "invalid_value",
                f"{name}={given[name]} has no meaning for selection=greedy: leave it out",
                name,
            )


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    what = " ".join(first["msg"].removeprefix("Value error, ").split())
    return f"{where}: {what}" if where else what
