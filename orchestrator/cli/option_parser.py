"""The parser of the command line: it follows from the fields of Options, as do help and validation."""

from collections.abc import Callable
from typing import Any, get_args

import click
import msgspec
from click.core import ParameterSource
from msgspec import inspect as shapes

from orchestrator.cli.ranges import parse_range
from orchestrator.errors import BadInput, flag
from schemas.job import DecodeMode
from schemas.options import Options

METAVARS = {
    "model": "MODEL",
    "workers": "DIR",
    "calibration": "FILE",
    "device": "DEVICE",
    "prompts": "FILE",
    "out": "DIR",
}
"""What the value of a text option is."""

Command = Callable[..., Any]


def takes_options(*names: str) -> Callable[[Command], Command]:
    """Give a click command the fields of Options as its options; all of them, or only those named."""
    fields = [field for field in _fields() if not names or field.name in names]

    def decorate(command: Command) -> Command:
        for field in reversed(fields):
            command = _click_option(field)(command)
        return command

    return decorate


def _fields() -> tuple[shapes.Field, ...]:
    struct = shapes.type_info(Options)
    assert isinstance(struct, shapes.StructType)
    return tuple(field for field in struct.fields if isinstance(field.type, shapes.Metadata))


def _described(field: shapes.Field) -> shapes.Metadata:
    assert isinstance(field.type, shapes.Metadata)
    return field.type


def _click_option(field: shapes.Field) -> Command:
    described = _described(field)
    short = (described.extra or {}).get("short")
    flags = [flag for flag in (short, f"--{field.name.replace('_', '-')}") if flag]
    help_text = (described.extra_json_schema or {}).get("description", "")
    if isinstance(described.type, shapes.BoolType):
        return click.option(*flags, is_flag=True, help=help_text)
    form = (described.extra or {}).get("form")
    repeatable = form == "names" or isinstance(described.type, shapes.DictType)
    # Always text, even for defaults: only the Struct decides what is valid.
    default = None if repeatable or field.default is None else str(field.default)
    return click.option(
        *flags,
        type=str,
        multiple=repeatable,
        default=default,
        show_default=default is not None,
        metavar=_metavar(field.name, described.type, form),
        help=help_text,
    )


def _metavar(name: str, shape: shapes.Type, form: str | None) -> str:
    if form is not None:
        return {"names": "NAME,…", "range": "RANGE", "share": "PERCENT"}[form]
    if isinstance(shape, shapes.DictType):
        return "NAME=VALUE"
    # Every number with a fraction is a time.
    by_type = "N" if isinstance(shape, shapes.IntType) else "SECONDS"
    return METAVARS.get(name, by_type)


FORMS = {
    field.name: form
    for field in _fields()
    if (form := (_described(field).extra or {}).get("form")) is not None
}
"""Option → how its text is read: as `names`, a `range`, or a `share`."""


def read_options(given: dict[str, Any]) -> Options:
    """Turn click's values into Options. Raises `BadInput`, with the option, the value and a fix."""
    values = {name: value for name, value in given.items() if value not in (None, ())}
    for name, form in FORMS.items():
        if name in values:
            values[name] = read_form(name, _text(values[name]), form)
    for name in ("checkpoint", "python"):
        if name in values:
            values[name] = dict(_pair(name, text) for text in values[name])
    try:
        return msgspec.convert(values, Options, strict=False)
    except msgspec.ValidationError as error:
        name = str(error).partition(" - at `$.")[2].strip("`").split("[")[0]
        raise BadInput(flag(name), _text(given.get(name)), "is not valid", expectation(error)) from None


def _text(value: Any) -> str:
    """An option's text; if it was repeated, joined as if it had been given once."""
    return ",".join(value) if isinstance(value, tuple) else str(value)


def expectation(error: msgspec.ValidationError) -> str:
    """What msgspec expected of a value, without the value's path."""
    expected = str(error).partition(" - at `$")[0].replace("`", "").replace(" | null", "")
    if expected.startswith("Invalid enum value"):
        expected = f"{expected}, choose from {', '.join(get_args(DecodeMode))}"
    return expected


def read_form(name: str, text: str, form: str) -> list[str] | list[int] | float:
    """The values in an option's text. Raises `BadInput`."""
    if form == "names":
        return list(dict.fromkeys(word.strip() for word in text.split(",")))
    if form == "share":
        return _read_share(name, text)
    try:
        return parse_range(text)
    except ValueError as error:
        raise BadInput(flag(name), text, "is not a valid range", str(error)) from None


def _read_share(name: str, text: str) -> float:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise BadInput(flag(name), text, "is not a percentage", "Write 1% or 0.01") from None


def _pair(name: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise BadInput(
            flag(name), text, "is not of the form NAME=VALUE", f"Write {flag(name)} PRECISION=VALUE"
        )
    return key, value


def typed_options() -> set[str]:
    """The fields of Options that were given on the command line, without those left at their default."""
    source = click.get_current_context().get_parameter_source
    return {field.name for field in _fields() if source(field.name) is ParameterSource.COMMANDLINE}
