"""Plans made from options, without a command line, files or a model."""

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


def plan_of(gpus: list[Gpu] | None = None, **options: Any) -> Plan:
    chosen = Options(**({"precision": ["fp16"]} | options))
    return make_plan(chosen, PRECISIONS, lambda: MODEL, gpus or [], Path("cache"))


def refused(**options: Any) -> BadInput:
    """The one-line error that these options raise."""
    with pytest.raises(BadInput) as caught:
        plan_of(**options)
    assert "\n" not in str(caught.value)
    return caught.value


def bad_input(**options: Any) -> str:
    return str(refused(**options))
