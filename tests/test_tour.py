"""The tour, docs/tour.ipynb, from its first cell to its last."""

from __future__ import annotations

import json

import pytest
from homes import ROOT


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_tour_trains_measures_compares_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {}
    for number, text in enumerate(code, 1):
        exec(compile(text, f"tour.ipynb, cell {number}", "exec"), names)
    told = capsys.readouterr().out
    assert "did you mean 'P_std'" in told
    assert names["first"].images_seen == names["other"].images_seen == 1280
    assert names["images"].shape == (16, 3, 16, 16)
    assert (tmp_path / "tour.png").read_bytes().startswith(b"\x89PNG")
    assert "runs/tour_edm fd@" in told and "runs/tour fd@" in told
    assert "P_mean" in told  # what differs, in compare's words
    (page,) = tmp_path.rglob("compared.html")
    assert "tour_edm" in page.read_text()
    # What stands in the file is what a reader runs, without what running it printed.
    assert not any(cell.get("outputs") for cell in cells)
