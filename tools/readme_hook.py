"""For the page on PyPI: the README with absolute links, which PyPI needs, to the files of the released version."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

IMAGE = re.compile(r"(?<=!)\[([^]]*)\]\((?!https?:)([^)]+)\)")
LINK = re.compile(r"(?<!!)\[((?:[^][]|\[[^]]*\])*)\]\((?!https?:|#)([^)]+)\)")


class ReadmeHook(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        """
        Called by hatchling when it builds the package.

        :param metadata: of the project, changed in place
        """
        repository = metadata["urls"]["Repository"]
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = IMAGE.sub(rf"[\1]({repository}/raw/v{metadata['version']}/\2)", text)
        text = LINK.sub(rf"[\1]({repository}/blob/v{metadata['version']}/\2)", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
