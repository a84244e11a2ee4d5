"""TODO docstring."""

from __future__ import annotations


class ConfigError(Exception):
    """A setting, or something a setting names, is wrong."""

    exit_code = 2


class DataError(Exception):
    """Records or media break the rules. The message carries `file:line id: field: what is wrong`."""

    exit_code = 65
