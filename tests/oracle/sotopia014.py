"""Runs in the environment of the published sotopia 0.1.4, never in ours. Speaks JSON on its standard output.

REDIS_OM_URL=... python sotopia014.py read TAG PATH IDS...   what `get` and `find` give; `episodes_to_jsonl` into PATH
REDIS_OM_URL=... python sotopia014.py write PATH             store the episodes and profiles in PATH by its own models
REDIS_OM_URL=... python sotopia014.py schemas                index definitions and their state
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from sotopia.database import AgentProfile, EnvironmentProfile, EpisodeLog
from sotopia.database.env_agent_combo_storage import EnvAgentComboStorage
from sotopia.database.persistent_profile import RelationshipProfile
from sotopia.database.serialization import episodes_to_jsonl, jsonl_to_episodes

MODELS = (EpisodeLog, AgentProfile, EnvironmentProfile)


def wait_for_index() -> None:
    """`find` gives too few rows, without an error, while an index is being built."""
    while any(int(m.db().ft(m._meta.index_name).info()["indexing"]) for m in MODELS):
        time.sleep(0.05)


def read(tag: str, path: str, *ids: str) -> object:
    wait_for_index()
    found = EpisodeLog.find(EpisodeLog.tag == tag).all()
    got = [EpisodeLog.get(one) for one in ids]
    episodes_to_jsonl(got, path)
    return {
        "found": sorted(episode.pk for episode in found),
        "got": [episode.model_dump(mode="json") for episode in got],
        "for_humans": [episode.render_for_humans()[1] for episode in got],
    }


def write(path: str) -> object:
    given = json.loads(Path(path).read_text())
    for agent in given["agents"]:
        AgentProfile(**agent).save()
    for environment in given["environments"]:
        EnvironmentProfile(**environment).save()
    for combo in given["combos"]:
        EnvAgentComboStorage(**combo).save()
    for relationship in given["relationships"]:
        RelationshipProfile(**relationship).save()
    for episode in jsonl_to_episodes(given["episodes"]):
        episode.save()
    return "done"


def schemas() -> object:
    return {
        model._meta.index_name: {
            "schema": model.redisearch_schema(),
            "documents": int(model.db().ft(model._meta.index_name).info()["num_docs"]),
            "hash": model.db().get(f"{model._meta.index_name}:hash"),
        }
        for model in MODELS
    }


if __name__ == "__main__":
    command = {"read": read, "write": write, "schemas": schemas}[sys.argv[1]]
    print(json.dumps(command(*sys.argv[2:])))  # noqa: T201
    sys.stdout.flush()
    os._exit(0)  # litellm's threads would keep the process alive
