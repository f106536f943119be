"""Transformers still does what qdense relies on beyond its documentation: see qdense/compat/transformers.py."""

import pytest
import torch
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from qdense.compat.transformers import (
    attention_set_to,
    checkpoint_function,
    is_recomputable,
    loss_computed_by,
    replace_checkpoint_function,
    set_recomputed,
)
from tests.helpers.models import tiny_config

IDS = torch.arange(12).reshape(2, 6) + 5


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config())


def test_another_attention_is_given_what_the_model_is_and_no_mask(model):
    seen = []

    def attend(module, query, key, value, attention_mask, *, marker=None, **_):
        seen.append((marker, attention_mask))
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    AttentionInterface.register("qdense_test", attend)
    before = model(input_ids=IDS).logits
    with attention_set_to(model, "qdense_test"):
        model(input_ids=IDS, marker="ours", use_cache=False)
    assert seen == [("ours", None)] * 2, "not in each layer, without the model's further arguments, or with a mask"
    assert torch.equal(model(input_ids=IDS).logits, before)
    with pytest.raises(KeyError), attention_set_to(model, "qdense_test"):
        raise KeyError
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert len(seen) == 2


def test_the_attention_of_a_model_inside_peft_is_set_too(model):
    from peft import LoraConfig, get_peft_model

    called = []

    def attend(module, query, *others, **_):
        called.append(module)
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    AttentionInterface.register("qdense_test_peft", attend)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with attention_set_to(adapted, "qdense_test_peft"):
        adapted(input_ids=IDS, use_cache=False)
    assert len(called) == 2


def test_a_loss_function_is_handed_what_the_output_layer_returns(model):
    given = {}

    def loss_function(logits, labels, num_items_in_batch=None, **_):
        given.update(logits=logits, labels=labels, num_items=num_items_in_batch)
        return logits.sum() * 0 + 7

    before = model(input_ids=IDS, labels=IDS).loss
    model.lm_head.forward = lambda hidden: hidden
    with loss_computed_by(model, loss_function):
        loss = model(input_ids=IDS, labels=IDS, num_items_in_batch=torch.tensor(9)).loss
    del model.lm_head.forward
    assert loss.item() == 7
    assert given["logits"].shape == (*IDS.shape, model.config.hidden_size), "what the output layer returned was changed"
    assert torch.equal(given["labels"], IDS)
    assert given["num_items"] == 9
    assert torch.equal(model(input_ids=IDS, labels=IDS).loss, before)


def calls_of_mlps(model):
    """How often each layer's MLP runs in a training step."""
    counts = [0] * len(model.model.layers)

    def counter(index):
        def count(module, arguments):
            counts[index] += 1

        return count

    handles = [layer.mlp.register_forward_pre_hook(counter(i)) for i, layer in enumerate(model.model.layers)]
    model.train()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    return counts


def test_layers_are_recomputed_one_by_one_and_through_a_function_of_ours(model):
    first, second = model.model.layers
    assert is_recomputable(first)
    assert not is_recomputable(first.mlp)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    set_recomputed(second, False)
    assert calls_of_mlps(model) == [2, 1]
    called, own = [], checkpoint_function(first)

    def function(forward, hidden, *others):
        called.append((hidden.shape, others))
        return own(forward, hidden, *others)

    replace_checkpoint_function(first, function)
    assert calls_of_mlps(model) == [2, 1]
    assert called == [((*IDS.shape, 64), ())], "a layer's checkpoint takes more than its input by position"
    for again in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        replace_checkpoint_function(first, function)
        again()
        assert checkpoint_function(first) is not function, "ours outlives a change of checkpointing"


def test_a_cache_is_made_of_layers_of_ours_that_it_only_updates(model):
    class Doubled(DynamicLayer):
        def update(self, key_states, value_states, *others, **_):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
            return self.keys, self.values

    cache = Cache(layer_class_to_replicate=Doubled)
    model.eval()
    model(input_ids=IDS[:, :4], past_key_values=cache, use_cache=True)
    assert [type(layer) for layer in cache.layers] == [Doubled, Doubled]
    assert cache.get_seq_length() == 4
    # Other keys of the same shape are used as they are: nothing else is kept.
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:1], layer.values[:1]
    rest = {"input_ids": IDS[:1, 4:], "position_ids": torch.tensor([[4, 5]])}
    found = model(**rest, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, model(input_ids=IDS[:1]).logits[:, 4:])
