"""What every kind of store does: SQLite, a JSONL file, a real Redis."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from real_redis import needs_redis, redis_server
from sotopia_rl.errors import StoreError
from sotopia_rl.store import EpisodeQuery, EpisodeSummary, Original, open_store
from sotopia_rl.store.readable import readable_episodes, readable_rated
from sotopia_rl.store.sotopia_write import log_document
from store_samples import FAILURE, attribution, episode, rating

KINDS = ["db", "jsonl", pytest.param("redis", marks=needs_redis)]


@pytest.fixture(scope="module", params=KINDS)
def place(request, tmp_path_factory):
    """Makes names of empty stores of one kind."""
    with ExitStack() as stack:
        if request.param == "redis":
            url = stack.enter_context(redis_server())
            yield lambda: empty(url)
        else:
            yield lambda: tmp_path_factory.mktemp("store") / "run" / f"episodes.{request.param}"


def empty(url):
    import redis

    with redis.Redis.from_url(url) as db:
        db.flushall()
    return url


@pytest.fixture
def name(place):
    return place()


@pytest.fixture
def store(name):
    with open_store(name) as opened:
        yield opened


def original_of(of):
    return Original(episode_id=of.id, layout="sotopia-log", document=log_document(of, rating(of)))


def test_what_was_written_is_read_back_unchanged(store):
    one, failed = episode(1), episode(2, failure=FAILURE)
    store.add_episodes([one, failed])
    store.add_rating(rating(one))
    store.add_attribution(attribution(one))
    assert store.episode(one.id) == one
    assert store.episode(failed.id) == failed
    assert list(store.ratings(one.id)) == [rating(one)]
    assert list(store.attributions(one.id)) == [attribution(one)]


def test_listings_are_ordered_by_id_whatever_the_order_of_writing(store):
    episodes = [episode(n) for n in range(7)]
    store.add_episodes(episodes)
    by_id = sorted(episodes, key=lambda e: e.id)
    assert list(store.episodes()) == by_id
    assert store.ids() == [e.id for e in by_id]
    assert list(store.summaries()) == [EpisodeSummary.of(e) for e in by_id]


# The store is only read: it may be the same one for every example.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    query=st.builds(
        EpisodeQuery,
        tag=st.sampled_from([None, "a", "b"]),
        model=st.sampled_from([None, "m0", "m1", "scripted/tough", "nobody"]),
        scenario_id=st.sampled_from([None, "scenario1"]),
        codename=st.sampled_from([None, "code2"]),
        status=st.sampled_from([None, "completed", "agent_failed"]),
        limit=st.sampled_from([None, 0, 1, 5, 100]),
    )
)
def test_every_query_gives_what_a_filter_over_all_would(filled, query):
    expected = [e for e in filled.episodes() if query.matches(EpisodeSummary.of(e))][: query.limit]
    assert list(filled.episodes(query)) == expected
    assert [s.id for s in filled.summaries(query)] == filled.ids(query) == [e.id for e in expected]
    assert filled.count(query) == len(expected)


@pytest.fixture
def filled(store):
    episodes = [
        episode(n, tag="ab"[n % 2], model=f"m{n % 3}", failure=FAILURE if n % 5 == 0 else None) for n in range(30)
    ]
    store.add_episodes(episodes)
    return store


def test_iterating_reads_page_by_page_and_allows_writing_meanwhile(store):
    store.add_episodes(episode(n) for n in range(250))
    for number, found in enumerate(store.episodes()):
        store.add_rating(rating(found))
        assert number < 250
    assert len(list(store.rated())) == 250
    assert len(list(store.ratings())) == 250


def test_writing_the_same_again_changes_nothing(store):
    for _ in range(2):
        store.add_episode(episode())
        store.add_rating(rating(episode()))
        store.add_attribution(attribution(episode()))
        store.add_failure("judge", "x", FAILURE)
    assert store.count() == len(list(store.ratings())) == len(list(store.attributions())) == 1
    assert list(store.failures()) == [("judge", "x", FAILURE)]


def test_a_new_tag_keeps_the_ratings_and_another_conversation_drops_them(store):
    first = episode()
    store.add_episode(first)
    store.add_rating(rating(first))
    store.add_attribution(attribution(first))
    store.add_episode(first.model_copy(update={"tag": "renamed"}))
    assert store.count(EpisodeQuery(tag="renamed")) == len(list(store.rated())) == 1
    store.add_episode(first.model_copy(update={"turns": first.turns[:2]}))
    assert list(store.ratings()) == list(store.attributions()) == []


def test_ratings_are_chosen_by_judge(store):
    episodes = [episode(n) for n in range(3)]
    store.add_episodes(episodes)
    store.add_ratings(rating(e, judge) for e in episodes for judge in ("j1", "j2"))
    store.add_rating(rating(episodes[0], "j3"))
    assert len(list(store.rated(EpisodeQuery(tag="t")))) == 7
    assert [r.judge for _, r in store.rated(judge="j2")] == ["j2"] * 3
    assert [r.judge for r in store.ratings(episodes[0].id)] == ["j1", "j2", "j3"]
    assert store.rated_ids("j3") == {episodes[0].id}
    assert store.judges() == {"j1": 3, "j2": 3, "j3": 1}


def test_attributions_are_chosen_by_method_and_annotator(store):
    one = episode()
    store.add_attributions([attribution(one), attribution(one, method="uniform"), attribution(one, "knowledge")])
    assert len(list(store.attributions(one.id))) == 3
    assert [a.dimension for a in store.attributions(method="direct")] == ["goal", "knowledge"]
    assert list(store.attributions(annotator="nobody")) == []
    assert store.attributed(method="uniform", annotator="scripted/annotator") == {(one.id, 0, "goal")}


def test_failures_are_forgotten_by_stage_or_by_item(store):
    for stage, item in (("judge", "a"), ("judge", "b"), ("annotate", "a")):
        store.add_failure(stage, item, FAILURE)
    assert store.delete_failures("judge", ["a", "unknown"]) == 1
    assert [(s, i) for s, i, _ in store.failures()] == [("annotate", "a"), ("judge", "b")]
    assert store.delete_failures("judge") == 1
    assert [(s, i) for s, i, _ in store.failures("judge")] == []


def test_tags_are_counted_and_episodes_deleted_with_what_was_said_of_them(store):
    episodes = [episode(n, tag="ab"[n % 2]) for n in range(3)]
    store.add_episodes(episodes)
    store.add_rating(rating(episodes[0]))
    store.add_original(original_of(episodes[0]))
    for stage, item in (("judge", f"{episodes[0].id}/j"), ("x", episodes[0].id), ("judge", f"{episodes[1].id}/j")):
        store.add_failure(stage, item, FAILURE)
    assert store.tags() == {"a": 2, "b": 1}
    assert store.delete_episodes([episodes[0].id, "unknown"]) == 1
    assert store.tags() == {"a": 1, "b": 1}
    assert list(store.ratings()) == []
    assert store.original(episodes[0].id) is None
    assert [item for _, item, _ in store.failures()] == [f"{episodes[1].id}/j"]


def test_records_are_read_one_by_one_with_their_rating(store):
    episodes = sorted((episode(n) for n in range(3)), key=lambda e: e.id)
    store.add_episodes(episodes)
    store.add_ratings([rating(episodes[0]), rating(episodes[2]), rating(episodes[1], "j2")])
    assert list(readable_episodes(store, store.ids())) == episodes
    pairs = [(e, rating(e)) for e in (episodes[0], episodes[2])]
    assert list(readable_rated(store, EpisodeQuery(tag="t"), "scripted/judge")) == pairs


def test_an_unknown_episode_is_one_clear_error(store):
    with pytest.raises(StoreError, match=r"no episode nobody; `sotopia-rl episodes list`"):
        store.episode("nobody")


def test_what_was_written_is_there_when_the_store_is_opened_again(name):
    one, failed = episode(1), episode(2, failure=FAILURE)
    with open_store(name) as store:
        store.add_episodes([failed, one])
        store.add_ratings([rating(one), rating(one, "j2")])
        store.add_attribution(attribution(one))
        store.add_failure("judge", one.id, FAILURE)
        store.add_failure("judge", failed.id, FAILURE)
        store.delete_failures("judge", [failed.id])
        store.add_episode(episode(3))
        store.delete_episodes([episode(3).id])
    with open_store(str(name), create=False) as store:
        assert {e.id: e for e in store.episodes()} == {one.id: one, failed.id: failed}
        assert list(store.rated()) == [(one, rating(one, "j2")), (one, rating(one))]
        assert list(store.attributions()) == [attribution(one)]
        assert list(store.failures()) == [("judge", one.id, FAILURE)]
