"""A class by its bare name: from diffusers, or from a package of this library with one module a method."""

import inspect
import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Any


def find_class(name: str, base: type, library: ModuleType, package: str, field: str) -> Any:
    """Return the subclass of `base` that is called `name`, of `library` or else of a module of `package`.

    Modules are imported by the names that the package's folder has, so that a new method is a new file and no
    list of names anywhere. Raises ValueError, naming `field`, where there is no such class.
    """
    found = getattr(library, name, None)
    if found is None:
        modules = (import_module(f"{package}.{module.name}") for module in _modules(package))
        found = next((vars(module)[name] for module in modules if name in vars(module)), None)
    if inspect.isclass(found) and issubclass(found, base):
        return found
    raise ValueError(
        f"{field}={name} is not a {base.__name__} of {library.__name__}, nor of {package}: "
        f"{package} has {', '.join(own_classes(base, package)) or 'none'}"
    )


def own_classes(base: type, package: str) -> list[str]:
    """Return the names of the subclasses of `base` that the modules of `package` define, in order."""
    names = set()
    for info in _modules(package):
        module = import_module(f"{package}.{info.name}")
        names |= {
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
        }
    return sorted(names)


def _modules(package: str) -> list[pkgutil.ModuleInfo]:
    return sorted(pkgutil.iter_modules(import_module(package).__path__), key=lambda info: info.name)
