"""What a panel of judges, published figures and single conversations add to the page."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from played_systems import judged_by, manifest, played
from sotopia_rl.episode import Failure
from sotopia_rl.errors import EvaluationError
from sotopia_rl.evaluate import evaluate_panel
from sotopia_rl.evaluate.contrast import contrasts, contrasts_of_each
from sotopia_rl.published import beside, published_results
from sotopia_rl.report import ReportInput, write_report
from sotopia_rl.report.charts import strip
from sotopia_rl.report.wording import NOT_STATED, plan_text, sd_text
from sotopia_rl.report.wording import tests_text as how_many_tests
from sotopia_rl.report.write import episode_view
from sotopia_rl.results import METRICS
from test_report import chromium, outline

OVER = manifest()
SKILL = {"sft": 4.0, "grpo": 6.0}
TIMEOUT = Failure(kind="timeout", message="no reply in 30 s", turn=2)


@cache
def panel():
    systems = [played("sft", 4, OVER), played("grpo", 6, OVER, failures={0: TIMEOUT})]
    return {
        judge: [judged_by(p, judge, skill=SKILL[p.system] + shift, repeated=60) for p in systems]
        for judge, shift in (("openai/judge", 0.0), ("custom/<judge>", 0.8))
    }


@cache
def results():
    return evaluate_panel(panel(), [("grpo", "sft")])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("panel")
    shown = contrasts(panel(), results(), "grpo", "sft", "goal", count=2)
    write_report(ReportInput(results=results(), contrasts=shown, published=True), folder)
    return folder


def test_the_page_of_a_panel_nests_fetches_nothing_and_escapes_its_judges(page):
    text = (page / "report.html").read_text(encoding="utf-8")
    found = outline(text)
    assert found.open == []
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert len(set(found.ids)) == len(found.ids)
    assert {"panel", "pictures", "side-by-side", "published"} <= set(found.ids)
    assert "custom/<judge>" not in text
    assert "custom/&lt;judge&gt;" in text


def test_markdown_holds_the_same_tables(page):
    text = (page / "report.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 8
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_the_pool_is_the_mean_of_the_judges_and_each_stands_alone():
    found = results()
    assert found.judges == ("openai/judge", "custom/<judge>")
    assert found.judge == "mean of openai/judge, custom/<judge>"
    pooled = found.row("grpo", "sft", "greedy", "goal")
    alone = [p.row for p in found.parts if p.by == "judge" and p.row.setting == "greedy" and p.row.metric == "goal"]
    assert len(alone) == 2
    assert pooled.difference == pytest.approx(sum(row.difference for row in alone) / 2)
    partners = [
        p.row for p in found.parts if p.by == "partner" and p.row.setting == "greedy" and p.row.metric == "goal"
    ]
    assert sum(row.num_pairs for row in partners) == pooled.num_pairs
    assert sum(row.num_pairs * row.difference for row in partners) == pytest.approx(
        pooled.num_pairs * pooled.difference
    )


def test_an_episode_that_one_judge_lacks_is_left_out_of_the_pool_and_counted_under_that_judge():
    from dataclasses import replace

    first, second = panel().values()
    lacking = dict(second[1].ratings)
    del lacking[next(e.id for e in second[1].episodes if e.id in lacking)]
    found = evaluate_panel(
        {"openai/judge": first, "custom/<judge>": [second[0], replace(second[1], ratings=lacking)]}, [("grpo", "sft")]
    )
    causes = next(s for s in found.systems if (s.system, s.setting) == ("grpo", "sampled")).failures
    assert causes == {"agent_failed: timeout": 1, "not judged (custom/<judge>)": 1}
    assert found.row("grpo", "sft", "sampled", "goal").num_excluded == 2


def test_a_judge_that_rated_nothing_is_refused():
    from dataclasses import replace

    mute = [replace(p, ratings={}) for p in panel()["openai/judge"]]
    with pytest.raises(EvaluationError, match="none of the 128 episodes has a rating by custom/mute"):
        evaluate_panel({**panel(), "custom/mute": mute}, [("grpo", "sft")])


def test_contrasts_are_the_largest_wins_then_the_largest_losses_of_the_same_match():
    shown = contrasts(panel(), results(), "grpo", "sft", "goal", count=2)
    gains = [c.difference for c in shown]
    assert gains[0] == max(gains)
    assert all(gain > 0 for gain in gains[:2])
    assert all(gain < 0 for gain in gains[2:])
    for c in shown:
        assert c.a[0].match.id == c.b[0].match.id
        assert c.setting == "greedy"
        assert (c.a[0].agents[c.a[0].match.seat].model, c.b[0].agents[c.b[0].match.seat].model) == (
            "local/runs/grpo",
            "local/runs/sft",
        )


def test_every_comparison_has_conversations_side_by_side_and_their_number_is_bounded(tmp_path):
    both = [("grpo", "sft"), ("sft", "grpo")]
    found = evaluate_panel(panel(), both)
    shown = contrasts_of_each(panel(), found, both, "goal")
    assert {(c.system_a, c.system_b) for c in shown} == set(both)
    assert len(shown) <= 12
    assert len(contrasts_of_each(panel(), found, both * 20, "goal")) <= 24
    text = write_report(ReportInput(results=found, contrasts=shown), tmp_path).read_text(encoding="utf-8")
    assert "<h3>grpo over sft</h3>" in text
    assert "<h3>sft over grpo</h3>" in text
    assert outline(text).open == []


def test_a_partner_is_named_by_its_model_even_where_a_system_has_that_model():
    episode, rating = next(
        (e, p.ratings[e.id]) for p in panel()["openai/judge"] for e in p.episodes if e.id in p.ratings
    )
    seat = episode.match.seat
    partner = episode.agents[1 - seat].model
    view = episode_view(episode, rating, (), {partner: "other", episode.agents[seat].model: "own"})
    assert (view.agents[seat], view.agents[1 - seat]) == ("own", partner)


def test_scenario_rows_average_to_the_difference():
    rows = [r for r in results().scenarios if r.setting == "greedy"]
    row = results().row("grpo", "sft", "greedy", "goal")
    assert sum(r.num_pairs * r.difference for r in rows) / row.num_pairs == pytest.approx(row.difference)
    assert [r.difference for r in rows] == sorted(r.difference for r in rows)


def test_the_plan_names_scenarios_and_the_difference_at_equal_length():
    row = results().row("grpo", "sft", "sampled", "goal")
    text = plan_text(row, results())
    assert f"takes {row.required_scenarios} scenarios" in text
    assert "at equal words per utterance the difference is" in text
    assert plan_text(row.model_copy(update={"detectable": None, "equal_length": None}), results()) == ""
    assert f"tests {len(results().rows)} differences" in how_many_tests(results())


def test_published_figures_name_source_partner_judge_and_where_they_were_read(page):
    for figure in published_results():
        assert figure.metric in METRICS
        assert figure.manifest in {"sotopia-hard", "sotopia-all"}
        assert figure.partner
        assert figure.source
        assert figure.judge
        assert figure.read
    assert {f.manifest for f in beside("sotopia-hard-14x2")} == {"sotopia-hard"}
    text = (page / "report.html").read_text(encoding="utf-8")
    assert "Not paired" in text
    assert "5.04 ± 0.31" in text
    assert f'<td class="num">{NOT_STATED}</td>' in text
    assert NOT_STATED == "not stated where read"
    assert "6.97" in text


def documented_figures() -> set[tuple[str, str, str, str, str]]:
    """System, partner, list of scenarios, metric and figure of each cell of the documentation's tables."""
    docs = (Path(__file__).parents[1] / "docs" / "published-results.md").read_text(encoding="utf-8")
    found: set[tuple[str, str, str, str, str]] = set()
    head: list[str] = []
    for line in docs.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "System":
            head = cells
        named = dict(zip(head, cells, strict=False))
        for title, text in named.items():
            column = re.fullmatch(r"(hard|all): (goal|overall)(?: with (.+))?", title)
            if column and line.startswith("|"):
                size, metric, partner = column.groups()
                found.add((named["System"], partner or named["Partner"], f"sotopia-{size}", metric, text))
        head = head if line.startswith("|") else []
    return found


def test_every_published_figure_stands_in_the_documentation_under_its_system_partner_and_scenarios():
    documented = documented_figures()
    for f in published_results():
        shown = f"{f.value:.2f}" if f.plus_minus is None else f"{f.value:.2f} ± {f.plus_minus:.2f}"
        assert (f.system, f.partner, f.manifest, f.metric, shown) in documented, f


def test_no_published_figure_stands_there_twice():
    figures = published_results()
    assert len(set(figures)) == len(figures)


def test_a_strip_of_many_scenarios_drops_the_names_and_keeps_the_dots():
    few = str(strip([("a", 1.0), ("b", -1.0)], title="Goal"))
    assert ">a</text>" in few
    assert "above zero in 1 of 2" in few
    many = str(strip([(f"s{i}", i - 45.0) for i in range(90)], title="Goal"))
    assert many.count("<circle") == 90
    assert ">s1</text>" not in many
    assert strip([], title="Goal") == ""


@pytest.mark.parametrize(
    ("variance", "low", "high", "text"),
    [
        (4.0, 1.0, 9.0, "2.00 [1.00, 3.00]"),
        (-1.0, -2.0, 1.0, "0.00 [0.00, 1.00]"),
        (4.0, None, None, "2.00"),
        (None, None, None, "\N{EN DASH}"),
    ],
)
def test_variances_are_shown_as_points_and_never_below_zero(variance, low, high, text):
    assert sd_text(variance, low, high) == text


WIDTH = """
<script>
  const root = document.documentElement;
  const cards = [...document.querySelectorAll(".card")].filter((card) => card.scrollWidth > card.clientWidth + 1);
  const stuck = cards.filter((card) => getComputedStyle(card).overflowX !== "auto").length;
  root.setAttribute("data-wide", `${root.scrollWidth - root.clientWidth} ${stuck}`);
</script>
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_fits_its_window_in_chromium(page, tmp_path, width):
    path = tmp_path / "page.html"
    text = (page / "report.html").read_text(encoding="utf-8")
    path.write_text(text.replace("</body>", WIDTH + "</body>"), encoding="utf-8")
    dom, console = chromium(path, tmp_path, f"--window-size={width},900")
    assert console == []
    assert re.search(r'data-wide="([^"]*)"', dom).group(1) == "0 0"
