"""Plans for made-up options, for tests of planning and of what uses plans."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import BadInput
from orchestrator.planning.models import random_names
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.precisions.catalog import find_precisions
from schemas.environment import Gpu
from schemas.job import ModelSource
from schemas.options import Options, Sweep

PRECISIONS = find_precisions()
MODEL = ModelSource(kind="folder", location="models/tiny", name="tiny")


def without_names(text: str) -> str:
    """For golden texts: without lists of everything that exists, which grow with the project."""
    calibrated = [precision.name for precision in PRECISIONS.values() if precision.calibrated]
    for names in (PRECISIONS, calibrated, random_names()):
        text = text.replace(", ".join(names), "…")
    for struct in (Options, Sweep):
        text = text.replace(", ".join(struct.__struct_fields__).replace("_", "-"), "…")
    return text


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
