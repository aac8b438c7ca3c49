"""The frame of the benches: rows, their table in a page, memory of a variant."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools" / "bench"))

import measure
import run


def row(name: str, ratios=(4.0, 5.0, 6.0), target: str = "") -> measure.Row:
    return measure.compared(
        name, [1.0] * len(ratios), ratios, baseline_is="a loop", unit="CPU s", target=target
    )


def test_ratio_is_the_median_rounds_and_noise_half_their_range():
    found = row("x", ratios=(4.0, 10.0, 5.0))
    assert (found.ratio, found.noise) == (5.0, pytest.approx(0.6))
    assert row("counted", ratios=(3.0,)).noise == 0
    share = measure.compared(
        "y", [1.0], [4.0], baseline_is="all", unit="s", ratio_is="ours / baseline", target="<= 0.2"
    )
    assert share.ratio == 0.25 and share.is_met is False
    assert row("x", target=">= 5").is_met and row("x").is_met is None


def test_a_benchs_lines_are_replaced_and_the_others_stay_in_order(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{run.START}\n{run.END}\nafter\n")
    first, second = run.BENCHES[:2]
    run.write_rows(page, second, [row("old")])
    run.write_rows(page, first, [row("of the first", target=">= 9")])
    run.write_rows(page, second, [row("new"), row("newer")])
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after"
    table = lines[lines.index(run.START) + 1 : lines.index(run.END)]
    assert table[:2] == list(run.HEADER)
    assert [line.split("|")[2].strip() for line in table[2:]] == ["of the first", "new", "newer"]
    assert "≥ 9: **not met**" in table[2]


def test_peak_memory_is_what_the_variant_takes_beyond_what_is_there():
    held = bytearray(b"1") * 50_000_000
    assert 25 < measure.peak_megabytes(lambda: bytearray(b"1") * 30_000_000) < 45
    assert held


def test_every_bench_is_a_script():
    assert all(Path(run.__file__).with_name(f"{name}.py").is_file() for name in run.BENCHES)
