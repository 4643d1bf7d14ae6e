# SPDX-License-Identifier: Apache-2.0
"""The README's Python runs, from top to bottom, as a reader would paste it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    assert (tmp_path / "my-learngene" / "gene.safetensors").is_file()
    again = scope["ViTForImageClassification"].from_pretrained(tmp_path / "vit-4-layers")
    assert again.config.num_hidden_layers == 4


def test_readme_names_only_existing_files() -> None:
    prose = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(((?!http)[^)#]+)\)", prose)
    assert len(targets) >= 3
    for target in targets:
        assert (README.parent / target).exists(), target
