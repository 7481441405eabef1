"""Test collections in ``shared/data`` as queries, documents and judgements."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steersman.core.decode.rng import Rng
from steersman.core.reranking.io import with_title
from steersman.core.reranking.trec import read_qrels, read_texts
from steersman.core.text_lines import open_text

Qrels = dict[str, dict[str, int]]
Hits = list[tuple[str, float]]


def data_folder() -> Path:
    """Return the folder of evaluation data: ``STEERSMAN_DATA``, or ``../shared/data``."""
    here = Path(__file__).resolve().parent.parent
    return Path(os.environ.get("STEERSMAN_DATA", here.parent / "shared" / "data"))


@dataclass(frozen=True)
class Collection:
    """Queries, documents and judgements, each by its id."""

    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: Qrels

    def judged(self) -> dict[str, str]:
        """Return the queries with a relevant document."""
        return {q: text for q, text in self.queries.items() if any(self.qrels.get(q, {}).values())}


def split(collection: Collection, part: str) -> Collection:
    """Return the judged queries of one fixed random half: "train" or "held-out"."""
    names = sorted(collection.judged())
    order = np.argsort(Rng(7).uniforms(0, 0, len(names)), kind="stable")
    half = len(names) // 2
    chosen = order[:half] if part == "train" else order[half:]
    queries = {names[int(i)]: collection.queries[names[int(i)]] for i in chosen}
    return Collection(queries, collection.corpus, {q: collection.qrels[q] for q in queries})


def dl19(data: Path) -> tuple[dict[str, str], dict[str, list[tuple[str, float, str]]], Qrels]:
    """TREC DL 2019 passages: 43 queries, their BM25 hits (id, score, text), graded judgements."""
    folder = data / "trec_dl"
    rows = json.loads((folder / "BM25" / "retrieve_results_dl19.json").read_text())
    queries = {str(row["hits"][0]["qid"]): row["query"] for row in rows}
    hits = {
        str(row["hits"][0]["qid"]): [
            (str(h["docid"]), float(h["score"]), h["content"]) for h in row["hits"]
        ]
        for row in rows
    }
    return queries, hits, read_qrels(folder / "qrels.dl19-passage.txt")


def _scifact_corpus(data: Path) -> dict[str, str]:
    corpus: dict[str, str] = {}
    with zipfile.ZipFile(data / "scifact" / "scifact.zip") as archive:
        text = archive.read("corpus_train.csv").decode()
    for row in csv.DictReader(io.StringIO(text)):
        # The abstract is printed as an array of quoted sentences without commas.
        quoted = re.findall(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", row["abstract"], re.DOTALL)
        abstract = " ".join(ast.literal_eval(item) for item in quoted)
        corpus[row["doc_id"]] = with_title(row["title"], abstract)
    return corpus


def scifact(data: Path) -> Collection:
    """SciFact as in BEIR: 300 test claims over 5,183 abstracts."""
    folder = data / "scifact"
    return Collection(
        read_texts(folder / "topics.beir-v1.0.0-scifact.test.tsv.gz"),
        _scifact_corpus(data),
        read_qrels(folder / "qrels.beir-v1.0.0-scifact.test.txt"),
    )


def scifact_train(data: Path) -> Collection:
    """SciFact's training claims that have evidence; none of them is a test claim."""
    with zipfile.ZipFile(data / "scifact" / "scifact.zip") as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read("claims_train.csv").decode())))
    tested = set(read_texts(data / "scifact" / "topics.beir-v1.0.0-scifact.test.tsv.gz").values())
    queries: dict[str, str] = {}
    qrels: Qrels = {}
    for row in rows:
        if row["evidence_doc_id"] and row["claim"] not in tested:
            queries[row["id"]] = row["claim"]
            qrels.setdefault(row["id"], {})[row["evidence_doc_id"]] = 1
    return Collection(queries, _scifact_corpus(data), qrels)


def cranfield(data: Path) -> Collection:
    """Cranfield: 225 queries over 1,400 abstracts.

    Codes 1 (complete answer) to 4 (minimum interest) become gains 4 to 1. Code -1 marks the
    document a query was made from, or an uncertain one: those judgements are dropped.
    """
    folder = data / "cranfield"
    # The judgements number the queries by their place, not by the numbers in the file.
    queries = {
        str(place): part["W"]
        for place, (_, part) in enumerate(_smart(folder / "cran.qry"), start=1)
    }
    qrels: Qrels = {}
    with open_text(folder / "cranqrel") as file:
        for line in file:
            fields = line.split()
            if len(fields) != 3:
                continue
            qid, docid, code = fields[0].decode(), fields[1].decode(), int(fields[2])
            if code > 0:
                qrels.setdefault(qid, {})[docid] = 5 - code
    return Collection(queries, _abstracts(folder / "cran.all.1400"), qrels)


def cisi(data: Path) -> Collection:
    """CISI: 112 queries (76 judged) over 1,460 abstracts, binary judgements."""
    folder = data / "cisi"
    queries = {key: part["W"] for key, part in _smart(folder / "CISI.QRY")}
    qrels: Qrels = {}
    with open_text(folder / "CISI.REL") as file:
        for line in file:
            fields = line.split()
            if len(fields) >= 2:
                qrels.setdefault(fields[0].decode(), {})[fields[1].decode()] = 1
    return Collection(queries, _abstracts(folder / "CISI.ALL"), qrels)


def xquad(data: Path) -> Collection:
    """XQuAD's English questions: 1,190 over 240 paragraphs of Wikipedia, one relevant each."""
    loaded = json.loads((data / "xquad" / "xquad.en.json").read_text())
    queries: dict[str, str] = {}
    corpus: dict[str, str] = {}
    qrels: Qrels = {}
    for article in loaded["data"]:
        for paragraph in article["paragraphs"]:
            docid = str(len(corpus))
            corpus[docid] = paragraph["context"]
            for asked in paragraph["qas"]:
                queries[asked["id"]] = asked["question"]
                qrels[asked["id"]] = {docid: 1}
    return Collection(queries, corpus, qrels)


def _abstracts(path: Path) -> dict[str, str]:
    return {key: with_title(part.get("T", ""), part.get("W", "")) for key, part in _smart(path)}


def _smart(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Read a SMART file: ``.I id``, then fields ``.T``, ``.A``, ``.B``, ``.W``, ``.X``."""
    key, field, part = "", "", dict[str, list[str]]()
    for line in [*path.read_text(encoding="latin-1").splitlines(), ".I end"]:
        if line.startswith(".I "):
            if key:
                yield key, {name: " ".join(" ".join(rows).split()) for name, rows in part.items()}
            key, field, part = line[3:].strip(), "", {}
        elif re.fullmatch(r"\.[TABWX]\s*", line):
            field = line[1]
            part.setdefault(field, [])
        elif field:
            part[field].append(line)


def bm25(queries: Sequence[str], corpus: dict[str, str], depth: int) -> list[Hits]:
    """Retrieve with bm25s as it comes: Lucene's formula, k1 1.5, b 0.75, English stop words."""
    import bm25s

    ids = list(corpus)
    index = bm25s.BM25()
    quiet: dict[str, Any] = {"show_progress": False}
    index.index(bm25s.tokenize(list(corpus.values()), stopwords="en", **quiet), **quiet)
    asked = bm25s.tokenize(list(queries), stopwords="en", **quiet)
    places, scores = index.retrieve(asked, k=min(depth, len(ids)), **quiet)
    return [
        [(ids[int(p)], float(s)) for p, s in zip(row, row_scores)]
        for row, row_scores in zip(places, scores)
    ]
