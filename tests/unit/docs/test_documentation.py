"""The documentation is correct: examples print the output on the page, commands exist, and links work."""

import contextlib
import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from preloaded.command import PYTHON

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of `language` ("" for plain blocks)."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_worked_example_prints_what_the_page_shows() -> None:
    page = ROOT / "docs" / "concepts.md"
    (code,), (shown,) = code_blocks(page, "python"), code_blocks(page, "text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(page), "exec"), {})
    assert printed.getvalue() == shown


def test_the_configuration_reference_is_that_of_the_dataclasses() -> None:
    process = subprocess.run(
        [PYTHON, "tools/upkeep/config_reference.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert (tmp_path / "site" / "index.html").is_file()


# -- commands ------------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, list[str]]]:
    """Return (page, words) for every command in plain blocks and inline code that starts a program of this
    project.
    """
    found = []
    for page in PAGES:
        inline = re.findall(
            r"`((?:python |launch/|slurm/|sbatch |mpirun )[^`\n]+)`", page.read_text(encoding="utf-8")
        )
        for block in [*code_blocks(page, ""), *code_blocks(page, "bash"), *inline]:
            for line in block.replace("\\\n", " ").splitlines():
                with contextlib.suppress(ValueError):  # the line is output, not a command
                    words = shlex.split(line, comments=True)
                    if words and is_ours(words):
                        found.append((page.name, words))
    return found


def is_ours(words: list[str]) -> bool:
    return words[0].startswith(("launch/", "slurm/")) or script_of(words) is not None


def script_of(words: list[str]) -> str | None:
    """Return the Python script that `words` start, or None if there is none."""
    for word in words:
        if word.startswith(("tools/", "launch/")) and word.endswith(".py"):
            return word
    return None


HELP = """
import contextlib, io, json, runpy, sys
found = {}
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    found[script] = printed.getvalue()
json.dump(found, sys.stdout)
"""


@functools.cache
def helps() -> dict[str, str]:
    """Return the help of each documented script. One process runs all, because most of them load torch."""
    scripts = sorted({script_of(words) or "launch/train.py" for _, words in commands()})
    folders = sorted({str(ROOT / script.rpartition("/")[0]) for script in scripts})
    process = subprocess.run(
        [PYTHON, "-c", HELP, *scripts],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ["PYTHONPATH"]])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)


USER_PATH = "tests/e2e/test_user_path.py"
RUN_BY = {
    "launch/mpi.py": "tests/e2e/test_mpi.py",
    "launch/train.py": USER_PATH,
    "launch/warmstart.py": USER_PATH,
    "tools/ablation/compare.py": "tests/unit/tools/test_ablation.py",
    "tools/ablation/method_facts.py": "tests/unit/tools/test_ablation.py",
    "tools/bench/large_corpus.py": "tests/unit/search/test_retrieval_service.py",
    "tools/bench/retrieval.py": "tests/unit/search/test_retrieval_service.py",
    "tools/bench/run.py": "tests/unit/tools/test_bench.py",
    "tools/build_index.py": USER_PATH,
    "tools/chat.py": USER_PATH,
    "tools/compare_runs.py": "tests/unit/tools/test_compare_runs.py",
    "tools/convert.py": USER_PATH,
    "tools/evaluate.py": USER_PATH,
    "tools/fill_recipe.py": "tests/unit/tools/test_fill_recipe.py",
    "tools/fp8_study/study.py": "tests/unit/tools/test_fp8_study.py",
    "tools/gpu_check.py": "tests/unit/tools/test_gpu_check.py",
    "tools/gpu_checks/hardware_table.py": "tests/unit/tools/test_gpu_check.py",
    "tools/plan.py": "tests/unit/tools/test_plan_tool.py",
    "tools/plot_run.py": "tests/unit/metrics/test_run_tools.py",
    "tools/prepare_data.py": USER_PATH,
    "tools/prepare_model.py": USER_PATH,
    "tools/retrieval_server.py": USER_PATH,
    "tools/rollouts_to_demonstrations.py": "tests/unit/warmstart/test_rejection.py",
    "tools/serve.py": USER_PATH,
    "tools/view_rollouts.py": USER_PATH,
}
"""Maps each documented program to the test that runs it. test_user_path.py runs README's commands unchanged."""
CLUSTER = ("sbatch", "srun", "slurm/", "enroot", "apptainer", "docker")
"""Programs that need a cluster or software of a cluster."""


def test_commands_are_found() -> None:
    assert len(commands()) >= 20


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda value: " ".join(value) if value else "")
def test_a_documented_command_exists_with_its_options_and_files(page: str, words: list[str]) -> None:
    for word in words:
        if word.startswith(("launch/", "tools/", "slurm/", "configs/")) and not re.search(
            r"[A-Z*\[{|]", word
        ):
            assert (ROOT / word).exists(), f"{page}: {word} is not there"
    script = script_of(words)
    if script is None:
        script = "launch/train.py" if words[0] == "launch/local.sh" else None
    if script is not None:
        known = set(re.findall(r"--[a-z][a-z0-9-]*", helps()[script]))
        assert "--help" in known, f"{script} --help does not work"
        launcher_options = {"--script", "--nodes", "--help"}
        used = {word.split("=")[0] for word in words[words.index(script) if script in words else 0 :]}
        used = {word for word in used if re.fullmatch(r"--[a-z][a-z0-9-]*", word)}
        assert used <= known | launcher_options, f"{page}: {script} knows no {used - known}"


@pytest.mark.parametrize("script", sorted({script_of(words) or "launch/train.py" for _, words in commands()}))
def test_a_documented_program_is_run_by_a_test(script: str) -> None:
    alone = [words for _, words in commands() if (script_of(words) or "launch/train.py") == script]
    if all(any(word.startswith(CLUSTER) for word in words) for words in alone):
        return
    assert script in RUN_BY, f"no test runs {script}: name one in RUN_BY"
    name = Path(script).stem
    assert name in (ROOT / RUN_BY[script]).read_text(encoding="utf-8"), f"{RUN_BY[script]} knows no {name}"
