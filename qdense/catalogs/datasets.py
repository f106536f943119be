"""The data sets that qdense knows by name, and where upstream keeps each.

Upstream is AGI-Edgerunners/LLM-Adapters at a fixed commit; a file is identified by its git blob id, the SHA-1 of
`blob <size>\\0` and its bytes, so a download can be verified without a list of checksums.
"""

from __future__ import annotations

from dataclasses import dataclass

UPSTREAM_COMMIT = "816657208af4db747803f87ba40a4c71383fed7a"
UPSTREAM_URL = f"https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/{UPSTREAM_COMMIT}"


@dataclass(frozen=True)
class UpstreamFile:
    """A file of LLM-Adapters.

    Attributes:
        path: there, and below `--data-dir`.
        blob_id: git's.
        num_rows: of a training set, if it is known without the file.
        tokens_of_row: about, with the llm-adapters template and at most 256: measured with SmolLM2's tokenizer on rows like
            these (1,824 of Math10K's own, 4,000 of Commonsense170K's sources).
    """

    path: str
    blob_id: str
    num_rows: int | None = None
    tokens_of_row: int | None = None


# Training sets by name; None marks sets that qdense generates.
TRAINING_SETS: dict[str, UpstreamFile | None] = {
    "math10k": UpstreamFile(
        "ft-training_set/math_10k.json", "27dba77d6ed80aa118d78fbafa5cecd651f6d463", num_rows=9_919, tokens_of_row=211
    ),
    "commonsense170k": UpstreamFile(
        "ft-training_set/commonsense_170k.json",
        "529e426b33d4cdb1d0c4a275a1a7245ad081fd91",
        num_rows=170_420,
        tokens_of_row=114,
    ),
    "commonsense15k": UpstreamFile("ft-training_set/commonsense_15k.json", "3716afef6d384c475dba13f88a5a96c8032dafe2"),
    "wordproblems": None,  # qdense.data.wordproblems
}

# Test sets by the name of their benchmark (`qdense.benchmarks.tasks`); None as above.
TEST_SETS: dict[str, UpstreamFile | None] = {
    "gsm8k": UpstreamFile("dataset/gsm8k/test.json", "57a7a08e10e12e975e1f972d2b8125c0d4c722b1"),
    "aqua": UpstreamFile("dataset/AQuA/test.json", "731fbb456f7a93bb4121125de09c4adcf42e5dab"),
    "addsub": UpstreamFile("dataset/AddSub/test.json", "f3996cdf4159b4e1e4b6768865a4db72105f4e2f"),
    "svamp": UpstreamFile("dataset/SVAMP/test.json", "98b8f1872db596f8aaff2c95d1d698a9fa13b94f"),
    "multiarith": UpstreamFile("dataset/MultiArith/test.json", "08e996c6cd8c633cc977f5c50709a8bbfc8fadff"),
    "singleeq": UpstreamFile("dataset/SingleEq/test.json", "cce7a868400323e30e2094a15d482c1aa743dbb0"),
    "mawps": UpstreamFile("dataset/mawps/test.json", "eca473c5b5d398acbae0b84ede833bbbccd63add"),
    "mathqa": UpstreamFile("dataset/mathqa/test.json", "4395ded7d91bd4fb1192ba3981f6ef00ccc88570"),
    "boolq": UpstreamFile("dataset/boolq/test.json", "6d7edb0a8e8a6566b546ccf0d98d24e48db3fdf3"),
    "piqa": UpstreamFile("dataset/piqa/test.json", "f7a1c260692ef31796d4763cb6334f316a754fed"),
    "siqa": UpstreamFile("dataset/social_i_qa/test.json", "eadf221799ca394367b144c0f86ee0436db409d2"),
    "hellaswag": UpstreamFile("dataset/hellaswag/test.json", "183c4920415f83ba4b793c4873a33e7e10bd1be5"),
    "winogrande": UpstreamFile("dataset/winogrande/test.json", "21257263593dd4d00546e1918c88ca0f357b08ad"),
    "arc-e": UpstreamFile("dataset/ARC-Easy/test.json", "6c0d30aaedaeca148df6bcd7aaacf7c31e6ad70f"),
    "arc-c": UpstreamFile("dataset/ARC-Challenge/test.json", "9540685439144200b5a7e48dab9ca4655be2af09"),
    "obqa": UpstreamFile("dataset/openbookqa/test.json", "a6e69676104bcb77237388c3b5a3f0dcbb81d1e2"),
    "wordproblems": None,
}
