"""Extras of the package, generated from the headers of the workers.

`pip install 'qbench-orchestrate[int8]'` installs what that worker's header asks for, and the extra `all` what
all of them do except those that say `in_all = false`. So a new precision brings its own extra, and
pyproject.toml names none.
"""

import sys
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class WorkerExtras(MetadataHookInterface):
    """Adds one extra per precision, and `all`, to those under `[tool.hatch.metadata.hooks.custom.extras]`."""

    def update(self, metadata: dict[str, Any]) -> None:
        # While the package is built it is not installed: its own parser comes from the source tree.
        sys.path.insert(0, self.root)
        from orchestrator.precisions.catalog import find_precisions

        precisions = find_precisions(Path(self.root, "workers")).values()
        extras = {precision.name: precision.requirements for precision in precisions}
        together = [extras[precision.name] for precision in precisions if precision.in_all]
        everything = sorted({each for requirements in together for each in requirements})
        metadata["optional-dependencies"] = {**extras, "all": everything, **self.config["extras"]}
