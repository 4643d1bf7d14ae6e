# SPDX-License-Identifier: Apache-2.0
"""Gene folders written beside one major version of transformers and read beside the other, for every host of theirs.

The older version lies beside the environment and is put in front by PYTHONPATH, in a process of its own. Run as a
program, this file writes or reads a folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from language_samples import LANGUAGE, embedded, sentences
from torch import Tensor, nn
from vision_samples import FOREIGN, VISION

from pylearngene.learngene import Learngene
from pylearngene.methods import TLEG
from pylearngene.networks import auxiliary, extract

OLDER = Path(sys.prefix) / "transformers-4"
DEPTHS = (2, 3, 5)


def output(net: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return embedded(net, sentences(name))[0] if name in LANGUAGE else VISION[name].output(net)


def write(folder: Path) -> None:
    """Store a learngene of every host, and what networks grown from it compute."""
    for name in (*LANGUAGE, *FOREIGN):
        model = (LANGUAGE[name] if name in LANGUAGE else VISION[name].build)().double().eval()
        lg = extract(auxiliary(model, TLEG(), init="fit", blocks=None if name in LANGUAGE else VISION[name].blocks))
        lg.save_pretrained(folder / name)
        torch.save([output(lg.descend(depth).eval(), name) for depth in DEPTHS], folder / f"{name}.pt")


def read(folder: Path) -> None:
    """Compare what is grown here with what was grown there."""
    for name in (*LANGUAGE, *FOREIGN):
        lg = Learngene.from_pretrained(folder / name)
        for depth, expected in zip(DEPTHS, torch.load(folder / f"{name}.pt"), strict=True):
            for backed in (True, False):
                found = output(lg.descend(depth, backed=backed).eval(), name)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def beside_the_older(action: str, folder: Path) -> None:
    inherited = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(OLDER), inherited]))}
    done = subprocess.run(
        [sys.executable, __file__, action, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "version 4" in done.stdout


@pytest.mark.full
@pytest.mark.skipif(not OLDER.is_dir(), reason="the older transformers is not installed")
def test_what_one_version_stores_the_other_grows(tmp_path: Path) -> None:
    for folder in ("older", "newer"):
        (tmp_path / folder).mkdir()
    beside_the_older("write", tmp_path / "older")
    read(tmp_path / "older")
    write(tmp_path / "newer")
    beside_the_older("read", tmp_path / "newer")


if __name__ == "__main__":
    import transformers

    print("version", transformers.__version__)
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
