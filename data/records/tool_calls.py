"""Tools that a record offers and calls of them, in OpenAI's format, which chat templates expect.

Read as well: JSON in strings, a function without the object around it (LLaMA-Factory), the older `functions` and `function_call` of
OpenAI, and turns of the roles `function_call` and `tool_call` whose text is the JSON of the calls.
"""

from __future__ import annotations

from data.records.fields import FieldError, is_absent, kind_of
from model.files.untrusted import Json, parse_json

_CALL_KEYS = ("id", "type", "function", "index")
_FUNCTION_KEYS = ("name", "arguments")


def read_tools(raw: Json) -> tuple[Json, ...]:
    """Read the definitions of the tools that a record offers; () if it offers none. Raises `FieldError`."""
    given = [key for key in ("tools", "functions") if not is_absent(raw.get(key))]
    if len(given) > 1:
        raise FieldError("tools", "both 'tools' and 'functions' are there; keep one")
    if not given:
        return ()
    field, value = given[0], _parsed(raw[given[0]], given[0])
    if not isinstance(value, list):
        raise FieldError(field, f"is {kind_of(value)}, not a list of tools")
    return tuple(_definition(tool, f"{field}[{i}]") for i, tool in enumerate(value))


def _definition(tool: object, field: str) -> Json:
    """Return one tool as {"type": "function", "function": {"name", "description", "parameters"}}. Raises `FieldError`."""
    tool = _parsed(tool, field)
    if not isinstance(tool, dict):
        raise FieldError(field, f"is {kind_of(tool)}, not an object")
    if "function" not in tool:
        tool = {"type": "function", "function": tool}
    if tool.get("type", "function") != "function":
        raise FieldError(f"{field}.type", f"{str(tool['type'])[:60]!r} is no kind of tool that is read; allowed: function")
    function = tool["function"]
    if not isinstance(function, dict):
        raise FieldError(f"{field}.function", f"is {kind_of(function)}, not an object")
    _check_name(function.get("name"), f"{field}.function.name")
    return {"type": "function", **tool}


def read_calls(value: object, field: str) -> list[Json]:
    """Read the calls of one turn. Their arguments are objects, parsed where they are strings. Raises `FieldError`."""
    value = _parsed(value, field)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise FieldError(field, f"is {'empty' if value == [] else kind_of(value)}, not a list of calls")
    return [_call(call, f"{field}[{i}]") for i, call in enumerate(value)]


def _call(call: object, field: str) -> Json:
    call = _parsed(call, field)
    if not isinstance(call, dict):
        raise FieldError(field, f"is {kind_of(call)}, not an object")
    if "function" not in call:
        bare = {key: call[key] for key in _FUNCTION_KEYS if key in call}
        call = {"function": bare, **{key: value for key, value in call.items() if key not in bare}}
    _check_keys(call, _CALL_KEYS, field)
    if call.get("type") not in (None, "function"):
        raise FieldError(f"{field}.type", f"{str(call['type'])[:60]!r} is no kind of call that is read; allowed: function")
    function, id = call["function"], call.get("id")
    if not isinstance(function, dict):
        raise FieldError(f"{field}.function", f"is {kind_of(function)}, not an object")
    _check_keys(function, _FUNCTION_KEYS, f"{field}.function")
    if id is not None:
        _check_name(id, f"{field}.id")
    name = _check_name(function.get("name"), f"{field}.function.name")
    arguments = _arguments(function.get("arguments"), f"{field}.function.arguments")
    return {"type": "function", **({} if id is None else {"id": id}), "function": {"name": name, "arguments": arguments}}


def _arguments(value: object, field: str) -> Json:
    value = _parsed(value, field)
    if not isinstance(value, dict):
        raise FieldError(field, f"is {kind_of(value)}, not an object, nor the JSON of one; without arguments it is {{}}")
    return value


def _parsed(value: object, field: str) -> object:
    """Return the value, parsed if it is a string of JSON. Raises `FieldError` for a string that is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value.encode())
    except ValueError:
        raise FieldError(field, f"{value[:60]!r} is no JSON") from None


def _check_name(value: object, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise FieldError(field, "missing" if value is None or value == "" else f"is {kind_of(value)}, not a string")
    return value


def _check_keys(box: Json, known: tuple[str, ...], field: str) -> None:
    if key := next((key for key in box if key not in known and not is_absent(box[key])), None):
        raise FieldError(f"{field}.{key}", f"is no key that is read here; there are {', '.join(known)}")
