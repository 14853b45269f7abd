"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture
def parity():
    """The folder of reference outputs."""
    folder = SHARED / "parity"
    if not folder.is_dir():
        pytest.skip(
            "the reference outputs of the published implementations are not beside the project"
        )
    return folder


@pytest.fixture
def cifar10_subset():
    """A real, incomplete CIFAR-10 archive in the official layout."""
    archive = SHARED / "data" / "cifar-10-subset-python.tar.gz"
    if not archive.is_file():
        pytest.skip("the CIFAR-10 subset archive is not beside the project")
    return archive
