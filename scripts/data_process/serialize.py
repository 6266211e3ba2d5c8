"""Episodes from Redis to the JSONL that the other scripts read, by tag or by primary key.

    python serialize.py --tag my_self_play --output_file my_self_play.jsonl
    python serialize.py --pk 01H5... 01H6... --output_file two.jsonl

The database is the one in REDIS_OM_URL, or any store of sotopia-rl given with --store.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from sotopia_rl.errors import SotopiaRLError
from sotopia_rl.store import EpisodeQuery, EpisodeStore, TransferReport, export_file, open_store


def chosen(source: EpisodeStore, keys: list[str], folder: Path) -> EpisodeStore:
    """A store of these episodes alone."""
    target = open_store(folder / "chosen.db")
    for key in keys:
        target.add_episode(source.episode(key))
        if original := source.original(key):
            target.add_original(original)
        target.add_ratings(source.ratings(key))
    return target


def serialize(args: argparse.Namespace) -> TransferReport:
    with closing(open_store(args.store, create=False)) as source, tempfile.TemporaryDirectory() as folder:
        if args.tag:
            query = EpisodeQuery(tag=args.tag)
            return export_file(source, args.output_file, query, layout="sotopia", judge=args.judge)
        with closing(chosen(source, args.pk, Path(folder))) as picked:
            return export_file(picked, args.output_file, layout="sotopia", judge=args.judge)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tag")
    which.add_argument("--pk", nargs="+")
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--judge", help="whose scores, where an episode has those of several")
    parser.add_argument("--store", default="redis", help="FILE.db or redis://HOST:PORT (default: REDIS_OM_URL)")
    args = parser.parse_args()
    try:
        report = serialize(args)
    except SotopiaRLError as error:
        sys.exit(f"error: {error}")
    print(report)
    sys.exit(0 if report.episodes else "error: no such episode with scores; nothing was written")


if __name__ == "__main__":
    main()
