"""The plain alternative: FastAPI around one pipeline, one request at a time; `jobs.bench serve` compares.

    python -m jobs.plain_server run=runs/digits/student port=8001

It takes and gives the same JSON as the service and answers with the same pictures, without batching,
replicas, promotion, back-pressure, keys or metrics.
"""

import base64
import io
import threading
import time
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from cluster.storage import RunStore
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.section import Section
from counterpoint.seeds import generator
from counterpoint.unet import null_class
from jobs.config import run_job
from jobs.run_names import RunUri
from jobs.runs import load_pipeline


class PlainServerConfig(Section):
    """What is served where."""

    run: RunUri = "runs/demo/student"
    """URI of a finished run of jobs.train or jobs.distill."""
    host: str = "127.0.0.1"
    """Address that is listened on."""
    port: int = Field(default=8001, ge=1, le=65535)
    """Port that is listened on."""
    threads: int = Field(default=1, ge=1)
    """Threads of the maths."""


class Wanted(BaseModel):
    """A request for images, as the official OpenAI client sends it, with this project's additional fields."""

    model: str = "student"
    """Any name: there is one model."""
    class_label: int = Field(ge=0)
    """Class of the images."""
    n: int = Field(default=1, ge=1, le=10)
    """Images."""
    num_inference_steps: int = Field(default=1, ge=1, le=100)
    """Steps of the sampler."""
    guidance_scale: float = Field(default=1.0, ge=0.0, le=20.0)
    """Classifier-free guidance, 1 for none."""
    seed: int = Field(default=0, ge=0)
    """Seed of all that is random."""
    response_format: str = "b64_json"
    """Only b64_json."""


def create_app(pipeline: ClassConditionalPipeline) -> FastAPI:
    """Return the application around `pipeline`, which no one else may use meanwhile."""
    app = FastAPI(title="plain")
    turn = threading.Lock()  # a pipeline's scheduler counts its steps: two requests at once would mix them up
    pipeline.set_progress_bar_config(disable=True)

    @app.get("/readyz")
    def readyz() -> dict[str, str]:
        """Say that requests are answered."""
        return {"status": "ready"}

    @app.post("/v1/images/generations")
    def generate(wanted: Wanted) -> dict[str, Any]:
        """Generate, encode, and answer in the form of OpenAI's images API."""
        streams = [generator(wanted.seed, "sample", wanted.class_label, k) for k in range(wanted.n)]
        labels = [wanted.class_label] * wanted.n
        classes = null_class(pipeline.unet)
        if wanted.class_label >= classes:  # the pipeline itself takes one more, the unconditional model
            raise HTTPException(400, f"class_label={wanted.class_label} must be from 0 to {classes - 1}")
        try:
            with turn:
                (images,) = pipeline(
                    labels, wanted.num_inference_steps, wanted.guidance_scale, streams, return_dict=False
                )
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return {
            "created": int(time.time()),
            "data": [{"b64_json": png(image)} for image in images],
            "output_format": "png",
            "model": wanted.model,
            "version": "plain",
            "seed": wanted.seed,
            "num_inference_steps": wanted.num_inference_steps,
        }

    return app


def png(image: Any) -> str:
    """Return a PIL image as a PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def main(config: PlainServerConfig) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM."""
    torch.set_num_threads(config.threads)
    app = create_app(load_pipeline(RunStore(config.run)))
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning", access_log=False)
    return {"run": config.run, "port": config.port}


if __name__ == "__main__":
    run_job(main, PlainServerConfig)
