"""What POST /v1/images/generations takes and gives: OpenAI's shape, and the fields of ours beside it."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from actors.serving.images_sampling import GuiderName, GuiderOptions, SchedulerName

LARGEST_SEED = 2**63 - 1
LONGEST_PROMPT = 32_000
"""Characters, as in OpenAI's API."""


def _refusing(refused: Callable[[Any], bool], why: str) -> BeforeValidator:
    """Return a validator that says why a value which OpenAI's API takes is refused here."""

    def check(value: Any) -> Any:
        if refused(value):
            raise PydanticCustomError("not_offered", why)
        return value

    return BeforeValidator(check)


def _label(value: Any) -> int | str | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    if isinstance(value, str) and 0 < len(value) <= LONGEST_PROMPT:
        return value
    raise PydanticCustomError("class_label", "Input should be a class's label, 0 or more, or its name")


Streamed = Annotated[
    bool,
    _refusing(lambda value: value is True, "Streams are not offered: leave the field out"),
    WithJsonSchema({"const": False, "type": "boolean"}),
]
NoPartialImages = Annotated[
    int,
    Field(ge=0, le=0),
    _refusing(
        lambda value: isinstance(value, int) and value > 0, "Partial images are not offered: leave it out"
    ),
]
InAnswer = Annotated[
    Literal["b64_json"],
    _refusing(lambda value: value == "url", "There are no URLs, as nothing is kept here: ask for b64_json"),
]
Opaque = Annotated[
    Literal["auto", "opaque"],
    _refusing(lambda value: value == "transparent", "All images are opaque: ask for auto or opaque"),
]
FileFormat = Literal["png", "jpeg", "webp"]


class ImagesBody(BaseModel):
    """A request for images of one class; null is the same as leaving a field out.

    Types are strict: neither "3" nor true is a number. Fields that are not listed are refused by name.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        json_schema_extra={
            "anyOf": [{"required": ["prompt"]}, {"required": ["class_label"]}],
            "examples": [{"model": "digits", "prompt": "a three", "n": 2, "seed": 7}],
        },
    )

    prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)] | None = Field(None, examples=["a three"])
    """Names the class, by its name or its label's number, alone or as words of a sentence; exactly one must
    be meant. May be missing or empty where `class_label` is given, and may then name no other class."""
    model: Annotated[str, Field(min_length=1, max_length=512)] | None = Field(None, examples=["digits"])
    """Which model, see GET /v1/models; the service's first generator by default."""
    n: Annotated[int, Field(ge=1)] | None = Field(None, examples=[2])
    """Images, 1 by default; the service's configuration says how many at most (10 unless it is changed)."""
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,5}x[1-9][0-9]{0,5})$")] | None = Field(
        None, examples=["auto"]
    )
    """WIDTHxHEIGHT in pixels: the model's own size (also "auto", the default) or a whole multiple of it, for
    which every pixel is repeated (nearest neighbour): it makes images larger, not finer."""
    response_format: InAnswer | None = Field(None, examples=["b64_json"])
    """Images come in the answer itself, in base64; url is refused, as no image is kept."""
    output_format: FileFormat | None = Field(None, examples=["png"])
    """The files' format; png by default, which loses nothing."""
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(None, examples=[100])
    """Quality of jpeg and webp, 0 to 100, 100 by default; for png only 100 has a meaning."""
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = Field(None, examples=[7])
    """Ours (`extra_body` of OpenAI's clients). What is random in image k follows from the seed, the class
    and k alone, so the same request to the same version gives the same images. Drawn where missing, below
    2^53 so that every JSON reader keeps it exactly, and returned."""
    num_inference_steps: Annotated[int, Field(ge=1)] | None = Field(None, examples=[1])
    """Ours. Evaluations of the network on the way from noise to an image; 1 by default, at most the model's
    `max_steps`."""
    guidance_scale: Annotated[float, Field(ge=0.0, le=20.0, allow_inf_nan=False)] | None = Field(
        None, examples=[1.0]
    )
    """Ours. Classifier-free guidance; 1 by default, which is none and half the work. Also the `guider`'s."""
    scheduler: SchedulerName | None = Field(None, examples=["DPMSolverMultistepScheduler"])
    """Ours. The solver, by its class name; the model's own by default. A model's `schedulers` in
    GET /v1/models are those that it offers; a distilled student has only its own."""
    guider: GuiderName | None = Field(None, examples=["AdaptiveProjectedGuidance"])
    """Ours. Another guidance than the plain one, by its class name; a model's `guiders` are those that it
    offers. It costs nothing of its own while guidance_scale is 1, save for perturbed attention."""
    guider_options: GuiderOptions | None = Field(None, examples=[{"start": 0.0}])
    """Ours. Numbers of the `guider`."""
    class_label: (
        Annotated[
            int | str,
            PlainValidator(
                _label,
                json_schema_input_type=Annotated[int, Field(ge=0)]
                | Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT)],
            ),
        ]
        | None
    ) = Field(None, examples=[3])
    """Ours. The class by its label or its name, instead of a prompt."""
    stream: Streamed | None = Field(None, examples=[False])
    """Only false: an answer comes whole."""
    partial_images: NoPartialImages | None = Field(None, examples=[0])
    """Only 0: there are no streams."""
    background: Opaque | None = Field(None, examples=["auto"])
    """auto or opaque, which are the same here; transparent is refused."""
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None, examples=["auto"]
    )
    """Accepted since OpenAI's clients send it; changes nothing: `num_inference_steps` does."""
    complexity: Literal["low", "medium", "high"] | None = Field(None, examples=["low"])
    """Accepted since OpenAI's clients send it; changes nothing."""
    style: Literal["vivid", "natural"] | None = Field(None, examples=["natural"])
    """Accepted since OpenAI's clients send it; changes nothing."""
    moderation: Literal["low", "auto"] | None = Field(None, examples=["auto"])
    """Accepted since OpenAI's clients send it; changes nothing: images of known classes are not filtered."""
    user: Annotated[str, Field(max_length=1024)] | None = Field(None, examples=["user-1234"])
    """Accepted since OpenAI's clients send it; changes nothing, and is not kept."""
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = Field(None, examples=["user-1234"])
    """Accepted since OpenAI's clients send it; changes nothing, and is not kept."""


class _Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


class Picture(_Answer):
    """An image."""

    b64_json: str = Field(examples=["iVBORw0KGgo="])
    """The file in base64."""


class TokenDetails(_Answer):
    """Tokens by kind; there are none."""

    image_tokens: int = Field(examples=[0])
    """Always 0: models are told a class, not tokens."""
    text_tokens: int = Field(examples=[0])
    """Always 0: models are told a class, not tokens."""


class Usage(_Answer):
    """What the request took. OpenAI's clients add tokens up, of which these models have none."""

    input_tokens: int = Field(examples=[0])
    """Always 0: models are told a class, not tokens."""
    output_tokens: int = Field(examples=[0])
    """Always 0: images are not made of tokens."""
    total_tokens: int = Field(examples=[0])
    """Their sum."""
    input_tokens_details: TokenDetails
    """Of the input."""
    output_tokens_details: TokenDetails
    """Of the output."""
    images: int = Field(examples=[2])
    """Ours. Images generated."""
    evaluations: int = Field(examples=[1])
    """Ours. Evaluations of the network that each image took."""


class Timings(_Answer):
    """Where the time went; not part of what a seed determines."""

    queue_ms: float = Field(examples=[3.1])
    """Milliseconds from arrival at the model to the network's first evaluation."""
    compute_ms: float = Field(examples=[11.9])
    """Milliseconds from the first evaluation's start to the last one's end."""
    total_ms: float = Field(examples=[19.4])
    """Milliseconds from the request's validation to the images' encoding."""
    batch_size: float = Field(examples=[6.5])
    """Mean rows of the network's evaluations that this request took part in, padding not counted."""


class ImagesAnswer(_Answer):
    """The images, and all that it takes to ask for the same ones again."""

    created: int = Field(examples=[1790000000])
    """When they were made, seconds since 1970."""
    data: list[Picture]
    """The images, in the order of their index k."""
    background: Literal["opaque"] = Field(examples=["opaque"])
    """Images have no transparency."""
    output_format: FileFormat = Field(examples=["png"])
    """The files' format."""
    size: str = Field(examples=["16x16"])
    """WIDTHxHEIGHT in pixels."""
    model: str = Field(examples=["digits"])
    """The model that answered."""
    version: str = Field(examples=["student@final-0123456789ab"])
    """Names the model's weights."""
    class_label: int = Field(examples=[3])
    """The class that was meant, by its label."""
    seed: int = Field(examples=[7])
    """Given, or drawn."""
    num_inference_steps: int = Field(examples=[1])
    """As taken."""
    guidance_scale: float = Field(examples=[1.0])
    """As taken."""
    scheduler: str = Field(examples=["DDIMScheduler"])
    """As taken."""
    guider: str | None = Field(examples=[None])
    """As taken; null for plain guidance."""
    guider_options: dict[str, float] = Field(examples=[{}])
    """As given."""
    usage: Usage
    """What it took."""
    timings: Timings
    """Where the time went."""
