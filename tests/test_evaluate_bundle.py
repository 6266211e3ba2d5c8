"""A bundle is the same bytes each time, and whatever is changed in it is named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from command_line import call
from sotopia_rl.errors import DataError
from sotopia_rl.evaluate.bundle import verify_bundle


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "run"
    systems = ["--system", "tough=scripted/tough", "--system", "fair=scripted/fair", "--repeat-judge", 2]
    panel = ["--partner", "scripted/fair", "--judge", "scripted/judge", "--output", folder]
    assert call("evaluate", "play", "--manifest", "sandbox-held-out", "--count", 8, *systems, *panel) == 0
    return folder


@pytest.fixture(scope="module")
def packed(run: Path) -> Path:
    assert call("evaluate", "bundle", run, "--output", run.parent / "b.zip") == 0
    return run.parent / "b.zip"


def changed(source: Path, target: Path, name: str, data: bytes | None, *, cover_up: bool = False) -> Path:
    """A copy with one file changed (None: left out), its hash in bundle.json rewritten if `cover_up`."""
    with zipfile.ZipFile(source) as archive:
        files = {n: archive.read(n) for n in archive.namelist()}
    files.pop(name, None)
    if data is not None:
        files[name] = data
    if cover_up and data is not None:
        listing = json.loads(files["bundle.json"])
        listing["files"][name] = hashlib.sha256(data).hexdigest()
        files["bundle.json"] = json.dumps(listing).encode()
    with zipfile.ZipFile(target, "w") as archive:
        for n, content in files.items():
            archive.writestr(n, content)
    return target


def content(bundle: Path, name: str) -> bytes:
    with zipfile.ZipFile(bundle) as archive:
        return archive.read(name)


def test_a_bundle_holds_what_it_states(packed, run, capsys):
    assert call("evaluate", "verify", packed) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "follow from the episodes" in said
    assert "is not shown by it" in said
    assert call("evaluate", "bundle", run, "--output", run.parent / "again.zip") == 0
    assert (run.parent / "again.zip").read_bytes() == packed.read_bytes()


def test_a_changed_number_is_named_even_when_its_hash_was_rewritten(packed, tmp_path, capsys):
    results = json.loads(content(packed, "results.json"))
    place = next(i for i, row in enumerate(results["rows"]) if row["metric"] == "goal")
    results["rows"][place]["difference"] += 0.25
    forged = changed(packed, tmp_path / "f.zip", "results.json", json.dumps(results).encode(), cover_up=True)
    assert call("evaluate", "verify", forged) == 1
    error = capsys.readouterr().err
    assert "differs  results.json: fair - tough, sampled, goal.difference states" in error
    assert "1 of its statements do not hold" in error


def test_a_changed_score_shows_in_its_hash_and_in_every_number_that_rests_on_it(packed, tmp_path):
    lines = content(packed, "episodes/fair.jsonl").decode().splitlines()
    at = next(i for i, line in enumerate(lines) if '"kind": "rating"' in line)
    record = json.loads(lines[at])
    for seat in (0, 1):
        goal = record["record"]["scores"][seat]["goal"]
        goal["score"] = 3.0 if goal["score"] != 3 else 4.0
    lines[at] = json.dumps(record)
    forged = changed(packed, tmp_path / "f.zip", "episodes/fair.jsonl", ("\n".join(lines) + "\n").encode())
    problems = verify_bundle(forged).problems
    assert problems[0].startswith("episodes/fair.jsonl: its SHA-256 is")
    assert any("fair - tough, sampled, goal.mean_a states" in problem for problem in problems)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("report.md", b"# We won", "report.md: its SHA-256 is"),
        ("report.md", None, "report.md: missing"),
        ("extra.txt", b"x", "extra.txt: not listed in bundle.json"),
        ("episodes/fair.jsonl", None, "episodes/fair.jsonl: missing"),
    ],
)
def test_files_that_are_changed_missing_or_added_are_named(packed, tmp_path, name, data, message):
    assert any(
        problem.startswith(message)
        for problem in verify_bundle(changed(packed, tmp_path / "f.zip", name, data)).problems
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"tough": "scripted/tough"',
            '"tough": "openai/gpt-4o"',
            "evaluation.json: states that tough is openai/gpt-4o, its episodes were played by scripted/tough",
        ),
        (
            '"temperature": 0.7',
            '"temperature": 0.1',
            "evaluation.json: 8 of 8 episodes of tough were played with another",
        ),
    ],
)
def test_systems_and_settings_that_the_episodes_contradict_are_named(packed, tmp_path, old, new, message):
    text = content(packed, "evaluation.json").decode()
    assert old in text
    data = text.replace(old, new, 1).encode()
    forged = changed(packed, tmp_path / "f.zip", "evaluation.json", data, cover_up=True)
    assert verify_bundle(forged).problems[0].startswith(message)


def test_a_deleted_row_is_named_and_nothing_else_differs(packed, tmp_path):
    results = json.loads(content(packed, "results.json"))
    del results["rows"][1]
    data = json.dumps(results).encode()
    problems = verify_bundle(changed(packed, tmp_path / "f.zip", "results.json", data, cover_up=True)).problems
    assert problems == ["results.json: rows: 1 missing that the episodes give: fair - tough, sampled, relationship"]


def test_added_and_doubled_rows_are_named_and_another_order_is_not(packed, tmp_path):
    results = json.loads(content(packed, "results.json"))
    rows = results["rows"]
    results["rows"] = [*reversed(rows), rows[0], rows[0] | {"metric": "charm"}]
    data = json.dumps(results).encode()
    problems = verify_bundle(changed(packed, tmp_path / "f.zip", "results.json", data, cover_up=True)).problems
    assert problems == [
        "results.json: rows: 1 that the episodes do not give: fair - tough, sampled, charm",
        "results.json: rows: 1 more than once: fair - tough, sampled, goal",
    ]


def record_lines(bundle: Path, kind: str) -> tuple[list[str], int]:
    """The lines of one system, and the place of its first record of a kind."""
    lines = content(bundle, "episodes/fair.jsonl").decode().splitlines()
    return lines, next(i for i, line in enumerate(lines) if f'"kind": "{kind}"' in line)


@pytest.mark.parametrize(("kind", "cause"), [("episode", "not played"), ("rating", "not judged")])
def test_a_missing_record_is_named_first(packed, tmp_path, capsys, kind, cause):
    lines, at = record_lines(packed, kind)
    record = json.loads(lines[at])["record"]
    data = ("\n".join([*lines[:at], *lines[at + 1 :]]) + "\n").encode()
    forged = changed(packed, tmp_path / "f.zip", "episodes/fair.jsonl", data, cover_up=True)
    problems = verify_bundle(forged).problems
    assert problems[0].startswith(f"episodes/fair.jsonl: sampled, {cause}: 1, results.json states 0: match ")
    if kind == "episode":
        assert record["match"]["id"] in problems[0]
    assert "results.json: lengths, fair, sampled, goal.points states 8 entries, the episodes give 7" in problems
    assert call("evaluate", "verify", forged) == 1
    shown = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("differs") for line in shown) <= 21


@pytest.mark.parametrize("kind", ["episode", "rating"])
def test_a_record_that_stands_there_twice_is_named(packed, tmp_path, kind):
    lines, at = record_lines(packed, kind)
    record = json.loads(lines[at])["record"]
    data = ("\n".join([*lines, lines[at]]) + "\n").encode()
    forged = changed(packed, tmp_path / "f.zip", "episodes/fair.jsonl", data, cover_up=True)
    (problem,) = verify_bundle(forged).problems
    assert record.get("id", record.get("episode_id")) in problem
    assert problem.endswith("stands in it 2 times")


def test_another_manifest_is_noticed(packed, tmp_path):
    manifest = json.loads(content(packed, "manifest.json"))
    del manifest["sha256"]
    manifest["matches"][0]["seed"] += 1
    forged = changed(packed, tmp_path / "f.zip", "manifest.json", json.dumps(manifest).encode(), cover_up=True)
    assert any("the matches hash to" in problem for problem in verify_bundle(forged).problems)


def test_a_signature_fits_its_key_and_no_other(run, tmp_path, monkeypatch, capsys):
    assert call("evaluate", "bundle", run, "--output", tmp_path / "s.zip", "--sign") == 2
    assert "SOTOPIA_RL_BUNDLE_KEY" in capsys.readouterr().err
    monkeypatch.setenv("SOTOPIA_RL_BUNDLE_KEY", "correct horse")
    assert call("evaluate", "bundle", run, "--output", tmp_path / "s.zip", "--sign") == 0
    assert "the signature with key" in verify_bundle(tmp_path / "s.zip").notes[0]
    report = b"# We won"
    forged = changed(tmp_path / "s.zip", tmp_path / "f.zip", "report.md", report, cover_up=True)
    assert verify_bundle(forged).problems == ["signature: does not fit bundle.json"]
    monkeypatch.setenv("SOTOPIA_RL_BUNDLE_KEY", "wrong horse")
    assert "signature: made with key" in verify_bundle(tmp_path / "s.zip").problems[0]
    monkeypatch.delenv("SOTOPIA_RL_BUNDLE_KEY")
    verdict = verify_bundle(tmp_path / "s.zip")
    assert verdict.holds
    assert "not checked" in verdict.notes[0]
    assert b"horse" not in (tmp_path / "s.zip").read_bytes()


def test_results_that_do_not_follow_from_the_episodes_are_not_packed(run, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(run, tmp_path / "run")
    results = json.loads((copy / "results.json").read_text())
    results["rows"][0]["mean_a"] = 9.9
    (copy / "results.json").write_text(json.dumps(results))
    assert call("evaluate", "bundle", copy, "--output", tmp_path / "b.zip") == 1
    assert "results.json is not what its episodes give" in capsys.readouterr().err
    assert not (tmp_path / "b.zip").exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 torn", b"no zip at all"])
def test_a_file_that_is_no_zip_is_refused(tmp_path, data):
    path = tmp_path / "x.zip"
    path.write_bytes(data)
    with pytest.raises(DataError, match="not a whole"):
        verify_bundle(path)


def test_damaged_bytes_are_never_more_than_an_error_of_ours(packed, tmp_path):
    import random

    data, rng = packed.read_bytes(), random.Random(1)
    path = tmp_path / "damaged.zip"
    for round_ in range(40):
        damaged = bytearray(data if round_ % 2 else data[: rng.randrange(len(data))])
        for _ in range(3):
            if damaged:
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            verify_bundle(path)


def test_text_that_is_no_utf8_is_named(packed, tmp_path):
    for name in ("results.json", "evaluation.json", "manifest.json", "episodes/fair.jsonl"):
        verdict = verify_bundle(changed(packed, tmp_path / "x.zip", name, b"\xff\xfe{", cover_up=True))
        assert verdict.problems
        assert all("\n" not in problem for problem in verdict.problems)


def test_a_zip_that_is_no_bundle_is_refused(packed, tmp_path):
    with pytest.raises(DataError, match=r"bundle\.json is missing"):
        verify_bundle(changed(packed, tmp_path / "x.zip", "bundle.json", None))
    with pytest.raises(DataError, match=r"bundle\.json:"):
        verify_bundle(changed(packed, tmp_path / "x.zip", "bundle.json", b'{"files": 3}'))


def test_a_matrix_is_bundled_and_verified_too(tmp_path, capsys):
    world = ["--manifest", "sandbox-held-out", "--count", 6, "--judge", "scripted/judge"]
    systems = ["--system", "tough=scripted/tough", "--system", "fair=scripted/fair"]
    assert call("evaluate", "matrix", *world, *systems, "--output", tmp_path / "run") == 0
    assert call("evaluate", "bundle", tmp_path / "run", "--output", tmp_path / "m.zip") == 0
    assert call("evaluate", "verify", tmp_path / "m.zip") == 0
    matrix = json.loads(content(tmp_path / "m.zip", "matrix.json"))
    matrix["meetings"][0]["won"] += 1
    forged = changed(tmp_path / "m.zip", tmp_path / "f.zip", "matrix.json", json.dumps(matrix).encode(), cover_up=True)
    assert call("evaluate", "verify", forged) == 1
    assert "matrix.json: tough - fair.won states" in capsys.readouterr().err
    lines = content(tmp_path / "m.zip", "episodes/matrix.jsonl").decode().splitlines()
    at = next(i for i, line in enumerate(lines) if '"kind": "episode"' in line)
    episode = json.loads(lines.pop(at))["record"]
    data = ("\n".join(lines) + "\n").encode()
    forged = changed(tmp_path / "m.zip", tmp_path / "d.zip", "episodes/matrix.jsonl", data, cover_up=True)
    first = episode["agents"][0]["model"].removeprefix("scripted/")
    assert verify_bundle(forged).problems[0] == (
        "episodes/matrix.jsonl: tough - fair, not played: 1, matrix.json states 0: "
        f"match {episode['match']['id']} with {first} in the first seat"
    )
    renamed = content(tmp_path / "m.zip", "evaluation.json").replace(b"scripted/tough", b"scripted/rude")
    forged = changed(tmp_path / "m.zip", tmp_path / "g.zip", "evaluation.json", renamed, cover_up=True)
    assert verify_bundle(forged).problems[0].startswith("evaluation.json: states the systems scripted/fair, scripted/r")
