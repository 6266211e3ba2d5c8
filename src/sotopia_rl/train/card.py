"""The model card beside every result: what it was made of and how, and how good it is. No torch here.

Everything in it is read from the run's own files; nothing is claimed that was not measured. Who judged and annotated
the episodes is known where a `provenance.json` lies beside the rows.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined

from sotopia_rl.train.folder import FREE, RunFolder, read_json, read_metrics, write_text
from sotopia_rl.train.reward_report import RewardReport

PURPOSES = {
    "base": "A tiny language model for tests and the quickstart.",
    "sft": "A policy that imitates the replies of social dialogues.",
    "rm": "A reward model: from a prompt and a reply to the reward of the reply, on 0 to 1.",
    "grpo": "A policy for social dialogues, trained by GRPO against a reward model.",
}
LIMITS = {
    "base": ["It knows the few phrases of the rows it was made from and nothing else."],
    "sft": ["It imitates the replies it was given, the bad ones among them included."],
    "rm": [
        "Its targets come from a judge's scores and an annotator's attribution; it knows no better than they do.",
        "The figures above are for held-out episodes of the same data, not for another policy's replies.",
    ],
    "grpo": [
        "It was trained towards a reward model, which can be pleased without getting better.",
        "Compare the curve of the reward with a judge's scores on held-out scenarios.",
    ],
}
COMMON_LIMITS = [
    "Judges of social dialogue favour length: see words per utterance beside any score.",
    "It was made for research in simulated dialogues and was not tested for use with people.",
]
PACKAGES = ("sotopia-rl", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
UNTOLD = ("epoch", "learning_rate", "num_tokens", "step", "eval_runtime", "warning")
"""Metrics that a card leaves out."""


def write_card(result: Path, run: RunFolder, paths: Mapping[str, Path], facts: Mapping[str, Any]) -> None:
    """Write `result/README.md`.

    Args:
        paths: What the run read, by the names of its claim: `base`, `rows` or `prompts`, and so on.
        facts: What the run found out about its data and its end, as in `finished.json`.
    """
    write_text(result / "README.md", card_text(result, run, paths, facts))


def card_text(result: Path, run: RunFolder, paths: Mapping[str, Path], facts: Mapping[str, Any]) -> str:
    """The card as Markdown, with the metadata that the hub reads at its head."""
    claimed = read_json(run.settings_file)
    stage = str(claimed["stage"])
    rows = paths.get("rows") or paths["prompts"]
    report = _report(paths.get("reward_adapter", result))
    collapsed = bool(facts.get("collapsed"))
    best = collapsed or claimed["settings"].get("keep") == "best"
    return (
        _environment()
        .get_template("card.md.jinja")
        .render(
            stage=stage,
            title=f"{run.path.resolve().name} ({stage})",
            purpose=PURPOSES[stage],
            library="peft" if (result / "adapter_config.json").is_file() else "transformers",
            base_id=hub_id(paths["base"]) if "base" in paths else None,
            origin=_origin(claimed["inputs"], paths, rows),
            data=_data(rows, claimed["inputs"], facts),
            gate="" if report is None else _gate(claimed["settings"], report),
            outputs=() if report is None else report.outputs,
            steps=facts["steps"],
            best_step=facts.get("best_step") if best else None,
            collapsed=collapsed,
            curves=_curves(run),
            settings=yaml.safe_dump(_telling(claimed["settings"]), sort_keys=False, allow_unicode=True),
            command=_command(),
            version={name: _version(name) for name in PACKAGES},
            limits=[*LIMITS[stage], *COMMON_LIMITS],
        )
    )


def hub_id(base: Path) -> str | None:
    """`owner/name` of a base that lies in the hub's cache; None for any other folder."""
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", str(base.resolve()))
    return f"{found[1]}/{found[2]}" if found else None


def _origin(fingerprints: Mapping[str, str], paths: Mapping[str, Path], rows: Path) -> dict[str, str]:
    """Which models it goes back to."""
    inputs = {
        name.replace("_", " "): f"{path} (fingerprint {fingerprints[name]})"
        for name, path in paths.items()
        if path != rows
    }
    note = rows.parent / "provenance.json"
    known = read_json(note) if note.is_file() else {}
    people = {role: str(known.get(role, "not recorded")) for role in ("judge", "annotator")}
    return inputs | people | {name: str(text) for name, text in known.items() if name not in people}


def _data(rows: Path, fingerprints: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, str]:
    counts = {
        "rows": facts["data"]["rows"],
        "episodes": facts.get("episodes"),
        "rows held out, by whole episodes": facts.get("held_out_rows"),
        "longest row in tokens": facts["data"]["longest_tokens"],
        "rows that lost their oldest turns": facts["data"]["shortened_rows"],
    }
    digest = fingerprints["rows" if "rows" in fingerprints else "prompts"]
    return {"file": f"{rows} (sha256 {digest})"} | {
        name: str(count) for name, count in counts.items() if count is not None
    }


def _report(adapter: Path) -> RewardReport | None:
    file = adapter / "report.json"
    return RewardReport.model_validate(read_json(file)) if file.is_file() else None


def _gate(settings: Mapping[str, Any], report: RewardReport) -> str:
    found = "undefined" if report.spearman is None else f"{report.spearman:.3f}"
    text = f"Lowest rank correlation of an output: {found}, over {report.held_out_episodes} episodes."
    if "gate_min_spearman" not in settings:
        return text
    gate = settings["gate_min_spearman"]
    return text + (" The gate was switched off." if gate is None else f" The gate asked for {gate}.")


def _curves(run: RunFolder) -> dict[str, tuple[float, float]]:
    """First and last value of every metric."""
    curves: dict[str, tuple[float, float]] = {}
    for line in read_metrics(run.metrics_file) if run.metrics_file.is_file() else ():
        for name, value in line.items():
            if isinstance(value, int | float) and name not in UNTOLD and not name.endswith("_per_second"):
                curves[name] = (curves.get(name, (value,))[0], value)
    return curves


def _command() -> str:
    """The command line of this process, under the name that it is known by."""
    name = Path(sys.argv[0]).name
    return shlex.join(["sotopia-rl" if name == "cli.py" else name, *sys.argv[1:]])


def _telling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that made the result what it is; addresses of servers are nobody's business."""
    return {name: value for name, value in settings.items() if name not in FREE}


@cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


@cache
def _environment() -> Environment:
    source = resources.files("sotopia_rl.train")
    environment = Environment(
        loader=FunctionLoader(lambda name: source.joinpath(name).read_text(encoding="utf-8")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701 - Markdown; table cells go through `cell`
    )
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.4g}"  # noqa: RUF001
    return environment
