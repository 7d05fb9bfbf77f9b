"""Plans for made-up options, for tests of planning and of what uses plans."""

import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import BadInput
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.precisions.catalog import find_precisions
from schemas.environment import Gpu
from schemas.job import ModelSource
from schemas.options import Options

PRECISIONS = find_precisions()
MODEL = ModelSource(kind="folder", location="models/tiny", name="tiny")


def without_names(text: str) -> str:
    """For golden texts: without the list of all precisions, or of all keys of a plan file."""
    return re.sub(r"\b(There are|Known keys:|[Oo]ne of:?) [\w-]+, [\w, -]*[\w-]", r"\1 …", text)


def plan_of(gpus: list[Gpu] | None = None, **options: Any) -> Plan:
    chosen = Options(**({"precision": ["fp16"]} | options))
    return make_plan(chosen, PRECISIONS, lambda: MODEL, gpus or [], Path("cache"))


def refused(**options: Any) -> BadInput:
    """The error, of one line, that these options raise."""
    with pytest.raises(BadInput) as caught:
        plan_of(**options)
    assert "\n" not in str(caught.value)
    return caught.value


def bad_input(**options: Any) -> str:
    return str(refused(**options))
