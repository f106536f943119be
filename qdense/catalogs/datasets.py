"""The data sets that qdense knows by name, and where upstream keeps each.

Upstream is AGI-Edgerunners/LLM-Adapters at a fixed commit; a file is known by its git blob id, which is the SHA-1 of
`blob <size>\\0` and its bytes, so a download can be verified without any list of our own.
"""

from __future__ import annotations

from dataclasses import dataclass

UPSTREAM_COMMIT = "816657208af4db747803f87ba40a4c71383fed7a"
UPSTREAM_URL = f"https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/{UPSTREAM_COMMIT}"


@dataclass(frozen=True)
class UpstreamFile:
    """A file of LLM-Adapters: its path there (also below `--data-dir`) and its git blob id."""

    path: str
    blob_id: str


# Training sets by name; None marks what qdense makes itself.
TRAINING_SETS: dict[str, UpstreamFile | None] = {
    "math10k": UpstreamFile("ft-training_set/math_10k.json", "27dba77d6ed80aa118d78fbafa5cecd651f6d463"),
    "commonsense170k": UpstreamFile(
        "ft-training_set/commonsense_170k.json", "529e426b33d4cdb1d0c4a275a1a7245ad081fd91"
    ),
    "commonsense15k": UpstreamFile("ft-training_set/commonsense_15k.json", "3716afef6d384c475dba13f88a5a96c8032dafe2"),
    "wordproblems": None,  # qdense.data.wordproblems
}
