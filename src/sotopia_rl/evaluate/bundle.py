"""A results bundle: everything a claim rests on in one `.zip`, and the check that the claim follows from it.

    bundle.json        the other files with their SHA-256       signature.json   HMAC over bundle.json, optional
    manifest.json      the matches       evaluation.json        who played, who judged, under which settings
    episodes/NAME.jsonl, episodes/NAME.again2.jsonl             conversations, ratings, failures
    results.json       every number      report.html, report.md (of a matrix: matrix.json, matrix.html, matrix.md)

What a check proves: no file was changed since the bundle was made (the hashes, against somebody who cannot also change
bundle.json; the signature, against everybody without the key), and every number of results.json follows from the
episodes and ratings inside (`claims.py`). It does not prove that the models named in them said these things.

Files are never unpacked by the names in the archive.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from sotopia_rl import __version__
from sotopia_rl.episode import Record
from sotopia_rl.errors import ConfigError, DataError, EvaluationError, SotopiaRLError
from sotopia_rl.evaluate.claims import count_values, other_players, recomputed, repeated_records
from sotopia_rl.evaluate.folder import Plan, load_plan, store_path
from sotopia_rl.evaluate.matrix import STORE
from sotopia_rl.manifest import load_manifest
from sotopia_rl.store import open_store
from sotopia_rl.store.jsonl import JsonlWriter
from sotopia_rl.store.transfer import export_jsonl, import_jsonl

KEY = "SOTOPIA_RL_BUNDLE_KEY"
"""Environment variable that holds the key of the signature."""
MAX_BYTES = 4 * 2**30
"""Of all files of a bundle, unpacked."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_ALWAYS = ("manifest.json", "evaluation.json")
_PAGES = ("report.html", "report.md", "matrix.html", "matrix.md")


class Contents(Record):
    """`bundle.json`."""

    format: int = 1
    package_version: str
    manifest_sha256: str
    files: dict[str, str]
    """SHA-256 by name."""


class Signature(Record):
    """`signature.json`."""

    method: str = "hmac-sha256"
    key_id: str
    """First 16 hex digits of the SHA-256 of the key, to tell keys apart."""
    value: str


@dataclass
class Verdict:
    """What a check found."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_files: int = 0
    num_numbers: int = 0

    @property
    def holds(self) -> bool:
        return not self.problems


def write_bundle(folder: Path, output: Path, *, sign: bool = False) -> Contents:
    """Pack the folder of an evaluation. The same folder gives the same bytes.

    Args:
        sign: Add a signature with the key in the environment.

    Raises:
        ConfigError: It is to be signed and there is no key.
        DataError: The folder holds no finished evaluation, or the file cannot be written.
        EvaluationError: Its results do not follow from its episodes; compare again first.
    """
    key = _key(needed=True) if sign else None
    plan = load_plan(folder)
    if others := other_players(folder, plan):
        raise EvaluationError(f"{folder}: {others[0]}")
    stated, differing = recomputed(folder, plan)
    if differing:
        raise EvaluationError(
            f"{folder}: {_claim(plan)} is not what its episodes give ({differing[0]}); compute it again"
        )
    with tempfile.TemporaryDirectory() as scratch:
        files = _gathered(folder, plan, Path(scratch))
        hashes = {name: _sha256(path) for name, path in sorted(files.items())}
        contents = Contents(package_version=__version__, manifest_sha256=stated.manifest_sha256, files=hashes)
        listing = (contents.model_dump_json(indent=1) + "\n").encode()
        part = output.with_name(output.name + ".part")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
                _put(archive, "bundle.json", listing)
                if key is not None:
                    _put(archive, "signature.json", (_signed(listing, key).model_dump_json(indent=1) + "\n").encode())
                for name, path in sorted(files.items()):
                    _put(archive, name, path.read_bytes())
            part.replace(output)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise DataError(f"{output}: cannot be written ({error.strerror})") from error
    return contents


def _claim(plan: Plan) -> str:
    """The file whose numbers are claimed."""
    return "results.json" if plan.partners else "matrix.json"


def _stores(plan: Plan) -> list[str]:
    """File names of the stores that the numbers rest on."""
    if not plan.partners:
        return [STORE]
    return [store_path(Path(), system, again).name for system in plan.systems for again in plan.rounds]


def _gathered(folder: Path, plan: Plan, scratch: Path) -> dict[str, Path]:
    files = {name: folder / name for name in (*_ALWAYS, _claim(plan), *_PAGES) if (folder / name).is_file()}
    for name in _stores(plan):
        if (folder / name).is_file():
            lines = (scratch / name).with_suffix(".jsonl")
            with closing(open_store(folder / name, create=False)) as store:
                export_jsonl(store, lines)
                if not store.count():  # ratings without their episodes, which an export leaves out
                    _append_ratings(store.ratings(), lines)
            files[f"episodes/{lines.name}"] = lines
    return files


def _append_ratings(ratings: Iterator[Record], path: Path) -> None:
    with JsonlWriter(path) as writer:
        for rating in ratings:
            writer.write(rating)


def _put(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name, date_time=_EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(info, data)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(*, needed: bool) -> bytes | None:
    text = os.environ.get(KEY, "")
    if not text and needed:
        raise ConfigError(f"a signature needs a key; set {KEY} in the environment")
    return text.encode() or None


def _key_id(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()[:16]


def _signed(listing: bytes, key: bytes) -> Signature:
    return Signature(key_id=_key_id(key), value=hmac.new(key, listing, hashlib.sha256).hexdigest())


# --- checking ------------------------------------------------------------------------------------------------------


def verify_bundle(path: Path) -> Verdict:
    """Recompute every hash, and every number of results.json from the episodes.

    Raises:
        DataError: The file is no bundle.
    """
    verdict = Verdict()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            with zipfile.ZipFile(path) as archive:
                contents = _opened(archive, path, verdict)
                _unpack(archive, contents, folder, verdict)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise DataError(f"{path}: not a whole .zip ({error})") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        verdict.num_files = len(contents.files)
        _check_numbers(folder, contents, verdict)
    return verdict


def _opened(archive: zipfile.ZipFile, path: Path, verdict: Verdict) -> Contents:
    """The listing, with the signature and the list of files checked."""
    names = archive.namelist()
    if "bundle.json" not in names:
        raise DataError(f"{path}: no results bundle: bundle.json is missing")
    if len(set(names)) < len(names):
        raise DataError(f"{path}: a file stands in it twice")
    if (size := sum(info.file_size for info in archive.infolist())) > MAX_BYTES:
        raise DataError(f"{path}: would unpack to {size / 2**30:.1f} GB; a bundle has {MAX_BYTES // 2**30} at most")
    listing = archive.read("bundle.json")
    try:
        contents = Contents.model_validate_json(listing)
    except ValidationError as error:
        raise DataError(f"{path}: bundle.json: {error.errors()[0]['msg']}") from error
    if lacking := [name for name in _ALWAYS if name not in contents.files]:
        raise DataError(f"{path}: bundle.json lists no {', '.join(lacking)}")
    known = {"bundle.json", "signature.json", *contents.files}
    verdict.problems += [f"{name}: not listed in bundle.json" for name in names if name not in known]
    verdict.problems += [f"{name}: missing" for name in contents.files if name not in names]
    if "signature.json" in names:
        _check_signature(archive.read("signature.json"), listing, verdict)
    else:
        verdict.notes.append("not signed: the hashes show accidents, not a forger who also rewrote bundle.json")
    return contents


def _check_signature(data: bytes, listing: bytes, verdict: Verdict) -> None:
    try:
        signature = Signature.model_validate_json(data)
    except ValidationError as error:
        verdict.problems.append(f"signature.json: {error.errors()[0]['msg']}")
        return
    key = _key(needed=False)
    if key is None:
        verdict.notes.append(f"signed with key {signature.key_id}, not checked: set {KEY}")
    elif signature.key_id != _key_id(key):
        verdict.problems.append(f"signature: made with key {signature.key_id}, and {KEY} holds {_key_id(key)}")
    elif not hmac.compare_digest(_signed(listing, key).value, signature.value):
        verdict.problems.append("signature: does not fit bundle.json")
    else:
        verdict.notes.append(f"the signature with key {signature.key_id} fits")


def _unpack(archive: zipfile.ZipFile, contents: Contents, folder: Path, verdict: Verdict) -> None:
    """Hash every listed file, and lay out what the numbers are recomputed from, under names of our own."""
    names = set(archive.namelist())
    wanted = {name: folder / name for name in (*_ALWAYS, "results.json", "matrix.json")}
    if "evaluation.json" in names:
        try:
            plan = Plan.model_validate_json(archive.read("evaluation.json"))
        except ValidationError as error:
            verdict.problems.append(f"evaluation.json: {error.errors()[0]['msg']}")
        else:
            places = ((folder / name).with_suffix(".jsonl") for name in _stores(plan))
            wanted |= {f"episodes/{place.name}": place for place in places}
    for name, stated in contents.files.items():
        if name not in names:
            continue
        data = archive.read(name)
        if (found := hashlib.sha256(data).hexdigest()) != stated:
            verdict.problems.append(f"{name}: its SHA-256 is {found[:12]}, bundle.json states {stated[:12]}")
        if name in wanted:
            wanted[name].write_bytes(data)


def _check_numbers(folder: Path, contents: Contents, verdict: Verdict) -> None:
    try:
        plan, manifest = load_plan(folder), load_manifest(folder / "manifest.json")
        for lines in sorted(folder.glob("*.jsonl")):
            verdict.problems += repeated_records(lines, f"episodes/{lines.name}")
            with closing(open_store(lines.with_suffix(".db"))) as store:
                import_jsonl(lines, store)
        verdict.problems += other_players(folder, plan)
        stated, differing = recomputed(folder, plan)
        for label, found in (("bundle.json", contents.manifest_sha256), (_claim(plan), stated.manifest_sha256)):
            if found != manifest.sha256:
                verdict.problems.append(
                    f"{label}: states manifest {found[:12]}, the matches hash to {manifest.sha256[:12]}"
                )
        verdict.num_numbers = count_values(stated.model_dump(mode="json"))
        verdict.problems += differing
    except SotopiaRLError as error:
        verdict.problems.append(str(error).replace(f"{folder}/", ""))
