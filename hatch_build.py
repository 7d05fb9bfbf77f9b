"""Extras of the package, generated from the headers of the workers.

`pip install 'qbench-orchestrate[int8]'` installs what that worker's header requires. The extra `all` combines
all workers except those with `in_all = false`. So a new precision brings its own extra, and pyproject.toml
names none.
"""

import sys
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class WorkerExtras(MetadataHookInterface):
    """Adds one extra per precision, and `all`, to those under `[tool.hatch.metadata.hooks.custom.extras]`."""

    def update(self, metadata: dict[str, Any]) -> None:
        # The package isn't installed while it is built, so its parser is imported from the source tree.
        sys.path.insert(0, self.root)
        from orchestrator.precisions.catalog import find_precisions

        precisions = find_precisions(Path(self.root, "workers")).values()
        extras = {precision.name: precision.requirements for precision in precisions}
        together = [extras[precision.name] for precision in precisions if precision.in_all]
        everything = sorted({each for requirements in together for each in requirements})
        metadata["optional-dependencies"] = {**extras, "all": everything, **self.config["extras"]}
