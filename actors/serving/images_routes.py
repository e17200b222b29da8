"""Images by HTTP, in the shape of OpenAI's API: POST /v1/images/generations."""

import secrets
import time
from typing import Any

from fastapi import APIRouter, Request, Response

from actors.serving.complaints import shortened
from actors.serving.config import LimitsConfig
from actors.serving.deadline import deadline_of
from actors.serving.door import Door
from actors.serving.errors import ApiError
from actors.serving.images_api import ImagesAnswer, ImagesBody, Picture, Timings, TokenDetails, Usage
from actors.serving.images_sampling import options_of
from actors.serving.messages import ImageAnswer, ImageRequest, ModelInfo
from actors.serving.pictures import pictures
from actors.serving.prompts import classes_meant, label_of, listed
from actors.serving.timings import work_headers

LARGEST_DRAWN = 2**53
"""Drawn seeds lie below it: readers of JSON that keep numbers as doubles keep these exactly."""
WORK_HEADERS = {
    "x-model-version": ("Names the weights that answered.", "string"),
    "x-queue-ms": ("Milliseconds from arrival at the model to the network's first evaluation.", "number"),
    "x-compute-ms": ("Milliseconds from the first evaluation's start to the last one's end.", "number"),
    "x-batch-size": ("Mean rows of the evaluations that the request took part in.", "number"),
    "x-retries": ("Times the request was sent again because a replica died.", "integer"),
    "x-replica": ("Names the process that answered.", "string"),
}
DEADLINE = {
    "name": "x-deadline-ms",
    "in": "header",
    "required": False,
    "description": "Milliseconds after which the request is given up with a 504, at least 1; the service's "
    "own limit if that is sooner.",
    "schema": {"type": "integer", "minimum": 1},
    "example": 500,
}


def images_router(door: Door) -> APIRouter:
    """Return the route; what it raises is in the form of ApiError."""
    router = APIRouter(tags=["images"])

    @router.post(
        "/v1/images/generations",
        response_model=ImagesAnswer,
        response_description="The images, and all that it takes to ask for the same ones again.",
        responses={200: {"headers": _documented(WORK_HEADERS)}},
        openapi_extra={"parameters": [DEADLINE]},
    )
    async def generate_images(request: Request, body: ImagesBody) -> Response:
        """Generate images of one class.

        OpenAI's clients work unmodified; fields of ours go through their `extra_body`.
        """
        started = time.perf_counter()
        deadline_s = deadline_of(request.headers, door.config.limits)
        info = await _generator(door, body.model)
        request.state.model = info.name
        asked = image_request(body, info, door.config.limits)
        factor = enlargement(body.size, info, door.config.limits)
        form, quality = body.output_format or "png", _quality(body)
        with door.admission.enter("images"):
            answer = await door.backend.generate(asked, deadline_s)
            door.meters.work("images", info.name, answer.work)
            files = await pictures(answer.images, factor, form, quality)
        told = _answer(asked, info, answer, files, form, factor, time.perf_counter() - started)
        return Response(told.model_dump_json(), 200, work_headers(answer.work), "application/json")

    return router


def image_request(body: ImagesBody, info: ModelInfo, limits: LimitsConfig) -> ImageRequest:
    """Return what the model `info` is asked; a seed is drawn where none is given.

    Raises ApiError invalid_value, with the field, where `body` asks for more than model or service give.
    """
    count, steps = body.n or 1, body.num_inference_steps or 1
    if count > limits.max_images:
        raise ApiError(
            "invalid_value", f"n={shortened(count)} is above {limits.max_images}: ask for less", "n"
        )
    most = info.details["max_steps"]
    if steps > most:
        raise ApiError(
            "invalid_value",
            f"num_inference_steps={shortened(steps)} is above {most}, the most that model {info.name} takes: "
            "ask for less",
            "num_inference_steps",
        )
    guidance = 1.0 if body.guidance_scale is None else body.guidance_scale
    seed = secrets.randbelow(LARGEST_DRAWN) if body.seed is None else body.seed
    label, options = class_asked(body, info), guider_options(body)
    for field, asked in (("scheduler", body.scheduler), ("guider", body.guider)):
        offered = info.details[f"{field}s"]
        if asked is not None and asked not in offered:
            message = f"{field}={asked} is not offered by model {info.name}: ask for {', '.join(offered)}"
            raise ApiError("invalid_value", message, field)
    return ImageRequest(
        info.name, label, count, steps, guidance, seed, body.scheduler, body.guider, tuple(options.items())
    )


def guider_options(body: ImagesBody) -> dict[str, float]:
    """Return the guider's options by name, without those left out.

    Raises ApiError invalid_value, with the field, for options without a guider or of another one.
    """
    if body.guider_options is None:
        return {}
    given: dict[str, float] = body.guider_options.model_dump(exclude_none=True)
    if given and body.guider is None:
        message = "guider_options are given without a guider: name one, or leave them out"
        raise ApiError("invalid_value", message, "guider_options")
    known = options_of(body.guider) if body.guider else ()
    for name in given:
        if name not in known:
            message = f"guider_options.{name} is no option of {body.guider}: it has {', '.join(known)}"
            raise ApiError("invalid_value", message, f"guider_options.{name}")
    if given.get("start", 0.0) > given.get("stop", 1.0):
        message = f"guider_options.stop={given.get('stop')} is below start={given.get('start')}: swap them"
        raise ApiError("invalid_value", message, "guider_options.stop")
    return given


def class_asked(body: ImagesBody, info: ModelInfo) -> int:
    """Return the label that `class_label` or else the prompt means.

    Raises ApiError invalid_value, which names the classes, unless they mean exactly one.
    """
    classes = info.details["classes"]
    if body.class_label is None:
        if not (body.prompt or "").strip():
            message = f"prompt is missing or empty: name one of {listed(classes)}, or give class_label"
            raise ApiError("invalid_value", message, "prompt")
        return _named("prompt", body.prompt or "", classes)
    label = body.class_label
    if isinstance(label, str):
        label = _named("class_label", label, classes)
    if label >= len(classes):
        message = f"class_label={shortened(label)} is no class: give one of {listed(classes)}"
        raise ApiError("invalid_value", message, "class_label")
    others = [other for other in classes_meant(body.prompt or "", classes) if other != label]
    if others:
        raise ApiError(
            "invalid_value",
            f"prompt={shortened(body.prompt)} names {listed(classes, others)}, class_label "
            f"{listed(classes, [label])}: leave one of the two out",
            "prompt",
        )
    return label


def enlargement(size: str | None, info: ModelInfo, limits: LimitsConfig) -> int:
    """Return how many times each pixel is repeated in each direction for `size`, "auto" or "WIDTHxHEIGHT".

    Raises ApiError invalid_value for a size that is no whole multiple of the model's or beyond the limit; the
    model's own size is always granted.
    """
    if size is None or size == "auto":
        return 1
    own_width, own_height = info.details["width"], info.details["height"]
    width, height = (int(side) for side in size.split("x"))
    factor = width // own_width
    if factor < 1 or (width, height) != (factor * own_width, factor * own_height):
        raise ApiError(
            "invalid_value",
            f"size={shortened(size)} is no whole multiple of {own_width}x{own_height}, the size of model "
            f"{info.name}: ask for auto, {own_width}x{own_height}, {2 * own_width}x{2 * own_height} ...",
            "size",
        )
    if factor > 1 and max(width, height) > limits.max_image_side:
        message = f"size={shortened(size)} is beyond {limits.max_image_side} pixels a side: ask for less"
        raise ApiError("invalid_value", message, "size")
    return factor


def _named(field: str, text: str, classes: list[str]) -> int:
    try:
        return label_of(text, classes)
    except ValueError as error:
        raise ApiError("invalid_value", f"{field}={error}", field) from error


async def _generator(door: Door, name: str | None) -> ModelInfo:
    """Return the image model that is asked for, or the first."""
    if name is None:
        models = door.config.images.models
        if not models:
            message = "model is missing, and this service has no default image model: name one"
            raise ApiError("invalid_value", message, "model")
        name = models[0].name
    info = await door.backend.model(name)
    if info.kind != "images":
        message = f"model={shortened(name)} makes no images: GET /v1/models lists those of kind images"
        raise ApiError("invalid_value", message, "model")
    return info


def _quality(body: ImagesBody) -> int:
    quality = 100 if body.output_compression is None else body.output_compression
    if quality < 100 and (body.output_format or "png") == "png":
        raise ApiError(
            "invalid_value",
            f"output_compression={quality} has no meaning for png: leave it out, or ask for jpeg or webp",
            "output_compression",
        )
    return quality


def _answer(
    asked: ImageRequest, info: ModelInfo, answer: ImageAnswer, files: list[str], form: Any, factor: int,
    seconds: float,
) -> ImagesAnswer:  # fmt: skip
    work, none = answer.work, TokenDetails(image_tokens=0, text_tokens=0)
    height, width = answer.images.shape[1:3]
    return ImagesAnswer(
        created=int(time.time()),
        data=[Picture(b64_json=file) for file in files],
        background="opaque",
        output_format=form,
        size=f"{width * factor}x{height * factor}",
        model=asked.model,
        version=work.version,
        class_label=asked.label,
        seed=asked.seed,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance_scale,
        scheduler=asked.scheduler or info.details["schedulers"][0],
        guider=asked.guider,
        guider_options=dict(asked.guider_options),
        usage=Usage(
            input_tokens=0,
            output_tokens=0,
            total_tokens=0,
            input_tokens_details=none,
            output_tokens_details=none,
            images=asked.count,
            evaluations=work.evaluations,
        ),
        timings=Timings(
            queue_ms=round(work.queued_s * 1000, 3),
            compute_ms=round(work.compute_s * 1000, 3),
            total_ms=round(seconds * 1000, 3),
            batch_size=work.batch_size,
        ),
    )


def _documented(headers: dict[str, tuple[str, str]]) -> dict[str, Any]:
    return {name: {"description": text, "schema": {"type": kind}} for name, (text, kind) in headers.items()}
