"""Exceptions for wrong settings and wrong data, with the exit codes of the commands that they end."""

from __future__ import annotations


class ConfigError(Exception):
    """A setting is wrong, or a file or folder that a setting names."""

    exit_code = 2


class DataError(Exception):
    """Records or media break the rules. The message has the form `file:line id: field: what is wrong`."""

    exit_code = 65
