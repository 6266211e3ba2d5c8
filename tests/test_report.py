"""The page says what the numbers say, escapes everything, fetches nothing, and works in a real browser."""

from __future__ import annotations

import io
import json
import math
import random
import re
import shutil
import subprocess
import time
from dataclasses import replace
from functools import cache
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape
from rich.console import Console

from played_systems import manifest, played, rewards
from sotopia_rl.episode import Action, Failure, Turn
from sotopia_rl.errors import DataError
from sotopia_rl.evaluate import evaluate, load_results
from sotopia_rl.report import ReportInput, results_table, write_report
from sotopia_rl.report.charts import Line, Span, forest, line_chart, round_ticks, slopes
from sotopia_rl.report.curves import curve_view, run_title
from sotopia_rl.report.wording import answers, basis, headline_pair, interval, plain, signed, split_sentence

OVER = manifest()
TIMEOUT = Failure(kind="timeout", message="no reply in 30 s", turn=2)
EVIL = '<script>alert("x")</script> & "quotes" </div> {{ 7*7 }} | `code`'


def curve(num_points):
    return [
        {"step": i, "loss": 2 * math.exp(-i / 20), "kl": None, "epoch": i / 10, "grad_norm": 1.0}
        for i in range(num_points)
    ]


def reward_report():
    return {
        "groups": "prompt",
        "held_out_episodes": 12,
        "outputs": [
            {
                "name": "combined",
                "rows": 80,
                "mse": 0.01,
                "baseline_mse": 0.04,
                "pearson": 0.8,
                "spearman": 0.75,
                "pairwise_accuracy": None,
                "pairs": 0,
                "calibration": [{"rows": 8, "predicted": x / 10, "actual": x / 11} for x in range(10)],
                "best_of_n": [{"n": n, "chosen": 0.6, "oracle": 0.8, "random": 0.5, "groups": 9} for n in (1, 2, 4)],
            }
        ],
    }


@cache
def systems():
    failed = {0: TIMEOUT}
    return [played("base", 2, OVER), played("sft", 4, OVER), played("grpo", 6, OVER, failures=failed)]


@cache
def compared():
    return evaluate(systems(), [("sft", "base"), ("grpo", "sft")], seeds={"train": 3})


def demo(**changes):
    """A report of systems that were never played."""
    grpo = systems()[-1]
    episodes = [e for e in grpo.episodes if e.id in grpo.ratings][:3]
    report = ReportInput(
        results=compared(),
        title="Haggling",
        curves={"sft": curve(40), "grpo": [{"step": s, "reward": s / 10, "kl": s / 100} for s in range(20)]},
        reward_models={"rm": reward_report()},
        gate_min_spearman=0.3,
        episodes=[(e, grpo.ratings[e.id], rewards(e)) for e in episodes],
        provenance={"command": "sotopia-rl quickstart", "models": {"judge": "scripted/judge"}, "stages": ["a", "b"]},
        notes=["These scores mean nothing."],
    )
    return replace(report, **changes)


@pytest.fixture(scope="module")
def report():
    return demo()


@pytest.fixture(scope="module")
def written(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(report, folder)
    return folder


@pytest.fixture(scope="module")
def page(written):
    return (written / "report.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Checks that tags nest, and collects what a page refers to."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.describedby = [], [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[name] for name in ("href", "src") if name in values]
        self.describedby += [values["aria-describedby"]] if "aria-describedby" in values else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline(page):
    parser = Outline()
    parser.feed(page)
    parser.close()
    return parser


# --- the page ---------------------------------------------------------------------------------------


def test_the_page_nests_and_fetches_nothing(page):
    found = outline(page)
    assert found.open == []
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert "http:" not in page.replace('http-equiv="Content', "")
    assert "https:" not in page
    assert "@import" not in page


def test_every_link_and_every_tooltip_has_its_target_and_ids_are_unique(page):
    found = outline(page)
    assert len(set(found.ids)) == len(found.ids)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert found.describedby
    assert set(found.describedby) <= set(found.ids)


def test_the_answer_the_notes_and_the_hash_are_on_the_page(report, page):
    for text in (
        *answers(report.results),
        "These scores mean nothing.",
        report.results.manifest_sha256,
        "scripted/judge",
    ):
        assert str(escape(text)) in page


def test_every_row_of_the_results_is_on_the_page_with_its_interval(report, page):
    for row in report.results.rows:
        assert f'{signed(row.difference)} <span class="ci">{interval(row.low, row.high)}</span>' in page


def test_failures_are_counted_and_bounded_on_the_page(page):
    assert "agent_failed: timeout 1" in page
    assert "1 pair has no score on one side" in page


def test_every_rewarded_utterance_can_be_focused_and_has_its_vector(report, page):
    for episode, _, shown in report.episodes:
        for reward in shown:
            assert f'aria-describedby="tip-{reward.turn + 1}-{episode.id}"' in page
            assert f"Turn {reward.turn}: reward {reward.reward:.2f} of 10" in page
    assert page.count('class="bubble') >= sum(len(shown) for _, _, shown in report.episodes)


def test_what_people_say_is_shown_and_never_run(report, tmp_path):
    episode, rating, shown = report.episodes[0]
    turns = (Turn(index=0, seat=0, action=Action(action_type="speak", argument=EVIL)), *episode.turns[1:])
    scenario = episode.match.scenario.model_copy(update={"description": EVIL, "codename": EVIL})
    match = episode.match.model_copy(update={"scenario": scenario})
    evil = episode.model_copy(update={"turns": turns, "match": match})
    changed = demo(
        title=EVIL,
        notes=[EVIL],
        episodes=[(evil, rating, shown)],
        provenance={EVIL: {EVIL: [EVIL]}},
        curves={EVIL: curve(5)},
    )
    page = write_report(changed, tmp_path).read_text(encoding="utf-8")
    assert page.count("<script>") == 1
    assert 'alert("x")' not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in page
    assert "{{ 7*7 }}" in page
    assert outline(page).open == []
    assert "<script>" not in (tmp_path / "report.md").read_text(encoding="utf-8").replace("\\<script\\>", "")


def test_a_report_of_results_alone_has_no_empty_sections(report, tmp_path):
    bare = ReportInput(results=report.results)
    page = write_report(bare, tmp_path).read_text(encoding="utf-8")
    for section in ("training", "reward-model", "episodes"):
        assert f'id="{section}"' not in page
    assert outline(page).open == []


def test_results_stand_beside_the_page(report, written):
    assert load_results(written / "results.json") == report.results


def test_markdown_tables_have_equal_columns(written):
    text = (written / "report.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 5  # two comparisons, each partner alone, sources of spread, failures
    for table in tables:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1


def test_a_reward_model_below_the_gate_is_marked(tmp_path):
    page = write_report(demo(gate_min_spearman=0.9), tmp_path).read_text(encoding="utf-8")
    assert "gate not passed: Spearman at least 0.9" in page


def test_a_reward_model_report_of_another_form_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"reward model 'rm'.*held_out_episodes"):
        write_report(demo(reward_models={"rm": {"groups": "prompt", "outputs": []}}), tmp_path)


# --- words ------------------------------------------------------------------------------------------


def answer(results):
    """The one sentence of the leading comparison."""
    return answers(results)[0]


def results_with(differences, **changes):
    """Results whose headline rows have the given (difference, low, high), sampled and greedy, and leave nothing out."""
    changes = {"num_excluded": 0, **changes}
    results = compared()
    rows = []
    for row in results.rows:
        if (row.system_a, row.metric) == ("grpo", "goal"):
            value, low, high = differences[row.setting]
            rows.append(
                row.model_copy(update={"difference": value, "low": low, "high": high, "detectable": 0.7, **changes})
            )
    return results.model_copy(update={"rows": tuple(rows)})


def test_a_gain_in_both_settings_is_called_a_gain():
    text = answer(results_with({"sampled": (1.2, 0.5, 1.9), "greedy": (0.4, 0.1, 0.7)}))
    assert text == (
        "grpo beats sft in goal: +1.20 points [0.50, 1.90] when both sample, "
        "and +0.40 points [0.10, 0.70] when both play greedily."
    )


def test_a_gain_that_greedy_play_does_not_show_is_not_claimed_for_it():
    text = answer(results_with({"sampled": (1.2, 0.5, 1.9), "greedy": (0.1, -0.3, 0.5)}))
    assert "beats sft in goal: +1.20 points" in text
    assert "+0.10 points [\N{MINUS SIGN}0.30, 0.50] when both play greedily cannot be told from none" in text


def test_no_gain_is_called_no_gain_with_what_could_have_been_found():
    text = answer(results_with({"sampled": (0.2, -0.5, 0.9), "greedy": (0.1, -0.3, 0.5)}))
    assert text.startswith("No difference in goal between grpo and sft is shown")
    assert "a true difference of 0.70 would have been found 80% of the time" in text


def test_a_loss_is_called_a_loss_and_opposite_signs_are_not_hidden():
    lost = {"sampled": (-1.2, -1.9, -0.5), "greedy": (-0.4, -0.7, -0.1)}
    assert "grpo falls behind sft in goal: \N{MINUS SIGN}1.20" in answer(results_with(lost))
    mixed = {"sampled": (1.2, 0.5, 1.9), "greedy": (-0.4, -0.7, -0.1)}
    assert "beats or falls behind, by setting," in answer(results_with(mixed))


def test_one_scenario_is_no_evidence():
    text = answer(results_with({"sampled": (1.2, None, None), "greedy": (1.1, None, None)}, detectable=None))
    assert text == (
        "Whether grpo or sft does better in goal cannot be told: +1.20 points [no interval] when both sample "
        "and +1.10 points [no interval] when both play greedily."
    )


@pytest.mark.parametrize(
    ("sampled", "bounds", "said"),
    [
        ((1.2, 0.5, 1.9), (0.2, 2.0), "which cannot turn it)"),
        ((1.2, 0.5, 1.9), (-0.5, 2.0), "which could turn it; with them anything from \N{MINUS SIGN}0.50 to +2.00)"),
        ((0.2, -0.5, 0.9), (0.1, 0.4), "6 of 38 pairs left out; with them anything from +0.10 to +0.40)"),
        ((1.2, None, None), (-3, 4), "6 of 38 pairs left out; with them anything from \N{MINUS SIGN}3.00 to +4.00)"),
        ((1.2, 0.5, 1.9), (None, None), "when both sample (6 of 38 pairs left out)"),
    ],
)
def test_the_answer_says_how_many_pairs_it_leaves_out_and_whether_they_could_turn_it(sampled, bounds, said):
    differences = {"sampled": sampled, "greedy": (0.1, -0.3, 0.5)}
    changes = {"num_pairs": 32, "num_excluded": 6, "worst": bounds[0], "best": bounds[1]}
    assert said in answer(results_with(differences, **changes))


def test_one_pair_in_one_scenario_is_no_plural():
    differences = {"sampled": (1.2, None, None), "greedy": (0.1, None, None)}
    assert "(1 sampled pair in 1 scenario, 1 greedy pair in 1 scenario)" in basis(
        results_with(differences, num_pairs=1, num_scenarios=1)
    )


def test_every_comparison_has_its_own_sentence_and_the_leading_one_stands_first(report, page, written):
    first, second = answers(report.results)
    assert first.startswith("grpo beats sft in goal")
    assert second.startswith("sft beats base in goal")
    assert f'<p class="answer">{escape(first)}</p>' in page
    assert f'<p class="also">{escape(second)}</p>' in page
    assert "sft beats base in goal" in (written / "report.md").read_text(encoding="utf-8")


def nothing_scored(name):
    return played(name, 4, OVER, temperatures=[0.7], failures=dict.fromkeys(range(32), TIMEOUT))


def test_a_comparison_without_a_pair_is_reported_beside_the_others(tmp_path):
    sft, grpo = (played(name, skill, OVER, temperatures=[0.7]) for name, skill in (("sft", 4), ("grpo", 6)))
    results = evaluate([sft, grpo, nothing_scored("bad")], [("bad", "sft"), ("grpo", "sft")])
    said = "no pair has a score on both sides, 32 left out (bad: agent_failed: timeout 32)"
    assert answers(results)[0].startswith("grpo beats sft")
    assert answers(results)[1] == (f"Whether bad or sft does better in goal cannot be told: when both sample, {said}.")
    page = write_report(ReportInput(results=results), tmp_path).read_text(encoding="utf-8")
    assert page.count(said) == 2
    assert outline(page).open == []
    assert said in (tmp_path / "report.md").read_text(encoding="utf-8").replace("\\", "")
    console = Console(file=io.StringIO(), width=200)
    console.print(results_table(results))
    assert "bad - sft, sampled" in console.file.getvalue()
    assert "no pair, 32 left out" in console.file.getvalue()
    assert load_results(tmp_path / "results.json") == results


def test_a_trained_variant_over_sft_leads_the_page(report):
    assert (report.results.rows[0].system_a, report.results.rows[0].system_b) == ("sft", "base")
    assert headline_pair(report.results) == ("grpo", "sft")


def test_the_split_of_a_gain_adds_up_in_words(report):
    found = next(d for d in report.results.decompositions if d.metric == "goal")
    text = split_sentence(found)
    assert signed(found.sampled_gain.value) in text
    assert signed(found.greedy_gain.value) in text
    assert "Better play" in text


@given(st.floats(-100, 100))
def test_numbers_have_a_true_minus_sign_and_no_negative_zero(value):
    for text in (plain(value), signed(value)):
        assert "-" not in text
        assert float(text.replace("\N{MINUS SIGN}", "-")) == pytest.approx(value, abs=0.006)
    assert plain(-0.001) == signed(-0.001) == "0.00"


def test_the_terminal_table_shows_each_comparison_once(report):
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table(report.results))
    text = console.file.getvalue()
    assert text.count("grpo - sft") == 2
    assert (
        interval(*(getattr(report.results.row("grpo", "sft", "greedy", "goal"), end) for end in ("low", "high")))
        in text
    )
    assert "1 left out" in text


# --- charts -----------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_rising_and_inside(low, width):
    high = low + width
    if high <= low:
        return
    ticks = round_ticks(low, high)
    assert ticks == sorted(set(ticks))
    assert all(low - 1e-6 * width <= tick <= high + 1e-6 * width for tick in ticks)
    assert len(ticks) <= 12


@given(st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)), min_size=1, max_size=50))
def test_a_chart_carries_its_exact_values(points):
    svg = line_chart([Line("loss", sorted(points))], title=EVIL, x_label="step")
    assert outline(str(svg)).open == []
    assert "<script" not in svg
    data = re.search(r'data-lines="([^"]*)"', str(svg)).group(1)
    shown = json.loads(unescape(data))[0]["points"]
    assert [(x, y) for x, y, _, _ in shown] == sorted(points)


def test_a_chart_without_points_is_nothing():
    assert line_chart([], title="loss", x_label="step") == ""


def test_marks_of_a_forest_lie_left_and_right_of_zero():
    svg = str(forest([Span(-1, -2, -0.5, "sampled clear", "a"), Span(1, None, None, "greedy unclear", "b")], reach=2))
    first, second = (float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg))
    zero = float(re.search(r'<line x1="([\d.]+)"[^>]*class="zero"', svg).group(1))
    assert first < zero < second
    assert svg.count("whisker") == 1


def test_slopes_describe_themselves_in_words():
    svg = str(slopes([("sft", 1.0, 2.0), ("a very long name of a system", 1.5, 2.5)], title="Goal"))
    assert "sft: 1.00 sampled, 2.00 greedy" in svg


@pytest.mark.parametrize("values", [[0.88] * 4, [0.88, 0.881, 0.9, 5.0], [float(i) for i in range(20)]])
def test_names_beside_slopes_keep_apart_from_one_another_and_from_the_axis(values):
    svg = str(slopes([(f"s{i}", v, v) for i, v in enumerate(values)], title="Goal"))
    axis = float(re.search(r'<text x="128.0" y="([\d.]+)" class="tick middle">sampled', svg).group(1))
    names = sorted(float(y) for y in re.findall(r'y="([\d.]+)" class="name end"', svg))
    assert all(after - before >= 15 for before, after in pairwise(names))
    assert names[0] >= 10
    assert axis - names[-1] >= 15


def ticks_of(svg):
    """(of the y axis, of the x axis)"""
    return re.findall(r'class="tick end">([^<]+)<', str(svg)), re.findall(r'class="tick middle">([^<]+)<', str(svg))


def test_shares_are_drawn_from_0_to_1_and_steps_are_whole():
    lines = [{"step": s, "validity": 1.0, "kl": 0.0, "cut_off": 0.0, "reward": 1.0} for s in (1, 2, 3)]
    charts = {chart.title: ticks_of(chart.svg) for chart in curve_view(lines).charts}
    for title in ("Valid replies, share", "Replies cut off, share", "KL from the reference"):
        assert charts[title][0] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert {tuple(steps) for _, steps in charts.values()} == {("1", "2", "3")}


def test_runs_are_titled_by_stage_and_arm():
    assert [run_title(name) for name in ("sft", "grpo grpo", "rm grpo", "grpo plain", "run-7")] == [
        "SFT",
        "GRPO",
        "Reward model, arm grpo",
        "GRPO, arm plain",
        "run-7",
    ]


def test_markdown_tells_the_provenance_in_words(written):
    text = (written / "report.md").read_text(encoding="utf-8")
    assert "- models: judge: scripted/judge\n- stages: a, b\n" in text


def test_curves_leave_out_what_is_no_number():
    lines = [
        {"step": 0, "loss": 1.0},
        {"step": 1, "loss": math.nan},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 0.5},
    ]
    (chart,) = curve_view(lines).charts
    assert chart.title == "Loss"
    assert "[[0.0,1.0," in unescape(chart.svg)
    assert "NaN" not in chart.svg


def test_a_warning_of_a_run_is_shown_with_its_step():
    view = curve_view([{"step": 4, "reward": 1.0, "loss": 0.0}, {"step": 5, "warning": "the policy collapses"}])
    assert view.warnings == ["Step 5: the policy collapses"]
    assert [chart.title for chart in view.charts] == ["Reward"]


def test_long_curves_are_thinned_and_smoothed():
    rng = random.Random(0)
    (chart,) = curve_view([{"step": i, "loss": rng.random()} for i in range(5000)]).charts
    assert "smoothed" in chart.svg
    assert len(chart.svg) < 60_000


def test_a_thousand_episodes_are_reported_fast(tmp_path):
    over = manifest(63)
    pair = [played(name, skill, over) for name, skill in (("sft", 4), ("grpo", 6))]
    assert sum(len(p.episodes) for p in pair) > 1000
    start = time.process_time()
    results = evaluate(pair, [("grpo", "sft")])
    assert write_report(ReportInput(results=results), tmp_path).is_file()
    assert time.process_time() - start < 20


# --- in a real browser ------------------------------------------------------------------------------

PROBE = """
<script>
  const found = {};
  const chart = document.querySelector("svg[data-lines]");
  const box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 20}));
  found.readout = document.getElementById("readout").textContent;
  found.readoutVisible = getComputedStyle(document.getElementById("readout")).visibility;
  chart.dispatchEvent(new PointerEvent("pointerleave"));
  chart.focus();
  chart.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft", bubbles: true}));
  found.keyboard = document.getElementById("readout").textContent;
  const bubble = document.querySelector(".bubble.rated");
  const tip = bubble.querySelector(".tip");
  found.tipBefore = getComputedStyle(tip).visibility;
  bubble.focus();
  found.tipFocused = getComputedStyle(tip).visibility;
  found.tip = tip.textContent.replace(/\\s+/g, " ");
  found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const light = getComputedStyle(document.body).backgroundColor;
  document.querySelector(".theme").click();
  found.themes = [light, getComputedStyle(document.body).backgroundColor];
  document.documentElement.setAttribute("data-found", JSON.stringify(found));
</script>
"""


def chromium(path, tmp_path, *options):
    """The page's DOM after its scripts ran, and what it wrote on the console."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium: apt-get install chromium")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [browser, *flags.split(), "--disable-component-update", "--disable-sync", *options]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_works_in_chromium(page, tmp_path, width):
    path = tmp_path / "probed.html"
    path.write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom, console = chromium(path, tmp_path, f"--window-size={width},900")
    assert console == []
    found = json.loads(unescape(re.search(r'data-found="([^"]*)"', dom).group(1)))
    assert re.match(r"step \d+training", found["readout"])
    assert found["readoutVisible"] == "visible"
    assert found["keyboard"].startswith("step ")
    assert (found["tipBefore"], found["tipFocused"]) == ("hidden", "visible")
    assert "reward" in found["tip"]
    assert "Goal" in found["tip"]
    assert found["wide"] <= 0
    assert found["themes"][0] != found["themes"][1]
