"""The index on disk: equal to brute force, whole after any kill, and refused where it must be."""

import json
import shutil

import numpy as np
import pytest
from toy_tokenizer import byte_tokenizer
from toy_transformer import ToyTransformer

from steersman.core.errors import (
    Cancelled,
    InvalidInput,
    MissingDependency,
    MissingFile,
    UsageError,
)
from steersman.core.retrieval import (
    Bag,
    Document,
    Index,
    PromptReps,
    Representation,
    Representer,
    Searcher,
    WordPrompt,
    build_index,
    open_index,
    read_documents,
    search,
)
from steersman.core.retrieval.build import IndexWriter
from steersman.core.retrieval.manifest import read_manifest

pytest.importorskip("faiss")
VOCAB, WIDTH = 60, 8
PROMPT = WordPrompt(system="", text='{Kind}: "{text}"', answer='"')


def random_corpus(count, seed=0):
    """Documents with made-up representations: what an index must find is known exactly."""
    rng = np.random.default_rng(seed)
    documents, found = [], []
    for i in range(count):
        vector = rng.normal(size=WIDTH).astype(np.float32)
        tokens = np.sort(rng.choice(VOCAB, rng.integers(0, 12), replace=False)).astype(np.int32)
        sparse = Bag(tokens=tokens, impacts=rng.integers(1, 300, len(tokens)).astype(np.int32))
        vector /= np.linalg.norm(vector)
        documents.append(Document(docid=f"d{i}", text=f"text {i}", source=f"docs:{i + 1}"))
        found.append(Representation(dense=vector, sparse=sparse))
    return documents, found


def plain_settings(**more):
    settings = PromptReps(prompt=PROMPT).as_dict()
    return {**settings, "vocab_size": VOCAB, "width": WIDTH, **more}


def write(folder, documents, found, *, batch=7, job="one", **options):
    with IndexWriter(folder, plain_settings(), {}, job=job, **options) as writer:
        for at in range(0, len(documents), batch):
            writer.append(documents[at : at + batch], found[at : at + batch])
        writer.finish()
    return Index(folder)


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_search_equals_brute_force(tmp_path, batch):
    documents, found = random_corpus(50)
    index = write(tmp_path / "i", documents, found, batch=batch)
    assert len(index) == 50 and [index.docid(i) for i in range(50)] == [d.docid for d in documents]
    assert len(index.segments) <= 6
    for query in random_corpus(10, seed=9)[1]:
        sparse = {d.docid: query.sparse.dot(f.sparse) for d, f in zip(documents, found)}
        sparse = {docid: score for docid, score in sparse.items() if score}
        expected = sorted(sparse.items(), key=lambda pair: (-pair[1], pair[0]))
        assert list(index.sparse(query.sparse).items()) == expected
        assert list(index.sparse(query.sparse, 5).items())[:5] == expected[:5]
        dense = {d.docid: float(f.dense @ query.dense) for d, f in zip(documents, found)}
        best = sorted(dense.items(), key=lambda pair: -pair[1])[:10]
        mine = index.dense(query.dense, 10)
        assert list(mine) == [docid for docid, _ in best]
        assert list(mine.values()) == pytest.approx([s for _, s in best], abs=1e-6)
    assert index.text("d33") == "text 33"


def test_a_large_index_gets_a_graph_that_grows(tmp_path):
    documents, found = random_corpus(120)
    folder = tmp_path / "i"
    write(folder, documents[:80], found[:80], exact_below=60)
    assert read_manifest(folder).graph[1] == 80
    index = write(folder, documents[80:], found[80:], job="two", add=True, exact_below=60)
    assert index.manifest.graph[1] == 120
    assert len([p for p in folder.iterdir() if p.name.startswith("graph-")]) == 1
    right = 0
    for query in random_corpus(10, seed=9)[1]:
        dense = {d.docid: float(f.dense @ query.dense) for d, f in zip(documents, found)}
        best = sorted(dense, key=lambda docid: -dense[docid])[:10]
        right += len(set(best) & set(index.dense(query.dense, 10)))
    assert right >= 95  # of 100: approximate, yet breadth is 64 of 120
    # Documents behind the graph are searched exactly.
    new = [Document(docid="new", text="x")]
    write(folder, new, [found[0]], job="three", add=True, exact_below=10**6)
    assert "new" in Index(folder).dense(found[0].dense, 2)


def test_whatever_stops_a_write_the_index_is_whole(tmp_path, monkeypatch):
    """Fail at every single write to disk in turn, go on, and compare with an undisturbed build."""
    documents, found = random_corpus(6)
    expected = write(tmp_path / "whole", documents, found, batch=2)
    calls = {"left": 10**9}
    from steersman.core.retrieval import manifest, segments

    real_replace = manifest.Path.replace

    def spend():
        calls["left"] -= 1
        if calls["left"] < 0:
            raise KeyboardInterrupt

    def sync(file):
        spend()
        file.flush()

    def replace(self, target):
        spend()
        return real_replace(self, target)

    monkeypatch.setattr("os.fsync", lambda handle: None)
    monkeypatch.setattr(segments, "_sync", sync)
    monkeypatch.setattr(manifest.Path, "replace", replace)
    kill, finished = 0, False
    while not finished:
        folder = tmp_path / f"killed-{kill}"
        calls["left"] = kill
        try:
            write(folder, documents, found, batch=2)
            finished = True
        except KeyboardInterrupt:
            calls["left"] = 10**9
            with IndexWriter(folder, plain_settings(), {}, job="one") as writer:
                todo = [i for i, d in enumerate(documents) if d.docid not in writer.done]
                assert todo == list(range(len(writer.done), 6))
                for i in todo:
                    writer.append([documents[i]], [found[i]])
                writer.finish()
        index = Index(folder)
        assert index.complete
        for query in found[:2]:
            assert index.sparse(query.sparse) == expected.sparse(query.sparse)
            assert index.dense(query.dense) == pytest.approx(expected.dense(query.dense))
        assert [index.text(d.docid) for d in documents] == [d.text for d in documents]
        named = {name for name, _ in index.manifest.segments}
        assert {p.name for p in folder.iterdir() if p.name.startswith("segment-")} == named
        shutil.rmtree(folder)
        kill += 1
    assert kill > 20


# -- with a model ------------------------------------------------------------------------------

CORPUS = {
    "a": "fleas feed on blood",
    "b": "tax law of the land",
    "c": "a cat and its fleas",
    "d": "the",
    "e": "blood and iron",
}


def toy(seed=0):
    return ToyTransformer(tokenizer=byte_tokenizer(), context=400, seed=seed)


def settings(**more):
    return PromptReps(**{"prompt": PROMPT, "max_tokens": 24, **more})


def test_build_add_and_search(tmp_path):
    model = toy()
    folder = tmp_path / "i"
    first = dict(list(CORPUS.items())[:3])
    index = build_index(model, first, folder, settings=settings(), batch=2)
    assert len(index) == 3
    tokens = model.calls["tokens"]
    assert len(build_index(model, first, folder, settings=settings())) == 3
    assert model.calls["tokens"] == tokens  # done before: nothing is computed
    rest = {k: v for k, v in CORPUS.items() if k not in first}
    with pytest.raises(UsageError, match="--add"):
        build_index(model, rest, folder, settings=settings())
    index = build_index(model, rest, folder, settings=settings(), add=True)
    whole = build_index(model, CORPUS, tmp_path / "whole", settings=settings())
    for query in ("fleas", "iron law"):
        for mode in ("hybrid", "dense", "sparse"):
            mine = search(model, index, query, mode=mode)
            its = search(model, whole, query, mode=mode)
            assert [h.docid for h in mine] == [h.docid for h in its]
            assert [h.rank for h in mine] == list(range(1, len(mine) + 1))
            assert all(h.text == CORPUS[h.docid] for h in mine)
    with pytest.raises(InvalidInput, match=r"documents\[0\]: id 'a' is in the index already"):
        build_index(model, {"a": "new"}, folder, settings=settings(), add=True)
    # The refused job added nothing, so another one may take its place.
    assert len(build_index(model, {"f": "other"}, folder, settings=settings(), add=True)) == 6
    assert len(build_index(model, {"f": "x"}, folder, settings=settings(), overwrite=True)) == 1


def test_a_cancelled_build_goes_on_and_loses_nothing(tmp_path):
    model, folder = toy(), tmp_path / "i"
    polls = iter([False, False, True])
    with pytest.raises(Cancelled):
        build_index(
            model, CORPUS, folder, settings=settings(), rows=1, batch=1,
            cancelled=lambda: next(polls),
        )  # fmt: skip
    assert read_manifest(folder).documents == 2
    assert len(search(model, folder, "fleas")) == 2 and not open_index(folder).complete
    with pytest.raises(UsageError, match="unfinished job"):
        build_index(model, {"f": "other"}, folder, settings=settings(), add=True)
    before = model.calls["tokens"]
    index = build_index(model, CORPUS, folder, settings=settings(), rows=1, batch=1)
    whole = toy()
    expected = build_index(whole, CORPUS, tmp_path / "whole", settings=settings(), rows=1)
    assert model.calls["tokens"] - before < whole.calls["tokens"]
    assert [index.docid(i) for i in range(5)] == list(CORPUS)
    hits = [[h.docid for h in search(model, i, "fleas")] for i in (index, expected)]
    assert hits[0] == hits[1]


def test_another_model_template_or_setting_is_refused(tmp_path):
    model, folder = toy(), tmp_path / "i"
    build_index(model, CORPUS, folder, settings=settings())
    other = toy()
    other.info = type(other.info)(**{**vars(other.info), "fingerprint": "abc"})
    with pytest.raises(InvalidInput, match=r"weights was .* and is now 'abc'"):
        search(other, folder, "fleas")
    changed = toy()
    changed.tokenizer.chat_template += "!"
    with pytest.raises(InvalidInput, match="template was"):
        search(changed, folder, "fleas")
    with pytest.raises(InvalidInput, match="max_tokens was 24 and is now 25"):
        build_index(model, {"x": "y"}, folder, settings=settings(max_tokens=25), add=True)
    engine = toy()
    engine.info = type(engine.info)(**{**vars(engine.info), "dtype": "float16"})
    with Searcher(engine, folder) as searcher:
        assert "dtype was" in searcher.engine_differs


def test_modes_edges_and_removal_of_the_query(tmp_path):
    model, folder = toy(), tmp_path / "i"
    index = build_index(model, CORPUS, folder, settings=settings(dense=False))
    with pytest.raises(UsageError, match="sparse"):
        search(model, index, "x", mode="dense")
    assert search(model, index, "fleas") == search(model, index, "fleas", mode="sparse")
    with Searcher(model, index, remove_query=True) as searcher:
        hits = searcher.search([("a", "fleas"), ("zz", "fleas")], k=9)
    assert [h.docid for h in hits[1] if h.docid != "a"] == [h.docid for h in hits[0]]
    for bad in ({"mode": "x"}, {"depth": 0}, {"alpha": 2}):
        with pytest.raises(UsageError):
            Searcher(model, index, **bad)
    empty = build_index(model, {}, tmp_path / "empty", settings=settings())
    assert search(model, empty, "fleas") == []


def test_damage_is_told_in_one_line(tmp_path):
    model, folder = toy(), tmp_path / "i"
    with pytest.raises(MissingFile, match="no such folder"):
        open_index(folder)
    index = build_index(model, CORPUS, folder, settings=settings())
    segment = index.segments[0].folder
    (segment / "dense.npy").write_bytes(b"nonsense")
    with pytest.raises(InvalidInput, match="dense.npy: damaged"):
        search(model, folder, "fleas")
    (segment / "places.npy").unlink()
    with pytest.raises(InvalidInput, match="places.npy"):
        search(model, folder, "fleas", mode="sparse")
    text = (folder / "index.json").read_text()
    for bad, told in (
        ("{", "index.json"),
        (text.replace("v1", "v9"), "format"),
        (text.replace("segment-", "../segment-"), "not the name of a file"),
    ):
        (folder / "index.json").write_text(bad)
        with pytest.raises(InvalidInput, match=told):
            open_index(folder)
    with pytest.raises(UsageError, match="neither empty nor an index"):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "letter.txt").write_text("dear")
        build_index(model, CORPUS, tmp_path / "mine", settings=settings(), overwrite=True)


def test_a_second_writer_is_refused(tmp_path):
    with (
        IndexWriter(tmp_path / "i", plain_settings(), {}, job="one"),
        pytest.raises(UsageError, match="another process"),
    ):
        IndexWriter(tmp_path / "i", plain_settings(), {}, job="one")


def test_without_the_library_one_line_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependency, match=r"steersman\[search\]"):
        build_index(toy(), CORPUS, tmp_path / "i", settings=settings())
    build_index(toy(), CORPUS, tmp_path / "j", settings=settings(dense=False))


# -- reading -------------------------------------------------------------------------------------


def read(*lines):
    problems = []
    found = list(read_documents([line.encode() for line in lines], "docs", report=problems.append))
    return [(d.docid, d.text, d.source) for d in found], [str(p) for p in problems]


def test_documents_of_json_lines_and_tables():
    found, problems = read(
        json.dumps({"_id": 1, "title": "Fleas", "text": "feed"}),
        json.dumps({"docid": "x", "contents": "law"}),
        "",
        "{broken",
        json.dumps({"id": "y", "text": "  "}),
        json.dumps({"text": "no id"}),
        json.dumps({"id": "z", "text": "\ud800"}),
        json.dumps({"id": "w", "title": 3, "text": "a"}),
    )
    assert found == [("1", "Fleas feed", "docs:1"), ("x", "law", "docs:2")]
    assert [p.partition(": ")[0] for p in problems] == [f"docs:{i}" for i in (4, 5, 6, 7, 8)]
    assert read("1\tfleas", "2\tTitle\ttext", "alone")[0] == [
        ("1", "fleas", "docs:1"), ("2", "Title text", "docs:2"),
    ]  # fmt: skip


def test_repeated_ids_name_both_lines(tmp_path):
    from steersman.core.retrieval import build

    documents = list(read_documents([b"a\tfleas\n", b"b\tlaw\n", b"a\tagain\n"], "docs"))
    problems = []
    with Representer(toy(), settings()) as representer:
        built = build(representer, documents, tmp_path / "i", job="j", report=problems.append)
    assert (built.added, built.documents) == (2, 2)
    assert str(problems[0]) == ("docs:3: id 'a' was used at docs:1; give each document its own")
