"""The page of rollouts in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import zstandard
from preloaded.command import PYTHON
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).parents[3]
CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=8000"
)
BRANCH = {"parent": 1, "root": 1, "owners": [1]}
INNER_BRANCH = {"parent": 0, "root": 0, "owners": [], "num_tokens": 3}
HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>"


def byte_tokenizer(path: Path) -> Tokenizer:
    """Save a tokenizer with one token per byte and ids in the alphabet's order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))
    return tokenizer


def turn(tokenizer, text, *, query=None, gain=None, seen=""):
    tokens = tokenizer.encode(text).ids
    return {
        "tokens": tokens,
        "rollout_logprobs": [-0.25 * (i % 8) for i in range(len(tokens))],
        "observation_tokens": [],
        "query": query,
        "tool": "search" if query else None,
        "tool_failed": False,
        "answer_prob": None if query is None else 0.5,
        "info_gain": gain,
        "advantage": 1.25,
        "clip_scale": 0.9,
        "ratio": 1.00123,
        "text": text,
        "observation_text": seen,
    }


@pytest.fixture
def run(tmp_path) -> Path:
    """Two steps of two questions with three rollouts each."""
    folder, model = tmp_path / "a-run", tmp_path / "model"
    (folder / "rollouts").mkdir(parents=True)
    model.mkdir()
    tokenizer = byte_tokenizer(model / "tokenizer.json")
    (folder / "config.yaml").write_text(f"model: {{path: {model}}}\n")
    for step in (1, 7):
        records = []
        for prompt in range(2):
            for sample in range(3):
                turns = [
                    turn(
                        tokenizer,
                        f"<think> Zürich {HOSTILE} </think> <search> q{sample} </search>",
                        query=f"q{sample} {HOSTILE}",
                        gain=0.1 * sample - 0.1,
                        seen=f"<result>{HOSTILE}</result>",
                    )
                ]
                turns.append(turn(tokenizer, f"<answer> {sample} </answer>"))
                records.append(
                    {
                        "prompt_index": prompt,
                        "prompt_id": f"id-{prompt}",
                        "sample_index": sample,
                        "hops": 1,
                        "outcome_reward": float(sample == 2),
                        "exact_match": float(sample == 2),
                        "format_ok": True,
                        "stop_reason": "answer",
                        "baseline_prob": 0.2,
                        "prompt_tokens": [],
                        "prompt_text": f"<|im_start|>user\nWhat of {prompt}, step {step}?<|im_end|>\n"
                        "<|im_start|>assistant\n",
                        "turns": turns if sample else turns[1:],
                        # Records of earlier versions have no such field.
                        **({"branch": BRANCH if sample == 2 else None} if step == 7 else {}),
                    }
                )
                if step == 7 and sample == 0:
                    inner = {"sample_index": 3, "exact_match": 1.0, "branch": INNER_BRANCH}
                    records[-1]["inner_branches"] = [records[-1] | inner]
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        path = folder / "rollouts" / f"step_{step}.jsonl.zst"
        path.write_bytes(zstandard.ZstdCompressor().compress(lines))
    return folder


def view(*arguments):
    command = [PYTHON, "tools/view_rollouts.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_page_shows_the_group_and_every_turn_as_text(run, tmp_path):
    page = tmp_path / "out" / "page.html"
    done = view(run, "--html", page)
    assert done.returncode == 0 and "steps 1, 7" in done.stdout, done.stderr
    assert "http" not in re.sub(r'id="data".*?</script>', "", page.read_text(), flags=re.S), (
        "it needs the network"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium here: the page was written but not opened")
    # A script stands in for a user's clicks: the first step, the second question, wrong answers, by gain.
    driven = page.with_name("driven.html")
    clicks = """<script>setTimeout(() => {
      const set = (id, value) => {
        const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event("change"));
      };
      document.body.dataset.first = document.getElementById("main").innerText;
      document.body.dataset.list = document.getElementById("prompt").textContent;
      set("step", "1"); set("prompt", "1"); set("em", "0"); set("order", "gain");
    }, 2000)</script>"""
    driven.write_text(page.read_text().replace("</body>", clicks + "</body>"))
    command = [
        CHROMIUM,
        *FLAGS.split(),
        f"--user-data-dir={tmp_path / 'chrome'}",
        "--dump-dom",
        driven.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert 'data-ready="yes"' in dom
    assert "<title>Rollouts of a-run</title>" in dom and "onerror=alert(1)&gt;" in dom
    assert "<img" not in dom.split("<script")[0], "what a model wrote became markup"
    first = re.search(r'data-first="(.*?)"', dom, flags=re.S)[1]
    assert "What of 0, step 7?" in first and "P(gold | question) 0.2000" in first
    assert "branch of #1 after turn 1" in first and first.count("played by #1") == 1
    assert "branch of #0 after token 3 of turn 1, not trained on" in first
    (listed,) = re.findall(r'data-list="(.*?)"', dom, flags=re.S)
    assert listed.count("1/3  What of") == 2, "a branch counts as an answer of the policy"
    shown = dom.split('<main id="main">')[1].split("</main>")[0]
    assert "What of 1, step 1?" in shown
    # Of the wrong samples, sample 1 has gain 0 and sample 0 has none: one turn column, two rows, two articles. The
    # column's mean and deviation are still those of the whole group, with gains 0 and 0.1.
    assert shown.count("<article") == 2 and shown.count("<th>turn") == 1
    assert "mean +0.050, sd 0.050, n 2" in shown and "A +1.25" in shown and "c 0.90" in shown
    assert shown.count("<dt>ratio</dt><dd>1.00123</dd>") == 3
    assert "2 of 3 rollouts, 2 questions in step 1" in dom and "branch" not in shown
    assert 'title="log p -0.250, p 0.779"' in shown
    # ü consists of two tokens. It is shown as one piece with the sum of their log-probs.
    assert re.search(r'title="log p -[\d.]+, p [\d.]+"[^>]*>ü</span>', shown)


def test_the_terminal_names_the_parent_of_a_branch(run):
    done = view(run, "--step", "7", "--prompt", "id-0")
    assert done.returncode == 0, done.stderr
    assert [line.count("branch of #1 after turn 1") for line in done.stdout.split("id-0 #")[1:]] == [0, 0, 1]


def test_a_page_without_its_tokenizer_is_told_and_has_no_colours(run, tmp_path):
    shutil.rmtree(tmp_path / "model")
    done = view(run, "--html", tmp_path / "page.html", "--step", "7", "--prompt", "id-1")
    assert done.returncode == 0 and "tokens are not coloured" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--html", "x.html"], "none has no rollouts"),
        (["RUN", "--html", "x.html", "--step", "3"], "no rollouts of step 3; recorded: 1, 7"),
        (["RUN", "--html", "x.html", "--prompt", "no"], "no rollouts of prompt 'no'"),
        (["RUN", "--html", "/proc/no/x.html"], "--html: cannot write /proc/no"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, message):
    done = view(*[run if argument == "RUN" else argument for argument in arguments])
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (ROOT / "x.html").exists()


def test_steps_of_a_long_run_are_thinned_out_evenly():
    from a2tgpo.record.rollouts_page import chosen_steps, with_branches

    assert chosen_steps({1: 8, 2: 8, 3: 8}) == [1, 2, 3]
    chosen = chosen_steps(dict.fromkeys(range(1, 241), 1024))
    assert chosen == [1, 81, 160, 240]
    assert with_branches([{"inner_branches": [{"a": 1}, {"b": 2}]}, {"c": 3}])[1:] == [
        {"a": 1},
        {"b": 2},
        {"c": 3},
    ]
