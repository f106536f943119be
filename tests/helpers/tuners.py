"""What the tests of our PEFT tuners share: small bases of each kind, and what is asked of a model on one."""

import torch

from qdense.modeling.load import load_base
from qdense.recipe import ModelRecipe

TOKENS = torch.arange(24).reshape(2, 12) + 5
BASES = [("none", "float32"), ("none", "bfloat16"), ("nf4", "bfloat16"), ("int8", "bfloat16")]


def fresh_base(tiny_model, quantization="none", dtype="float32"):
    return load_base(ModelRecipe(name=str(tiny_model), quantization=quantization, dtype=dtype, device="cpu")).model


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
