"""The shared code of the benches: rows, their table in a page, and a variant's memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import measure
import pytest
import quickstart
import record
import run
import trl_peer
from tiny_models import build_tokenizer
from trajectories import make_trajectories

from a2tgpo.record.rollout_files import read_part, write_part
from a2tgpo.record.rollout_record import to_record


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
    run.write_rows(page, second, [row("new"), row("newer", ratios=(4.0,))])
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after"
    table = lines[lines.index(run.START) + 1 : lines.index(run.END)]
    assert table[:2] == list(run.HEADER)
    assert [line.split("|")[2].strip() for line in table[2:]] == ["of the first", "new", "newer"]
    assert "≥ 9: **not met**" in table[2]
    assert "| ± 20% |" in table[3] and "| one run |" in table[4]


def test_numbers_have_three_digits_however_small_or_large():
    shown = [measure.number(value) for value in (1.448e-5, 0.000999, 0.0102, 31.25, 999.4, 999.6, 8_184_000)]
    assert shown == ["1.45e-05", "0.000999", "0.0102", "31.2", "999", "1,000", "8,184,000"]
    assert measure.number(0) == "0"


# A separate process runs this code. A process whose heap earlier tests have enlarged may be unable to fork.
PEAK = """
import measure

def small_blocks(megabytes):
    return [bytearray(b"1") * 100_000 for _ in range(10 * megabytes)]

freed = small_blocks(100)
held = small_blocks(1)  # behind them in the heap, which keeps them there
del freed
print(measure.peak_megabytes(lambda: small_blocks(30)))
"""


def test_peak_memory_is_what_the_variant_takes_beyond_what_is_there_and_was_freed():
    environment = {**os.environ, "PYTHONPATH": f"{run.ROOT}:{Path(run.__file__).parent}"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 25 < float(done.stdout) < 45


def test_every_bench_is_a_module_that_says_what_it_measures():
    assert all(run.purpose(name).endswith(".") for name in run.BENCHES)


def test_the_quickstarts_stages_are_lines_of_its_recipe_in_their_order():
    command = ["make", "--dry-run", "--always-make", "quickstart"]
    done = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True, check=True)
    places = [done.stdout.index(mark) for mark in quickstart.STAGES.values()]
    assert places == sorted(places)


def test_the_bench_of_records_compares_equal_records(tmp_path):
    tokenizer = build_tokenizer()
    trajectories = make_trajectories(3, mean_tokens=40, max_turns=2, vocab_size=100)
    record.as_earlier(record.with_lists(trajectories), tokenizer, tmp_path / "earlier")
    values = record.turn_values()
    rows = [to_record(one, values, place, tokenizer=tokenizer) for place, one in enumerate(trajectories)]
    write_part(rows, tmp_path / "ours")
    assert read_part(tmp_path / "earlier") == read_part(tmp_path / "ours")


# Prints the packages that the modules of this project name in their imports outside of functions.
IMPORTED = """
import ast, importlib, sys
from pathlib import Path

def names(path):
    for node in ast.parse(Path(path).read_text()).body:
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module

for name in [name for name in names(sys.argv[1]) if name.startswith("a2tgpo.")]:
    importlib.import_module(name)
own = [module.__file__ for name, module in sys.modules.items() if name.startswith("a2tgpo") and module.__file__]
found = {name.partition(".")[0] for file in [sys.argv[1], *own] for name in names(file)}
print(*sorted(found - set(sys.stdlib_module_names) - {"a2tgpo"}))
"""


@pytest.mark.parametrize("script", ["trl_whole_step.py", "trl_train_step.py"])
def test_trls_environment_has_every_package_that_its_scripts_import(script):
    folder = Path(run.__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(run.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, str(folder / script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^[a-z0-9]+", (folder / "requirements-trl.txt").read_text(), re.MULTILINE)
    packages = {"yaml": "pyyaml"}
    imported = {name for name in done.stdout.split() if not (folder / f"{name}.py").is_file()}
    assert len(imported) > 3 and {packages.get(name, name) for name in imported} <= set(listed)


def test_a_page_without_the_tables_marks_is_refused_before_a_bench_runs(tmp_path):
    (tmp_path / "page.md").write_text("no table")
    command = [sys.executable, run.__file__, "packing", "--page", str(tmp_path / "page.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "allowed: a page with the lines" in done.stderr
    assert not done.stdout


def test_rows_of_another_trainer_are_left_out_with_a_line_where_it_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trl_peer, "PYTHON", tmp_path / ".venv-trl" / "bin" / "python")
    assert not trl_peer.is_there()
    assert "make setup-trl" in capsys.readouterr().out


def test_another_trainer_is_asked_and_answers_in_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trl_peer, "PYTHON", Path(sys.executable))
    script = tmp_path / "peer.py"
    script.write_text(
        "import sys; from pathlib import Path\nPath(sys.argv[2]).write_text(Path(sys.argv[1]).read_text())"
    )
    assert trl_peer.run(str(script), {"rows": [1, 2]}) == {"rows": [1, 2]}
    script.write_text("raise SystemExit('no such model')")
    with pytest.raises(RuntimeError, match=r"peer\.py failed"):
        trl_peer.run(str(script), {})
    assert "no such model" in capsys.readouterr().err
