"""Step 1c of the paper: from annotated episodes to the files that the training scripts read.

    python process_annotation_direct_attribution.py --data_dir DATA \
        --input_file sotopia_pi_bc_episodes_annotated.jsonl \
        --reward_output_file sotopia_pi_bc_episodes_reward.json --grpo_output_file sotopia_pi_bc_episodes_grpo.json

Reads what sample_episodes_and_annotate.py wrote, here or in the paper's code, and the episodes it was made from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from sotopia_rl.episode import Episode
from sotopia_rl.errors import SotopiaRLError
from sotopia_rl.paper import EpisodeFile, Summary
from sotopia_rl.paper_rows import Annotated, read_annotated, write_reply_file, write_reward_file


def run(args: argparse.Namespace) -> str:
    folder: Path = args.data_dir
    default = "sotopia_pi_bc_episodes.jsonl"
    names = [args.episodes_file] if args.episodes_file else [default, "sotopia_pi_episodes.jsonl"]
    source = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
    episodes = EpisodeFile(source, Summary(), args.on_bad)
    summary = Summary()

    def annotated(counting: Summary) -> Iterator[tuple[Episode, Annotated]]:
        return read_annotated(
            folder / args.input_file, episodes, counting, top_weight=args.top_weight, on_bad=args.on_bad
        )

    profile = args.prompt_profile
    rows = write_reward_file(annotated(summary), folder / args.reward_output_file, profile=profile)
    for name in filter(None, (args.grpo_output_file, args.sft_output_file)):
        write_reply_file(annotated(Summary()), folder / name, profile=profile)
    for problem in summary.bad:
        print(f"left out: {problem}", file=sys.stderr)
    return (
        f"{rows} rows from {summary.read} annotated agents, {len(summary.bad)} left out; "
        f"{summary.redundant} utterances marked redundant (-1) count as 0"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of the files")
    parser.add_argument("--input_file", required=True)
    parser.add_argument("--reward_output_file", required=True)
    parser.add_argument("--grpo_output_file")
    parser.add_argument("--sft_output_file")
    parser.add_argument("--episodes_file", help="default: sotopia_pi_bc_episodes.jsonl or sotopia_pi_episodes.jsonl")
    parser.add_argument("--top_weight", type=float, default=3.0, help="of the paper's own files (default: %(default)s)")
    parser.add_argument("--prompt_profile", default="paper", help="wording of the prompts (default: %(default)s)")
    parser.add_argument("--on_bad", choices=["refuse", "skip"], default="refuse", help="what to do with a bad line")
    args = parser.parse_args()
    if not (args.grpo_output_file or args.sft_output_file):
        parser.error("give --grpo_output_file or --sft_output_file beside --reward_output_file")
    try:
        print(run(args))
    except SotopiaRLError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
