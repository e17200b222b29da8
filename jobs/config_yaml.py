"""YAML as the configurations are written in it: 1.2's idea of scalars, and no key twice."""

import re
from typing import Any

import yaml

_FLOAT = r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (rf"{_FLOAT}|\.(?:nan|NaN|NAN)", "-+.0123456789"),
}


class Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, `off` and dates as text, and refuses a key that is written twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of `node`; YAMLError when a key occurs twice, where PyYAML takes the last."""
        seen = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"key {key!r} is there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first)
        )


def read_yaml(text: str) -> Any:
    """Return the value in `text`; ValueError with the problem and its line when it is not YAML."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(" ".join(str(problem or error).split()) + line) from None


def write_yaml(value: Any, *, flow: bool = False) -> str:
    """Return `value` as YAML that `read_yaml` gives back; with `flow` on one line, in brackets."""
    width = float("inf") if flow else 100
    text: str = yaml.dump(
        value, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=width
    )
    return text.removesuffix("...\n") if flow else text
