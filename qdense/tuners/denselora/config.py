"""Settings of a DenseLoRA adapter, as PEFT stores them in adapter_config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from qdense.catalogs.choices import Activation, Init, Sharing, ZeroInit
from qdense.compat.peft import PeftTypeName
from qdense.tuners.base import LinearTunerConfig

DENSELORA = PeftTypeName("DENSELORA")


@dataclass
class DenseLoraConfig(LinearTunerConfig):
    """Configuration of DenseLoRA (arXiv:2505.23808).

    Raises ValueError, with the field and the accepted values, when a setting is out of range.
    """

    r: int = field(default=32, metadata={"help": "Rank: encoder (r, d_in), M (r, r), decoder (d_out, r)."})
    alpha: float | None = field(
        default=None, metadata={"help": "The adapter's output is scaled by alpha / r. Default: 2 * r, the authors'."}
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale by alpha / sqrt r instead, as rank-stabilised LoRA."}
    )
    dropout: float = field(default=0.0, metadata={"help": "On the input, the encoding and the output, in training."})
    activation: str = field(
        default="gelu",
        metadata={
            "help": "After encoder and decoder: gelu, silu, tanh, relu; none is the paper's 'only matrix', and merges."
        },
    )
    sharing: str = field(
        default="kind",
        metadata={
            "help": "Which layers share an encoder and decoder: kind (all of one module name, the authors'), shape (all of one "
            "input and output size), none."
        },
    )
    layer_groups: int = field(
        default=1,
        metadata={
            "help": "Into how many groups of neighbouring layers the decoder is divided; each group has its own encoders and "
            "decoders."
        },
    )
    init: str = field(
        default="paper",
        metadata={
            "help": "How M is drawn: paper (Kaiming uniform, the authors'), or balanced (wider, so that the decoder's first "
            "gradient is as large as that of LoRA's B)."
        },
    )
    zero_init: str = field(
        default="decoder",
        metadata={
            "help": "Which factor starts at zero, so that the adapter adds nothing at first: decoder (the authors'), m, none."
        },
    )
    freeze_shared: bool = field(
        default=False, metadata={"help": "Train M alone; encoders and decoders stay as they were drawn."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False: no factor starts at zero, whatever zero_init says (PEFT's convention)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DENSELORA
        self._require_positive_integer("r")
        if self.alpha is None:
            self.alpha = float(2 * self.r)
        self._require(self.alpha > 0, "alpha", "positive")
        self._require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1")
        self._require_positive_integer("layer_groups")
        settings = {"activation": Activation, "sharing": Sharing, "init": Init, "zero_init": ZeroInit}
        for name, choices in settings.items():
            accepted = get_args(choices)
            self._require(getattr(self, name) in accepted, name, f"one of {', '.join(accepted)}")
        if not self.init_weights:
            self.zero_init = "none"
        if self.activation == "relu" and self.zero_init != "none":
            raise ValueError(
                "DenseLoraConfig.activation = 'relu': needs zero_init = \"none\". ReLU has zero slope at 0, so after a "
                "factor that starts at zero nothing would ever get a gradient."
            )
        if self.init == "balanced" and self.zero_init != "decoder":
            raise ValueError(
                'DenseLoraConfig.init = "balanced": needs zero_init = "decoder". It sets the size of the decoder\'s first '
                "gradient, and is not defined for other starts."
            )
        if self.sharing == "none" and self.layer_groups > 1:
            raise ValueError(
                f'DenseLoraConfig.layer_groups = {self.layer_groups}: must be 1 with sharing = "none", where no layers share.'
            )
        if self.freeze_shared and self.zero_init == "decoder":
            raise ValueError(
                'DenseLoraConfig.freeze_shared = True: needs zero_init = "m" or "none". With a frozen decoder of zeros '
                "the adapter would never do anything."
            )
