"""Step 1a of the paper: keep the episodes in which both agents are GPT-4, the data for behaviour cloning.

    python process_sotopia_pi.py --data_dir DATA --input_file sotopia_pi_episodes.jsonl \
        --output_file sotopia_pi_bc_episodes.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sotopia_rl.errors import SotopiaRLError
from sotopia_rl.paper import select_self_play


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of the files")
    parser.add_argument("--input_file", required=True)
    parser.add_argument("--output_file", required=True)
    parser.add_argument("--model", default="gpt-4", help="model of both agents (default: %(default)s)")
    parser.add_argument("--on_bad", choices=["refuse", "skip"], default="refuse", help="what to do with a bad line")
    args = parser.parse_args()
    try:
        summary = select_self_play(
            args.data_dir / args.input_file, args.data_dir / args.output_file, model=args.model, on_bad=args.on_bad
        )
    except SotopiaRLError as error:
        sys.exit(f"error: {error}")
    print(f"episodes: {summary}")


if __name__ == "__main__":
    main()
