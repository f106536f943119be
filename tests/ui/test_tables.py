"""Tables of results, as text of 120 columns."""

from qdense.analysis import Analysis
from qdense.analysis.updates import FactorSummary
from qdense.comparison.compare import compare
from qdense.comparison.evaluations import load_evaluation
from qdense.modeling.merge import MergeReport
from qdense.planning.parameters import ParameterCount
from qdense.ui.comparison import show_comparison
from qdense.ui.console import drawn
from qdense.ui.tables import show_analysis, show_merge, show_methods, show_parameters
from tests.helpers.evaluations import recipe_tables, write_evaluation


def merged(lost_median, lost_worst):
    return MergeReport(
        folder="out", onto="original", rounded_to="nf4", num_layers=10, lost_median=lost_median, lost_worst=lost_worst,
        worst_layer="layers.0.q_proj", divergence=0.0123, num_tokens=2000, num_same=1999,
    )  # fmt: skip


def test_what_merging_lost_is_written_in_plain_decimals():
    text = " ".join(drawn(lambda console: show_merge(console, merged(1.0, 2.434))).split())
    assert "lost to rounding: 100% of an update in the median of 10 layers, at most 243% (layers.0.q_proj)" in text
    assert "0.012 nats per token, the same most likely token for 1,999 of 2,000" in text
    text = " ".join(drawn(lambda console: show_merge(console, merged(0.0000031, 0.0415))).split())
    assert "lost to rounding: 0.00031% of an update in the median of 10 layers, at most 4.2%" in text


def count(method, percent):
    return ParameterCount(method, "tiny", 8, 1000, 2000, percent, {"q_proj": 1000})


def test_shares_of_parameters_are_plain_decimals():
    counts = [count("denselora", 0.0000123), count("full", 100.0), count("none", 0.0)]
    lines = drawn(lambda console: show_methods(console, counts)).splitlines()
    shares = {line.split()[0]: line.split()[2] for line in lines[2:] if line}
    assert shares == {"denselora": "0.0000123", "full": "100", "none": "0"}
    assert "denselora r 8 on tiny: 0.0000123% of" in drawn(lambda console: show_parameters(console, counts[0]))


def test_a_change_larger_than_the_start_is_written_in_plain_decimals():
    numbers = dict.fromkeys(FactorSummary.__dataclass_fields__, 1)
    line = FactorSummary(**numbers | {"run": "a", "factor": "M", "relative_change": 12.341})
    analysis = Analysis("out", ["summary.json"], side=64, seed=0, near_zero=0.1, summaries=[line])
    assert " 1234% " in drawn(lambda console: show_analysis(console, analysis))


def test_a_wholly_trained_model_has_100_percent_trained(tmp_path):
    run = write_evaluation(tmp_path / "run", {"gsm8k": [1, 0, 1]}, recipe=recipe_tables())
    comparison = compare([load_evaluation(run)], rule="paper", published=None)
    comparison["groups"][0]["trainable_percent"] = 100.0
    assert " trained (100%)" in drawn(lambda console: show_comparison(console, comparison))
