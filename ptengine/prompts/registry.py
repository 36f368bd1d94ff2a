"""Prompt methods by name. A method enters with `@register` in its own file and nowhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ptengine.errors import InputError

if TYPE_CHECKING:
    from ptengine.prompts.base import Prompt

__all__ = ["create", "methods", "prompt_class", "register"]

_CLASSES: dict[str, type[Prompt]] = {}

P = TypeVar("P", bound="type[Prompt]")


def register(name: str) -> Callable[[P], P]:
    """Class decorator: file the prompt method under `name`, which becomes its `method`."""

    def enter(cls: P) -> P:
        if name in _CLASSES:
            raise ValueError(f"prompt method {name!r} is registered twice: {_CLASSES[name].__name__}, {cls.__name__}")
        cls.method = name
        _CLASSES[name] = cls
        return cls

    return enter


def methods() -> list[str]:
    """Names of the registered methods, sorted."""
    return sorted(_CLASSES)


def prompt_class(method: Any) -> type[Prompt]:
    """The class registered under `method`.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    if not isinstance(method, str) or method not in _CLASSES:
        raise InputError(f"expected a prompt method, one of {', '.join(methods())}, got {method!r}")
    return _CLASSES[method]


def create(method: str, model: Any, **options: Any) -> Prompt:
    """Make a prompt by the name of its method, for callers that read the name from a file or a command line.

    Args:
        method: registered name, for example ``"soft_prompt"`` or ``"prefix"``.
        model: the frozen backbone.
        options: keyword arguments of the method's class.

    Raises:
        InputError: unknown method, an option the method does not have or cannot do without, or whatever the class
            refuses.
    """
    cls = prompt_class(method)
    parameters = inspect.signature(cls).parameters
    if "model" not in parameters:
        raise InputError(f"prompt method {method!r} is made from a trained prompt, not from a model and options")
    known = [name for name in parameters if name != "model"]
    for name in options:
        if name not in known:
            raise InputError(f"prompt method {method!r} has no option {name!r}; it has {', '.join(known)}")
    for name in known:
        if name not in options and parameters[name].default is inspect.Parameter.empty:
            raise InputError(f"prompt method {method!r} needs the option {name!r}")
    return cls(model, **options)
