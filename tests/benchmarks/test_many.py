"""What the bench of many jobs gives them, and how it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.many import JOBS, MAX_CHARACTERS, Many, Seconds, write_data


def test_each_job_has_short_rows_of_its_own(tmp_path: Path) -> None:
    """No prompt is trained on by two jobs, and none is long."""
    jobs = write_data(tmp_path)
    assert [*jobs] == [*JOBS]
    prompts = [
        json.loads(line)["prompt"] for job in jobs.values() for line in Path(job["data"]).read_text().splitlines()
    ]
    assert len(prompts) > 400 and max(map(len, prompts)) <= MAX_CHARACTERS
    assert len(set(prompts)) > 0.98 * len(prompts)  # a few rows of the data set are there twice


def test_a_ratio_is_of_a_round(tmp_path: Path) -> None:
    """The median over rounds; starting and loading are counted once together, and four times one after another."""
    many = Many("base", JOBS, {}, 2, [Seconds(100, 60, 40, 20, 5), Seconds(200, 130, 40, 30, 10)])
    ratios = many.ratios()
    assert ratios["whole commands"] == pytest.approx((150, 95, 0.625))
    assert ratios["without start and load"] == pytest.approx((120, 87.5, (55 / 80 + 120 / 160) / 2))
    assert ratios["training steps"] == pytest.approx((40, 25, 0.625))
