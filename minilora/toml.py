"""A configuration as a TOML file has it: what `--print-config` prints, and a run folder begins with."""

import json
from dataclasses import fields
from typing import Any

from minilora.config import RunConfig, to_dict


def config_toml(config: RunConfig) -> str:
    """All sections and keys. TOML has no word for None: such a key stands in a comment."""
    lines: list[str] = []
    for section, values in to_dict(config).items():
        keys = [field.name for field in fields(getattr(config, section))]
        settings = (f"{key} = {_toml(values[key])}" if key in values else f"# {key} is unset" for key in keys)
        lines += [f"[{section}]", *settings, ""]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """TOML writes strings, numbers, lists and true/false as JSON does, but for one character that must be escaped."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
