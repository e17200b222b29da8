"""From a YAML file and arguments to one checked configuration, and from a job to its last line.

    python -m jobs.distill configs/digits/distill.yaml critics.refresh_rate=0 --resume

Values after `=` are YAML. `--some-field value` is another way to write `some_field=value`; a boolean field
takes no value there, and a list takes several. A file may start from another: `extends: base.yaml`.
"""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from counterpoint.section import Section
from jobs.config_errors import ConfigError, describe
from jobs.config_fields import fields_of, help_text
from jobs.config_source import over_defaults, override, read_file, split_arguments
from jobs.config_yaml import write_yaml

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Section)
T = TypeVar("T")
FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130


def load_config(model: type[S], argv: Sequence[str]) -> S:
    """Return the configuration that an optional YAML path and overrides in `argv` describe.

    A mistake in either ends the process with one line on standard error and exit code 2; `--help` prints
    the documented fields and exits with 0.
    """
    if "--help" in argv or "-h" in argv:
        module = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None)
        sys.stdout.write(help_text(model, f"python -m {module or 'jobs.<name>'}"))
        sys.exit(0)
    try:
        return parse_config(model, argv)
    except ConfigError as error:
        _refuse(error)


def parse_config(model: type[S], argv: Sequence[str]) -> S:
    """Return the configuration that `argv` describes; ConfigError, a one-line ValueError, if it is wrong."""
    fields = fields_of(model)
    path, overrides = split_arguments(argv, fields)
    data = read_file(path) if path else {}
    for key, text in overrides:
        override(data, key, text, fields)
    data = over_defaults(model, data)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(describe(error, data, fields)) from None


def choice(argv: Sequence[str], key: str, options: Mapping[str, T]) -> T:
    """Return the option that the top-level `key` names in the file or the overrides of `argv`.

    The first option is the default. An unknown name ends the process as a mistake in a configuration does.
    """
    path = next((a for a in argv if not a.startswith("--") and a.endswith((".yaml", ".yml"))), None)
    try:
        named = (read_file(Path(path)) if path else {}).get(key, next(iter(options)))
    except ConfigError as error:
        _refuse(error)
    for argument in argv:
        name, equals, value = argument.removeprefix("--").partition("=")
        named = value if equals and name == key else named
    if named not in options:
        _refuse(ConfigError(f"{key} = {named}; give one of {', '.join(options)}"))
    return options[named]


def dump_config(config: Section) -> str:
    """Return the resolved configuration as YAML, from which `load_config` makes an equal one."""
    return write_yaml(config.model_dump(mode="json"))


def result_line(result: Mapping[str, Any]) -> None:
    """Print the headline figures of a job as one line of JSON, its last on standard output.

    Tensors and numpy values become numbers or lists; a number that is not finite becomes null.
    """
    print(json.dumps(_plain(result), allow_nan=False), flush=True)  # noqa: T201


def run_job(
    main: Callable[[S], Mapping[str, Any]], model: type[S], argv: Sequence[str] | None = None
) -> NoReturn:
    """Run `main` on the configuration in `argv` (default: the process's own), print its result line, exit.

    Whatever else `main` prints goes to standard error. A ValueError is the user's to mend: one line, exit
    code 2 (the traceback is logged at DEBUG level). Ctrl-C ends with 130. Any other error ends with 1, after
    the whole traceback of its first cause and a card that says what to do (see `jobs.failure_card`).
    """
    config = load_config(model, sys.argv[1:] if argv is None else argv)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = main(config)
    except KeyboardInterrupt:
        _note_end("interrupted")
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
    except ValueError as error:
        _note_end("refused")
        logger.debug("refused", exc_info=True)
        _refuse(
            getattr(error, "cause", None) or error
        )  # an error from a Ray task carries the one raised there
    except Exception as error:
        from jobs.failure_card import tell_failure  # only a failure needs it

        logger.debug("failed", exc_info=True)
        _note_end("failed")
        tell_failure(error)
        sys.exit(FAILED)
    result_line(result)
    sys.exit(0)


def _note_end(outcome: str) -> None:
    """Write down how the run ended, if there is one: what knows of runs is loaded then."""
    identity = sys.modules.get("cluster.identity")
    if identity is not None:
        identity.ended(outcome)


def _refuse(error: BaseException) -> NoReturn:
    said = getattr(error, "in_one_line", None) or str(error)  # an error of many lines may have a short form
    sys.stderr.write(f"error: {' '.join(str(said).split())}\n")
    sys.exit(USER_ERROR)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor or a numpy value
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
