"""The published schemas are schemas, and the committed results follow them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from schema_check import schemas, validate

RESULTS = Path(__file__).parents[2] / "eval" / "results"
COMMITTED = sorted(path for path in RESULTS.rglob("*.json"))


@pytest.mark.parametrize("name", schemas())
def test_a_schema_is_one_and_explains_itself(name: str) -> None:
    schema = schemas()[name]
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"{name}.json"
    assert schema["title"]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(RESULTS)))
def test_committed_results_follow_their_schema(path: Path) -> None:
    name = path.stem.partition("_")[0]  # kernels_fusion.json is one of the kernels
    validate(json.loads(path.read_text(encoding="utf-8")), name)


MISTAKES = [
    (lambda content: content.pop("suite"), "'suite' is a required property"),
    (lambda content: content.update(extra=1), "'extra' was unexpected"),
    (lambda content: content.update(schema=99), "1 was expected"),
    (lambda content: content["environment"].pop("commit"), "'commit' is a required property"),
    (lambda content: content["runs"][0].update(ms="fast"), "'fast' is not of type"),
    (lambda content: content["runs"][0].update(config={}), "'low' is a required property"),
]


@pytest.mark.parametrize(("break_it", "complaint"), MISTAKES)
def test_what_is_wrong_is_named(break_it: Any, complaint: str) -> None:
    content = json.loads((RESULTS / "h200" / "kernels.json").read_text(encoding="utf-8"))
    broken = copy.deepcopy({**content, "runs": content["runs"][:1]})
    break_it(broken)
    with pytest.raises(ValidationError, match=complaint):
        validate(broken, "kernels")
