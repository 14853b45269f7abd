"""What is read of a run's rows that other programs or a full disk have spoilt."""

import json
import math

from diffusion_pl.training.history import fit_rows


def read(folder, *rows):
    """The fit ones of rows in a file, and the problems."""
    problems = []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return fit_rows(folder / "metrics.jsonl", problems), problems


def test_a_number_has_a_name_of_text_and_a_value_that_a_float_holds(tmp_path):
    good = {"images": 1, "name": "fd@4", "value": 10**299}
    bad = [
        {"images": 1, "name": 7, "value": 0.5},
        {"images": 1, "name": "fd@4", "value": 10**300},
        {"images": 1, "name": "fd@4", "value": True},
    ]
    rows, problems = read(tmp_path, good, *bad)
    assert rows == [good]
    assert len(problems) == 1 and "3 of 4 lines are damaged" in problems[0]


def test_a_rate_is_positive_and_finite_or_is_left_out(tmp_path):
    rates = [2.5, 0, -1.0, math.inf, math.nan, "3"]
    rows, problems = read(tmp_path, *({"images": 1, "images_per_second": r} for r in rates))
    assert rows == [{"images": 1, "images_per_second": 2.5}, *[{"images": 1}] * 5]
    assert not problems
