# SPDX-License-Identifier: MIT
"""Checks of arguments at public doors, by what their annotations say."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from patchnetvlad.base.text import one_line
from patchnetvlad.errors import ArgumentError, PatchNetVLADError

P = ParamSpec("P")
R = TypeVar("R")

_OF_VALUES = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function refuse arguments that are not of the types of its annotations.

    What annotations do not say, such as the shape of an array, is the function's to check.
    """

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        check_arguments(function, args, kwargs)
        return function(*args, **kwargs)

    return inner


def check_arguments(
    function: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    kind: type[PatchNetVLADError] = ArgumentError,
    problem: str = "",
) -> None:
    """Raise an error for an argument that is not of the type of its annotation.

    None passes where the default means the same: where it is empty.

    Parameters
    ----------
    function : callable
        Whose annotations count.
    args : sequence
    kwargs : mapping of str to object
        What it is called with.
    kind : type, default ArgumentError
        Of the error.
    problem : str, default ""
        Begins the message.
    """
    signature, hints = _annotations(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return  # as the call itself will say
    for name, value in given.items():
        empty = value is None and not signature.parameters[name].default
        if name in hints and not empty and not _fits(value, hints[name]):
            needed = signature.parameters[name].annotation
            raise kind(f"{problem}{name} = {shown(value)} is not of type {needed}")


@contextlib.contextmanager
def argument_errors(problem: str, kind: type[PatchNetVLADError] = ArgumentError) -> Iterator[None]:
    """Turn any error of a pure function into one about its arguments.

    Parameters
    ----------
    problem : str
        What cannot be done; begins the message.
    kind : type, default ArgumentError
        Of the error.

    Returns
    -------
    context manager
        Which is a decorator, too.
    """
    try:
        yield
    except PatchNetVLADError:
        raise
    except _OF_VALUES as error:
        raise kind(f"{problem}: {one_line(error)}") from error


def shown(value: object) -> str:
    """Return a value for a message, cut off where it is long."""
    try:
        return one_line(reprlib.repr(value), 80)
    except Exception:
        return f"a {type(value).__name__}"


@functools.cache
def _annotations(function: Callable[..., object]) -> tuple[inspect.Signature, dict[str, Any]]:
    """Return the signature of a function, and those of its annotations that can be resolved."""
    signature, hints = inspect.signature(function), {}
    scope = vars(inspect.getmodule(function))
    for name, parameter in signature.parameters.items():
        holder = types.SimpleNamespace(__annotations__={name: parameter.annotation})
        # A device may be one of PyTorch's, too, and is looked at by choose_device.
        if parameter.annotation is not parameter.empty and name != "device":
            with contextlib.suppress(NameError, TypeError):  # of a library that is imported late
                hints.update(typing.get_type_hints(holder, scope))
    return signature, hints


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of the type of an annotation; of those not known here, anything is."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, of) for of in args)
    simple: dict[Any, Any] = {str: str, Path: os.PathLike, float: Real, os.PathLike: os.PathLike}
    if origin in simple:
        return isinstance(value, simple[origin])
    if origin is int:
        return isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if origin is bool:
        return isinstance(value, (Integral, type(None))) or type(value).__name__.startswith("bool")
    if origin is tuple:
        return isinstance(value, Iterable) and not isinstance(value, (str, Mapping))
    if origin in (Iterable, Sequence, list):
        if not isinstance(value, Iterable) or isinstance(value, Mapping):
            return False
        some: Any = value
        if hasattr(some, "__array__"):  # all of its values are of one kind
            some = list(some[:1]) if some.ndim else ()
        elif not isinstance(some, (list, tuple)):  # it may be used up by looking at it
            some = ()
        return all(_fits(item, args[0]) for item in some)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(key, args[0]) and _fits(item, args[1]) for key, item in value.items()
        )
    if getattr(origin, "_is_protocol", False):
        return all(hasattr(value, name) for name in dir(origin) if not name.startswith("_"))
    known = isinstance(origin, type) and origin not in (object, Any) and not _is_array(origin)
    return isinstance(value, origin) if known else True


def _is_array(kind: type) -> bool:
    return kind.__name__ in ("ndarray", "Tensor")
