"""Keys, indices and profile documents of SOTOPIA's Redis database, as redis-om lays them out for it.

Nothing here keeps state; `db` is a `redis.Redis` with decoded responses.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sotopia_rl.episode import Character, Match, Scenario
from sotopia_rl.profiles import CharacterFields, Combo, Profiles, Relationship

logger = logging.getLogger(__name__)

Document = dict[str, Any]

EPISODE_LOG = ":sotopia.database.logs.EpisodeLog:"
AGENT = ":sotopia.database.persistent_profile.AgentProfile:"
ENVIRONMENT = ":sotopia.database.persistent_profile.EnvironmentProfile:"
RELATIONSHIP = ":sotopia.database.persistent_profile.RelationshipProfile:"
COMBO = ":sotopia.database.env_agent_combo_storage.EnvAgentComboStorage:"

D = TypeVar("D", bound=BaseModel)

_TAG = "TAG SEPARATOR |"

# The index definitions of sotopia 0.1.4, spaces included: redis-om compares their hash with the one it kept, and
# builds an index anew where they differ, during which `find` gives too few rows without an error.
_SCHEMAS = {
    EPISODE_LOG: "pk environment agents[*] tag models[*] - reasoning - -",
    AGENT: "pk first_name last_name age# occupation gender gender_pronoun public_info big_five - - "
    "personality_and_values decision_making_style secret model_id mbti tag",
    ENVIRONMENT: "pk codename source scenario agent_goals[*] relationship# age_constraint occupation_constraint "
    "agent_constraint[*].agent_constraint[*] tag",
}


def _indexed(field: str) -> str:
    """How one field is indexed: `#` is a number, `-` a field that is not."""
    name = field.partition("[")[0].removesuffix("#")
    if field == "-":
        return ""
    return f"$.{name} AS {name} NUMERIC" if field.endswith("#") else f"$.{field} AS {name} {_TAG}"


def schema(prefix: str) -> str:
    """The index definition that sotopia 0.1.4 gives redis-om for the documents under `prefix`."""
    fields = " ".join(_indexed(field) for field in _SCHEMAS[prefix].split(" "))
    return f"ON JSON PREFIX 1 {prefix} SCHEMA {fields}"


def create_indexes(db: Any) -> None:
    """Make the indices that `find` needs, under redis-om's names, where there are none."""
    there = set(db.execute_command("FT._LIST"))
    for prefix in _SCHEMAS:
        name = f"{prefix}index"
        if name not in there:
            db.execute_command("FT.CREATE", name, *schema(prefix).split())
            db.set(f"{name}:hash", hashlib.sha1(schema(prefix).encode(), usedforsecurity=False).hexdigest())


def documents(db: Any, prefix: str, ids: Sequence[str]) -> dict[str, Document]:
    """Documents by id; those that are not there are missing."""
    if not ids:
        return {}
    found = db.execute_command("JSON.MGET", *(prefix + one for one in ids), "$")
    return {one: json.loads(text)[0] for one, text in zip(ids, found, strict=True) if text}


def put_profiles(pipeline: Any, match: Match) -> None:
    """Write the profiles of a match where there are none of those ids: sotopia looks them up by id."""
    for character in match.characters:
        key, document = AGENT + character.id, agent_document(character)
        pipeline.execute_command("JSON.SET", key, "$", json.dumps(document, ensure_ascii=False), "NX")
    key, environment = ENVIRONMENT + match.scenario.id, environment_document(match.scenario)
    pipeline.execute_command("JSON.SET", key, "$", json.dumps(environment, ensure_ascii=False), "NX")


def agent_document(character: Character) -> Document:
    """An AgentProfile."""
    return {"pk": character.id, **character.model_dump(mode="json", exclude={"id"}), "model_id": "", "tag": ""}


def environment_document(scenario: Scenario) -> Document:
    """An EnvironmentProfile. Its agent constraint is a list of lists that we keep as text, and so is left empty."""
    return {
        "pk": scenario.id,
        "codename": scenario.codename,
        "source": scenario.source,
        "scenario": scenario.description,
        "agent_goals": list(scenario.goals),
        "relationship": scenario.relationship,
        "age_constraint": scenario.age_constraint or None,
        "occupation_constraint": scenario.occupation_constraint or None,
        "agent_constraint": None,
        "tag": "",
    }


def profiles_of(db: Any, logs: Iterable[Document]) -> Profiles:
    """The characters and scenarios that some EpisodeLogs name, as far as they are there."""
    agents: set[str] = set()
    environments: set[str] = set()
    for log in logs:
        agents |= {str(agent) for agent in log.get("agents") or ()}
        environments.add(str(log.get("environment")))
    return Profiles(_characters(db, sorted(agents)), _scenarios(db, sorted(environments)), (), ())


def all_profiles(db: Any) -> Profiles:
    """Every profile that sotopia keeps."""
    combos = _valid(_Combo, COMBO, documents(db, COMBO, _ids(db, COMBO)).values())
    relationships = _valid(_Relationship, RELATIONSHIP, documents(db, RELATIONSHIP, _ids(db, RELATIONSHIP)).values())
    return Profiles(
        _characters(db, _ids(db, AGENT)),
        _scenarios(db, _ids(db, ENVIRONMENT)),
        tuple(Combo(c.pk, c.env_id, c.agent_ids) for c in combos),
        tuple(
            Relationship(r.pk, (r.agent_1_id, r.agent_2_id), r.relationship, r.background_story or "")
            for r in relationships
        ),
    )


def _ids(db: Any, prefix: str) -> list[str]:
    found = (key.removeprefix(prefix) for key in db.scan_iter(match=f"{prefix}*", count=1000))
    return sorted(one for one in found if one != "index:hash")


def _characters(db: Any, ids: Sequence[str]) -> dict[str, Character]:
    found = _valid(_Agent, AGENT, documents(db, AGENT, ids).values())
    return {agent.pk: Character(id=agent.pk, **agent.model_dump(exclude={"pk"})) for agent in found}


def _scenarios(db: Any, ids: Sequence[str]) -> dict[str, Scenario]:
    return {
        e.pk: Scenario(
            id=e.pk,
            codename=e.codename,
            source=e.source,
            description=e.scenario,
            goals=e.agent_goals,
            relationship=e.relationship,
            age_constraint=e.age_constraint or "",
            occupation_constraint=e.occupation_constraint or "",
            agent_constraint=json.dumps(e.agent_constraint) if e.agent_constraint else "",
        )
        for e in _valid(_Environment, ENVIRONMENT, documents(db, ENVIRONMENT, ids).values())
    }


def _valid(cls: type[D], prefix: str, found: Iterable[Document]) -> Iterator[D]:
    """The documents that are what they should be; the others are named in the log."""
    for document in found:
        try:
            yield cls.model_validate(document)
        except ValidationError as error:
            logger.warning("%s%s cannot be used: %s", prefix, document.get("pk"), error.errors()[0]["msg"])


class _Stored(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    pk: str


class _Agent(_Stored, CharacterFields):
    """An AgentProfile."""


class _Environment(_Stored):
    codename: str = ""
    source: str = ""
    scenario: str
    agent_goals: tuple[str, str]
    relationship: int = Field(default=0, ge=0, le=5)
    age_constraint: str | None = None
    occupation_constraint: str | None = None
    agent_constraint: list[list[str]] | None = None


class _Combo(_Stored):
    env_id: str
    agent_ids: tuple[str, str]


class _Relationship(_Stored):
    agent_1_id: str
    agent_2_id: str
    relationship: int
    background_story: str | None = None
