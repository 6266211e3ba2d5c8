"""The command line: names, one-line descriptions, exit codes. What a command does is in `commands/`.

Exit codes: 0 done, 1 it could not be done (one line on stderr says why), 2 a flag or a config file is wrong,
130 interrupted, 141 nobody reads stdout any more. Commands are imported when they are called, so that `--help` stays
fast.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from sotopia_rl import __version__
from sotopia_rl.errors import ConfigError, SotopiaRLError

app = App(
    name="sotopia-rl",
    version=__version__,
    help="Train language agents to be socially intelligent, and measure whether they are.",
    suppress_keyboard_interrupt=False,  # `main` says more than nothing
)

_PIPELINE = "The line, stage by stage"
_WHOLE = "The whole line"
_DATA = "Data"
_SERVE = "Servers"

COMMANDS: dict[str, tuple[str, str, str]] = {
    "quickstart": ("experiments:quickstart", _WHOLE, "The whole line offline, in minutes, on a laptop CPU."),
    "run": ("experiments:run", _WHOLE, "An experiment file; redoes only what changed."),
    "simulate": ("data:simulate", _PIPELINE, "Play matches between two models and keep the episodes."),
    "judge": ("data:judge", _PIPELINE, "Score episodes with SOTOPIA-EVAL."),
    "annotate": ("data:annotate", _PIPELINE, "Attribute the scores to utterances."),
    "reward": ("data:reward", _PIPELINE, "Combine attributions into rewards and write training rows."),
    "sft": ("training:sft", _PIPELINE, "Behaviour cloning."),
    "rm": ("training:rm", _PIPELINE, "Train the reward model on utterance rewards."),
    "grpo": ("training:grpo", _PIPELINE, "Train the policy against the reward model."),
    "evaluate": ("evaluation:app", _PIPELINE, "Compare systems over one manifest, paired, with intervals."),
    "report": ("evaluation:report", _PIPELINE, "Write the report of a run again."),
}

for _name, (_target, _group, _help) in COMMANDS.items():
    app.command(f"sotopia_rl.commands.{_target}", name=_name, group=_group, help=_help)

episodes = App(name="episodes", help="List, show, export, import and delete episodes.", group=_DATA)
for _name, _help in {
    "list": "One line per episode.",
    "show": "One conversation, to read.",
    "export": "Copy episodes into another store or a JSONL file.",
    "import": "Copy episodes from another store or a JSONL file.",
    "delete": "Remove episodes with all that is said of them.",
}.items():
    episodes.command(f"sotopia_rl.commands.episodes:{_name}_episodes", name=_name, help=_help)
app.command(episodes)

manifest = App(name="manifest", help="Which matches an evaluation plays: list, freeze and show.", group=_DATA)
for _name, _help in {
    "list": "The manifests that have a name.",
    "freeze": "Write a manifest, by name or from one's own YAML, with its hash.",
    "show": "What is in a manifest, and whether it still has its hash.",
}.items():
    manifest.command(f"sotopia_rl.commands.manifests:{_name}_manifests", name=_name, help=_help)
app.command(manifest)

data = App(name="data", help="Get published data sets.", group=_DATA)
data.command("sotopia_rl.commands.datasets:pull", name="pull", help="Download a published data set from the hub.")
app.command(data)

serve = App(name="serve", help="Serve policies over HTTP.", group=_SERVE)
for _name, (_function, _help) in {
    "best-of-n": ("serve_best_of_n", "The reply of N that a reward model likes best, as an OpenAI-compatible server."),
    "vllm": ("serve_vllm", "A base with LoRA adapters on vLLM: print the command, or run it."),
}.items():
    serve.command(f"sotopia_rl.commands.serving:{_function}", name=_name, help=_help)
app.command(serve)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `sotopia-rl`."""
    # torch's threads then sleep at barriers instead of spinning: twice as fast where another process wants a core
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # peft 0.21 asks transformers 5.23 for a property it renames: nothing a user could do about
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # it recommends a package that nobody needs here
    try:
        try:
            app(arguments, exit_on_error=False, print_error=False)
        finally:
            sys.stdout.flush()
    except CycloptsError as error:
        from sotopia_rl.commands.flags import wrong_flag

        print(f"sotopia-rl: {wrong_flag(error)}", file=sys.stderr)
        sys.exit(2)
    except ConfigError as error:
        print(f"sotopia-rl: {error}", file=sys.stderr)
        sys.exit(2)
    except SotopiaRLError as error:
        print(f"sotopia-rl: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("sotopia-rl: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read stdout has gone, as `head` does; Python would flush it once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
