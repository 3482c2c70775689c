"""Validation of results against the published schemas in eval/schemas."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker
from referencing import Registry, Resource

SCHEMAS = Path(__file__).parents[2] / "eval" / "schemas"


@functools.cache
def schemas() -> dict[str, Any]:
    """The published schemas by file name without ".json"."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(SCHEMAS.glob("*.json"))
    }


def validate(content: dict[str, Any], name: str) -> None:
    """Checks ``content`` against the schema ``name``: ``validate(content, "perplexity")``.

    Raises:
        jsonschema.ValidationError: that names the field, if it does not match.
    """
    registry = Registry().with_resources(
        (f"{name}.json", Resource.from_contents(schema)) for name, schema in schemas().items()
    )
    Draft202012Validator(schemas()[name], registry=registry, format_checker=FormatChecker()).validate(content)
