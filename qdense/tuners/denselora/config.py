"""Settings of a DenseLoRA adapter, as PEFT stores them in adapter_config.json."""

from __future__ import annotations

from dataclasses import dataclass, field

from qdense.ops.denselora import ACTIVATIONS
from qdense.tuners.base import LinearTunerConfig
from qdense.tuners.registry import PeftTypeName

DENSELORA = PeftTypeName("DENSELORA")


@dataclass
class DenseLoraConfig(LinearTunerConfig):
    """Configuration of DenseLoRA (arXiv:2505.23808).

    Raises ValueError, with the field and the accepted values, when a setting is out of range.
    """

    r: int = field(default=32, metadata={"help": "Rank: encoder (r, d_in), M (r, r), decoder (d_out, r)."})
    alpha: float | None = field(
        default=None, metadata={"help": "The adapter's output is scaled by alpha / r. Default: 2 * r, as the authors'."}
    )
    dropout: float = field(default=0.0, metadata={"help": "On the input, the encoding and the output, in training."})
    activation: str = field(
        default="gelu",
        metadata={
            "help": "After encoder and decoder: gelu, silu, tanh; none is the paper's 'only matrix', and merges."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start with a zero decoder, so that the adapter adds nothing; False: a random one (tests)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DENSELORA
        self._require_positive_integer("r")
        if self.alpha is None:
            self.alpha = float(2 * self.r)
        self._require(self.alpha > 0, "alpha", "positive")
        self._require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1")
        if self.activation not in ACTIVATIONS:
            reason = ""
            if self.activation == "relu":
                reason = " ReLU has zero slope at 0, so a decoder that starts at zero would never get a gradient."
            raise ValueError(
                f"DenseLoraConfig.activation = {self.activation!r}: must be one of {', '.join(ACTIVATIONS)}.{reason}"
            )
