"""Build hook: give an editable install a tree of links that matches the import names.

The four folders stand at the top of the repository, yet are imported as ``steersman.core`` and so
on. The wheel renames them; an editable install needs real paths, so it gets
``.editable/steersman/<folder>`` links (ignored by git) and a path entry that points there.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EditableLinks(BuildHookInterface):
    """Create the links of an editable install; do nothing for wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Link every top-level folder below ``.editable/steersman``."""
        if version != "editable":
            return
        package = Path(self.root, ".editable", "steersman")
        package.mkdir(parents=True, exist_ok=True)
        for folder in self.build_config.target_config["sources"]:
            link = package / folder
            if not link.exists():
                link.symlink_to(Path("../..", folder), target_is_directory=True)
