"""What every report is: one page from a template, with the house's style and every picture inside."""

import base64
import re
import shlex
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from jobs.report_words import count, duration, number, share

STYLE = "report_style.css.jinja"


def render_page(template: str, content: dict[str, Any]) -> str:
    """Return what `template`, a file beside this one, makes of `content`: no scripts, no addresses."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "share": share, "count": count, "duration": duration}
    return environment.from_string(_file(template)).render(style=Markup(_file(STYLE)), **content)


def facts(run: str, environment: dict[str, Any]) -> dict[str, str]:
    """Return what a run ran from and on, by name; `environment` as `describe_environment` gives it."""
    dirty = " with uncommitted changes" if environment.get("uncommitted_changes") else ""
    found = {
        "Run": run,
        "Command": _command(environment.get("command")),
        "Commit": f"{environment['commit']}{dirty}" if environment.get("commit") else None,
        "Python": environment.get("python"),
        "Platform": environment.get("platform"),
        "CPUs": environment.get("cpus"),
        "Devices": ", ".join(map(str, environment.get("devices") or [])),
    }
    return {name: str(value) for name, value in found.items() if value}


def versions(environment: dict[str, Any]) -> dict[str, str]:
    """Return the versions of the libraries that were installed."""
    return {name: version for name, version in (environment.get("versions") or {}).items() if version}


def data_uri(picture: bytes, kind: str = "png") -> str:
    """Return an image file as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _command(argv: Any) -> str | None:
    """Return a command as it was typed, as far as Python tells: a module by its path."""
    if not isinstance(argv, list) or not argv:
        return None
    program, *rest = map(str, argv)
    job = re.fullmatch(r"(?:.*/)?jobs/(\w+)\.py", program)
    return shlex.join([*(["python", "-m", f"jobs.{job.group(1)}"] if job else [program]), *rest])


def _file(name: str) -> str:
    return resources.files("jobs").joinpath(name).read_text(encoding="utf-8")
